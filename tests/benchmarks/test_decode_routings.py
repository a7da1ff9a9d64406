"""The decode benchmark at a toy size: drawn routings, and every number of slots computing the same."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tests.actors.executor.conftest  # noqa: F401  # before any kernel: they run in Triton's interpreter

# isort: split
from benchmarks.gpu import decode
from benchmarks.gpu.decode_arguments import list_setups
from benchmarks.gpu.decode_cases import Outputs
from benchmarks.gpu.decode_report import complete, judge
from benchmarks.gpu.routing_trace import RoutingTrace
from benchmarks.gpu.routings import TableRouting, TableShape, guess_scores, new_table, trace_table, zipf_table

CPU = torch.device("cpu")
SHAPE = TableShape(layers=2, steps=64, rows=8, top_k=4, num_experts=16)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5, 4.0])
def test_no_row_draws_an_expert_twice(exponent: float) -> None:
    ordered = zipf_table(exponent, SHAPE, 0, CPU).sort(dim=-1).values
    assert ordered.min() >= 0 and ordered.max() < SHAPE.num_experts
    assert (ordered[..., 1:] > ordered[..., :-1]).all()


def test_first_draws_follow_the_zipf_distribution_in_an_order_of_each_layers_own() -> None:
    shape = TableShape(layers=2, steps=1000, rows=8, top_k=4, num_experts=16)
    first = zipf_table(1.0, shape, 0, CPU)[..., 0].flatten(1)  # [layers, draws]
    weights = 1 / torch.arange(1, 17)
    for layer in first:
        shares = torch.bincount(layer, minlength=16).sort(descending=True).values / len(layer)
        torch.testing.assert_close(shares, weights / weights.sum(), atol=0.02, rtol=0)
    assert first[0].mode().values != first[1].mode().values


def test_uniform_routing_uses_every_expert_equally() -> None:
    table = new_table("uniform", TableShape(1, 1000, 8, 4, 16), 0, CPU)
    assert table is not None
    shares = torch.bincount(table.ids.flatten(), minlength=16) / table.ids.numel()
    torch.testing.assert_close(shares, torch.full((16,), 1 / 16), atol=0.005, rtol=0)


def test_draws_depend_on_the_seed_alone() -> None:
    assert torch.equal(zipf_table(1.0, SHAPE, 3, CPU), zipf_table(1.0, SHAPE, 3, CPU))
    assert not torch.equal(zipf_table(1.0, SHAPE, 3, CPU), zipf_table(1.0, SHAPE, 4, CPU))


def test_natural_routing_has_no_table_and_unknown_ones_are_refused() -> None:
    assert new_table("natural", SHAPE, 0, CPU) is None
    with pytest.raises(ValueError, match="'normal'"):
        new_table("normal", SHAPE, 0, CPU)


def test_passes_take_the_tables_steps_in_turn_from_wherever_they_restart() -> None:
    step, table = torch.tensor([7]), new_table("uniform", SHAPE, 0, CPU, foresight=0.5)
    assert table is not None and table.scores is not None
    routing, weights = TableRouting(SHAPE, step, foresees=True), torch.rand(2, 4)
    for _ in range(2):
        routing.load(table)
        for expected in range(SHAPE.steps + 2):
            step += 1
            for layer in range(SHAPE.layers):
                ids, kept = routing.reroute(layer, torch.zeros(2, 4, dtype=torch.int32), weights)
                assert torch.equal(ids, table.ids[layer, expected % SHAPE.steps, :2]) and kept is weights
                assert routing.foresee is not None
                assert torch.equal(routing.foresee(layer), table.scores[layer, expected % SHAPE.steps, :2])


@pytest.mark.parametrize("foresight", [0.0, 0.7, 1.0])
def test_a_guess_names_as_many_experts_as_a_row_uses_and_the_asked_share_of_them(foresight: float) -> None:
    ids = zipf_table(1.0, SHAPE, 0, CPU)
    scores = guess_scores(ids, 16, foresight, seed=0)
    assert (scores.count_nonzero(-1) == SHAPE.top_k).all()
    named = scores.gather(-1, ids.long()) > 0
    assert named.float().mean().item() == pytest.approx(foresight, abs=0.05)


def test_rows_replay_stretches_of_a_trace() -> None:
    ids = np.arange(2 * 32 * 4).reshape(2, 32, 4).astype(np.uint8)
    table = trace_table(RoutingTrace(ids, 16), TableShape(2, 5, 4, 4, 16))
    assert torch.equal(table[1, :, 2], torch.from_numpy(ids[1, 16:21].astype(np.int32)))
    with pytest.raises(ValueError, match="the model"):
        trace_table(RoutingTrace(ids, 32), SHAPE)


def test_differences_are_found_where_they_begin() -> None:
    logits = torch.tensor([[1.0, 2.0]])
    expected = Outputs([[1, 2], [3, 4], [5, 6]], {2: logits})
    row: dict[str, object] = {}
    judge(row, Outputs([[1, 2], [3, 4]], {2: logits.clone(), 4: logits}), expected)
    assert row["identical"] and row["compared_steps"] == 2 and row["compared_logits_at"] == [2]
    judge(row, Outputs([[1, 2], [3, 5]]), expected)
    assert row["first_difference"] == {"step": 1, "row": 1, "token": 5, "expected": 4}
    judge(row, Outputs([[1, 2]], {2: logits.nextafter(torch.tensor(9.0))}), expected)
    assert not row["identical"]


def test_ratios_are_to_the_larger_limit() -> None:
    case = {"what": "decode", "batch": 1, "routing": "uniform"}
    rows = [
        {**case, "share": 0.25, "step_ms": 12.0, "link_ms": 10.0},
        {**case, "share": 0.5, "step_ms": 6.0, "link_ms": 1.0},
        {**case, "share": 1.0, "step_ms": 4.0, "link_ms": 0.0},
    ]
    complete(rows)
    assert [row["ratio"] for row in rows] == [1.2, 1.5, 1.0]


def test_the_quarter_comes_first_then_the_most_slots_and_all_resident_once() -> None:
    arguments = Namespace(slots=["8", "50%", "12.5%", "25%", "100%", "200"], eviction=["lfu", "lru"])
    layout = Namespace(slab_bytes=1)
    host: Any = Namespace(num_layers=2, num_experts=128, top_k=8, layout=layout)
    setups, impossible = list_setups(arguments, host)
    order = ["25%", "100%", "50%", "12.5%", "8"]
    assert [setup.slots for setup in setups] == [*order, *(slots for slots in order if slots != "100%")]
    assert [setup.eviction for setup in setups] == ["lfu"] * 5 + ["lru"] * 4
    assert [row["slots"] for row in impossible] == ["200"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu  # in Triton's interpreter it takes as long as a hundred other tests
def test_every_number_of_slots_computes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "results.json", tmp_path / "results.png"
    sizes = "--device cuda --tiny --layers 2 --prompt-tokens 2 --prefill-tokens 6 --prefill-runs 1"
    effort = "--warmup 2 --steps 1 --runs 1 --slots 12.5% 50% 100% --batch 1 --routing zipf1.0"
    ahead = "--prefetch on --foresight 0.7"
    command = f"{sizes} {effort} {ahead} --out {out} --plot {picture}"
    decode.main(command.split())
    record = json.loads(out.read_text())
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["exact"] and summary["exact"] and picture.stat().st_size > 0
    rows = [row for row in record["results"] if row["what"] == "decode"]
    cases = [(row["slots"], row["routing"], row["prefetch"]) for row in rows]
    assert cases == [("100%", "zipf1.0", "off"), ("50%", "zipf1.0", "on")]
    assert all((row["fetched_per_step"] > 0) == (row["slots"] == "50%") and row["ratio"] > 0 for row in rows)
    assert all((row["prefetched_per_step"] > 0) == (row["prefetch"] == "on") for row in rows)
    assert all(row["finite"] and row["compared_steps"] >= 4 for row in rows[1:])
    [_, prefill] = [row for row in record["results"] if row["what"] == "prefill"]
    assert prefill["identical"] and prefill["fetched_per_step"] > 0
    assert "12.5%" in [row["slots"] for row in record["results"] if row["what"] == "skipped"]


def test_stops_at_the_time_limit_with_what_there_is(tmp_path: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = ["--device", device, "--tiny", "--layers", "1", "--slots", "25%", "--time-limit-s", "0"]
    decode.main([*command, "--out", str(tmp_path / "results.json")])
    [row] = json.loads((tmp_path / "results.json").read_text())["results"]
    assert row["what"] == "skipped" and "no time" in row["reason"]
