"""Gatings: equal outputs where nothing is dropped, drops as in a queue served in order, and memory to the byte."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gating import __main__ as command
from benchmarks.gating.activation_memory import StorageTracker, peak_bytes
from benchmarks.gating.cases import Gating, gatings, reason_to_skip, touched_bytes
from benchmarks.gating.layers import (
    Experts,
    Routing,
    Shape,
    capacity_of,
    draw_routing,
    dropped_share,
    dynamic,
    make_experts,
    positions,
    static_by_indices,
    static_by_masks,
)

CPU = torch.device("cpu")
NUM_EXPERTS, NUM_TOKENS = 8, 40
TINY = {
    "gated, top 2": Shape("tiny", hidden=32, intermediate=48, top_k=2, gated=True),
    "plain, top 1": Shape("tiny", hidden=32, intermediate=48, top_k=1, gated=False),
}


def layer(
    shape: Shape, num_tokens: int = NUM_TOKENS, num_experts: int = NUM_EXPERTS
) -> tuple[Experts, Tensor, Routing]:
    experts = make_experts(shape, num_experts, CPU, torch.float32, seed=0)
    hidden = torch.randn(num_tokens, shape.hidden, generator=torch.Generator().manual_seed(1))
    return experts, hidden, draw_routing(shape, num_experts, num_tokens, 1.0, hidden, seed=2)


def one_by_one(experts: Experts, hidden: Tensor, routing: Routing, capacity: int) -> tuple[Tensor, int]:
    """First choices of all tokens, then second ones; each goes to its expert as long as that has room."""
    output, room, dropped = torch.zeros_like(hidden), [capacity] * experts.num_experts, 0
    for choice in range(routing.topk_ids.shape[1]):
        for token, vector in enumerate(hidden):
            expert = int(routing.topk_ids[token, choice])
            if room[expert] == 0:
                dropped += 1
                continue
            room[expert] -= 1
            if experts.has_gate:
                gate, up = (experts.gate_up_proj[expert] @ vector).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
            else:
                inner = (experts.up_proj[expert] @ vector).relu()
            output[token] += routing.topk_weights[token, choice] * (experts.down_proj[expert] @ inner)
    return output, dropped


@pytest.mark.parametrize("shape", TINY.values(), ids=TINY)
def test_all_gatings_are_equal_where_nothing_is_dropped(shape: Shape) -> None:
    experts, hidden, routing = layer(shape)
    expected, dropped = one_by_one(experts, hidden, routing, NUM_TOKENS)
    assert dropped == 0
    torch.testing.assert_close(dynamic(experts, hidden, routing), expected)
    torch.testing.assert_close(static_by_masks(experts, hidden, routing, NUM_TOKENS), expected)
    torch.testing.assert_close(static_by_indices(experts, hidden, routing, NUM_TOKENS), expected)
    fullest = int(routing.topk_ids.reshape(-1).bincount().max())  # the smallest capacity that drops nothing
    torch.testing.assert_close(static_by_masks(experts, hidden, routing, fullest), expected)
    assert dropped_share(routing, NUM_EXPERTS, fullest) == 0
    assert dropped_share(routing, NUM_EXPERTS, fullest - 1) > 0


@pytest.mark.parametrize("shape", TINY.values(), ids=TINY)
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_static_gatings_drop_what_comes_after_an_expert_is_full(shape: Shape, factor: float) -> None:
    experts, hidden, routing = layer(shape)
    capacity = capacity_of(NUM_TOKENS, shape.top_k, NUM_EXPERTS, factor)
    expected, dropped = one_by_one(experts, hidden, routing, capacity)
    assert dropped > 0
    assert dropped_share(routing, NUM_EXPERTS, capacity) == pytest.approx(dropped / routing.topk_ids.numel())
    torch.testing.assert_close(static_by_masks(experts, hidden, routing, capacity), expected)
    torch.testing.assert_close(static_by_indices(experts, hidden, routing, capacity), expected)
    assert not torch.allclose(dynamic(experts, hidden, routing), expected)


def test_positions_count_first_choices_before_second_ones() -> None:
    ids = torch.tensor([[0, 1], [1, 0], [0, 2]])
    assert positions(ids, 3).tolist() == [[0, 1], [0, 2], [1, 0]]


def test_capacity_is_the_even_share_times_the_factor_and_never_more_than_all_tokens() -> None:
    assert [capacity_of(1024, 1, 64, factor) for factor in (1.0, 1.25, 2.0, None)] == [16, 20, 32, 1024]
    assert capacity_of(1024, 4, 32, 1.0) == 128
    assert capacity_of(8, 1, 64, 1.0) == 1
    assert capacity_of(100, 4, 2, 2.0) == 100


def test_routing_has_distinct_experts_and_the_skew_that_was_asked_for() -> None:
    shape, hidden = TINY["gated, top 2"], torch.zeros(4000, 1)
    uniform, skewed = (draw_routing(shape, 16, 4000, zipf, hidden, seed=0) for zipf in (0.0, 1.0))
    for routing in (uniform, skewed):
        assert (routing.topk_ids[:, 0] != routing.topk_ids[:, 1]).all()
        torch.testing.assert_close(routing.topk_weights.sum(1), torch.ones(4000))
    shares = uniform.topk_ids.reshape(-1).bincount(minlength=16) / 8000
    assert shares.max() < 1.1 / 16
    first = skewed.topk_ids[:, 0].bincount(minlength=16).sort(descending=True).values / 4000
    harmonic = sum(1 / rank for rank in range(1, 17))
    assert first[0] == pytest.approx(1 / harmonic, rel=0.1)
    assert first[1] == pytest.approx(1 / 2 / harmonic, rel=0.15)


def test_the_tracker_follows_storages_from_their_operator_to_their_end() -> None:
    given = torch.ones(1000)

    def call() -> Tensor:
        first = given + 1  # 4000 bytes live
        second = first * 2  # 8000
        del first  # 4000
        view = second.view(10, 100).t()
        third = torch.cat([second, second, second])  # 16000, the peak
        del second, view  # 12000
        third.add_(1)
        return third[:10]  # keeps 12000

    assert peak_bytes(call, CPU) == 16000
    with StorageTracker() as tracker:
        kept = call()
        assert (tracker.live_bytes, tracker.peak_bytes) == (12000, 16000)
        del kept
        assert tracker.live_bytes == 0


@pytest.mark.parametrize("shape", TINY.values(), ids=TINY)
def test_calculated_peaks_are_the_tracked_ones_but_for_small_tensors(shape: Shape) -> None:
    experts, hidden, routing = layer(shape, num_tokens=96)
    for gating in gatings(shape, experts, hidden, routing):
        if gating.kind == "dense":
            continue  # gathers nothing where a token has one expert
        tracked = peak_bytes(gating.run, CPU)
        # index tensors, the gathered rows of a grouped GEMM and the sums over choices
        small = 96 * shape.top_k * (4 * shape.hidden + 8 * NUM_EXPERTS + 64)
        assert 0 <= tracked - gating.peak_bytes <= small, gating.name


def test_masks_hold_more_than_indices_and_both_more_than_dynamic_gating() -> None:
    shape = TINY["plain, top 1"]
    experts, hidden, routing = layer(shape, num_tokens=96)
    peaks = {gating.name: peak_bytes(gating.run, CPU) for gating in gatings(shape, experts, hidden, routing)}
    assert peaks["masks, no drops"] > peaks["indices, no drops"] > 5 * peaks["dynamic"]


def test_says_what_is_too_large() -> None:
    gating = Gating("masks", None, 1, gflop=50.0, peak_bytes=3 * 10**9, run=lambda: torch.zeros(1))
    assert reason_to_skip(gating, limit_gflop=50.0, limit_bytes=3 * 10**9) is None
    assert reason_to_skip(gating, 49.0, 3 * 10**9) == "50 GFLOP, more than --limit-gflop"
    assert reason_to_skip(gating, 50.0, 2 * 10**9) == "needs 3.0 GB of activations, 2.0 GB are free"


def test_only_experts_that_got_tokens_must_be_read() -> None:
    experts, _, _ = layer(TINY["plain, top 1"])
    routing = Routing(torch.tensor([[3], [5], [3]]), torch.ones(3, 1))
    assert touched_bytes(experts, routing) == 2 * (2 * 32 * 48) * 4


def test_the_command_writes_figures_and_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # other tests keep theirs
    monkeypatch.setattr(command, "measured_bandwidths", lambda _: {"device_copy": 10.0})
    sizes = ["--shape", "reference", "--tokens", "8", "32", "--runs", "2", "--limit-gflop", "0.12"]
    outputs = ["--out", str(tmp_path / "out.json"), "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", ["gating", "--device", "cpu", *sizes, *outputs])
    command.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "out.json").read_text())
    rows = record["results"]
    assert len(rows) == 2 * 2 * 10
    assert {row["gating"] for row in rows if "skipped" in row} == {"masks, no drops"}
    measured = [row for row in rows if "skipped" not in row]
    assert all(row["ms_min_max"][0] <= row["ms"] <= row["ms_min_max"][1] for row in measured)
    assert all(row["peak_mb"] > 0 and row["floor_ms"] > 0 and row["tokens_per_s"] > 0 for row in measured)
    assert (tmp_path / "plot.png").stat().st_size > 1000
