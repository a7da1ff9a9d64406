"""The placement benchmark: the drawn trace is as described, its bounds hold, and any folder of traces can be measured."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.expert_store.balancing import max_load
from actors.predictor.network import WeightRule
from actors.predictor.traces import TraceBatch, TraceHeader, TraceWriter
from benchmarks import placement
from benchmarks.placement import PLANS, even, floor, measure, random_plan, skewed_loads


def test_the_skewed_trace_has_one_busy_group_of_neighbours_in_every_batch_and_layer() -> None:
    loads = skewed_loads(num_batches=20, num_layers=2, num_experts=32, batch_tokens=1000, topic_experts=4)
    assert (loads.sum(-1) == 1000).all()
    busiest = loads.reshape(20, 2, 8, 4).sum(-1).max(-1)
    assert (busiest > 750).all()


@pytest.mark.parametrize("num_nodes", [2, 4, 8])
def test_no_plan_with_equally_many_experts_on_each_node_goes_below_the_floor(num_nodes: int) -> None:
    loads = skewed_loads(num_batches=20, num_layers=2, num_experts=32, batch_tokens=500, topic_experts=4)
    least = floor(loads, num_nodes)
    plans = [make(loads, num_nodes) for name, make in PLANS.items() if name != "even"]
    for plan in [*plans, *(random_plan(loads, num_nodes, seed) for seed in range(20))]:
        assert all((np.bincount(layer, minlength=num_nodes) == 32 // num_nodes).all() for layer in plan)
        assert max_load(loads, plan).average >= least.average
        assert max_load(loads, plan).worst >= least.worst


def test_even_is_what_the_store_does_and_splits_no_chunk() -> None:
    # 3 layers of 8 experts in 8 chunks for 2 nodes: 3, 3 and 2 experts, each to the emptiest node
    assert even(np.ones((1, 3, 8), np.int64), 2).tolist() == [
        [0, 0, 0, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 1],
        [0, 0, 0, 1, 1, 1, 0, 0],
    ]


def test_balancing_by_load_reaches_the_aim_on_8_nodes() -> None:
    rows = measure("skewed", skewed_loads(num_batches=100, num_layers=3), 8)
    average = {row["plan"]: row["avg_max_load"] for row in rows}
    assert average["contiguous"] > 0.6
    assert average["anti-correlation 0.05"] < 0.4
    assert average["anti-correlation 0.05"] < average["greedy"] < average["contiguous"]


def test_measures_any_folder_of_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.rand(8, 16, 3, 16, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :2]
    batch = TraceBatch(
        torch.zeros(8, 16, dtype=torch.int64), torch.ones(8, 16).bool(), ids, torch.zeros(ids.shape)
    )
    header = TraceHeader("0123456789abcdef", 3, 16, 2, 0, WeightRule(sum=1.0))
    TraceWriter(tmp_path / "switch", header).write(batch)
    monkeypatch.setattr(placement, "skewed_loads", lambda: np.ones((4, 2, 16), np.int64))
    arguments = ["--trace", str(tmp_path / "switch"), "--batch-tokens", "16", "--nodes", "2", "4"]
    outputs = ["--out", str(tmp_path / "out.json"), "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", ["placement", *arguments, *outputs])
    placement.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "out.json").read_text())
    assert record["batches_layers_experts"] == {"switch": [8, 3, 16], "skewed": [4, 2, 16]}
    assert {(row["trace"], row["nodes"]) for row in record["results"]} == {
        (trace, nodes) for trace in ("switch", "skewed") for nodes in (2, 4)
    }
    assert (tmp_path / "plot.png").stat().st_size > 1000
