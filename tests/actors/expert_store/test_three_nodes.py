"""ExpertStore on several nodes: spread by what they offer, and rebuilt from the checkpoint when one is lost."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import make_checkpoint

PROGRAM = Path(__file__).with_name("three_nodes.py")
ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint("qwen3_moe", folder, moe_intermediate_size=5208)  # 24 experts of 4 MB
    python_path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with tempfile.TemporaryDirectory(
        prefix="ray-"
    ) as ray_folder:  # or it would become the machine's current cluster
        Path(ray_folder, "ray").mkdir()
        finished = subprocess.run(
            [sys.executable, str(PROGRAM), str(folder)],
            env={**os.environ, "PYTHONPATH": python_path, "RAY_TMPDIR": ray_folder},
            capture_output=True,
            text=True,
            timeout=250,
        )
    assert finished.returncode == 0, finished.stderr[-3000:]
    outcome: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return outcome


def test_refuses_when_the_offers_together_are_too_small(result: dict[str, Any]) -> None:
    assert (
        "need 0.10 GB but the object store offers 0.06 GB; add a node: `ray start --address="
        in result["refusal"]
    )


def test_spreads_experts_by_what_the_nodes_offer(result: dict[str, Any]) -> None:
    assert result["experts"] == 24
    assert (result["on_small"], result["on_large"]) == (6, 18)


def test_places_by_load_where_the_nodes_have_room(result: dict[str, Any]) -> None:
    assert result["nodes_of_hot_experts"] == [2, 2, 2]  # evenly filled, they would share a chunk and a node
    assert result["by_load_on_small"] == 6
    assert result["told"]["placement"] == "by load"
    # 100 tokens of a window: 47 for a hot expert and 1 for each cold one, 2 and 6 experts of 8 on the nodes
    assert result["told"]["max_load"] == {"average": 0.52, "worst": 0.52}


def test_every_expert_of_a_lost_node_is_rebuilt(result: dict[str, Any]) -> None:
    assert result["equal_after_loss"] == 24
