"""Figures and checks of closed loops of requests, on answers whose times and texts are known."""

import pytest

from benchmarks.gpu.closed_loop import (
    Answer,
    expert_usage,
    figures,
    percentiles_ms,
    plan_streams,
    share,
    share_out,
    token_checks,
)
from benchmarks.gpu.serving import shares


def answer(
    prompt: int = 0, start: float = 0.0, text: str = "abc", tokens: int = 3, gap: float = 0.5
) -> Answer:
    arrivals = [start + 1.0 + gap * index for index in range(tokens)]
    return Answer(prompt, start, arrivals, text, completion_tokens=tokens)


def test_percentiles_lie_between_the_nearest_values() -> None:
    assert percentiles_ms([0.004, 0.001, 0.003, 0.002, 0.005]) == {"p50": 3.0, "p90": 4.6, "p99": 4.96}
    assert percentiles_ms([0.25]) == {"p50": 250.0, "p90": 250.0, "p99": 250.0}


def test_throughput_counts_from_the_first_request_to_the_last_token() -> None:
    row = figures([answer(start=0.0), answer(start=2.0)])
    assert row["seconds"] == 4.0 and row["tokens_per_s"] == 1.5
    assert row["ttft_ms"]["p50"] == 1000.0 and row["inter_token_ms"]["mean"] == 500.0


def test_a_piece_may_hold_several_tokens() -> None:
    of_two_each = answer(tokens=3, gap=1.0)
    of_two_each.completion_tokens = 6
    row = figures([of_two_each])
    assert row["tokens_per_s"] == 2.0 and row["tokens_per_piece"] == 2.0
    assert row["inter_token_ms"] == {"p50": 1000.0, "p90": 1000.0, "p99": 1000.0, "mean": 400.0}


def test_failed_requests_are_counted_and_not_timed() -> None:
    failed = Answer(0, 0.0, [100.0], error="APIError: no")
    assert figures([answer(), failed]) == {**figures([answer()]), "requests": 2, "failed": 1}
    assert figures([failed]) == {"requests": 1, "failed": 1}


def test_every_stream_sends_equally_many_requests_and_prompts_take_turns() -> None:
    plan = plan_streams(concurrency=4, num_requests=16, num_prompts=5)
    assert [len(stream) for stream in plan] == [4] * 4
    assert [stream[0] for stream in plan] == [0, 1, 2, 3] and plan[0][1] == 4
    assert plan_streams(32, 16, 8)[0] == [0, 0, 0], "three rounds at least"


def test_streams_are_dealt_to_no_more_processes_than_there_are() -> None:
    plan = plan_streams(3, 3, 3)
    assert share_out(plan, 2) == [[plan[0], plan[2]], [plan[1]]]
    assert share_out(plan, 8) == [[stream] for stream in plan]


def test_lost_tokens_and_different_texts_are_noticed() -> None:
    lost = answer(tokens=2)
    miscounted = answer(prompt=1)
    miscounted.completion_tokens = 4
    checks = token_checks([answer(), lost, miscounted, answer(text="acb")], new_tokens=3)
    assert checks["answers_with_lost_tokens"] == 2
    assert checks["prompts_repeated"] == 1 and checks["prompts_answered_differently"] == 1


def test_texts_are_held_against_those_from_elsewhere() -> None:
    answers = [answer(), answer(text="acb"), answer(prompt=7)]
    checks = token_checks(answers, 3, expected=[answer()])
    assert (checks["answers_compared"], checks["answers_unlike_expected"]) == (2, 1)


def test_expert_usage_is_summed() -> None:
    answers = [answer(), answer()]
    for each in answers:
        each.experts = {"needed": 10, "missed": 2, "moved_bytes": 5, "hit_rate": 0.8}
    assert expert_usage(answers) == {"needed": 20, "missed": 4, "moved_bytes": 10, "hit_rate": 0.8}
    assert expert_usage([answer()])["hit_rate"] is None


def test_shares_are_of_the_engines_speed() -> None:
    served, alone = figures([answer(gap=1.0)]), figures([answer(gap=0.5)])
    assert shares(served, alone) == {"share": pytest.approx(2 / 3, abs=1e-3), "decode_share": 0.5}
    assert shares({"requests": 1, "failed": 1}, alone) == {"share": 0.0, "decode_share": 0.0}
    assert share(9.0, 10.0) == 0.9
