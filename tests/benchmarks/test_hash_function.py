"""The cost benchmark times both networks, each beside the products that it cannot spare."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import hash_function


def test_both_networks_are_timed_beside_their_own_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "result.json"
    command = f"hash_function --layers 2 --experts 8 --top-k 2 --vocab 100 --batch 1 2 --runs 1 --out {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    hash_function.main()
    networks = json.loads(out.read_text())["networks"]
    assert list(networks) == ["paper", "filters"]
    for measured in networks.values():
        assert set(measured["results"]) == {"prompts_1", "step_1", "prompts_2", "step_2"}
        assert measured["products_ms"] > 0
    sizes = [measured["parameters"] for measured in networks.values()]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)
