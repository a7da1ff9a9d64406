"""A closed loop of requests: streams that each send the next request when the last is answered. Plans, answers, figures.

Plain data and arithmetic: whoever runs the requests, over HTTP or in the engine's own process, is compared by the same
figures.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Plan = list[list[int]]  # per stream, the prompts (by number) that it sends one after the other

PERCENTILES = (50, 90, 99)
ROUNDS = 3  # requests per stream at least, so that the loop is more than its start and its end


@dataclass
class Answer:
    """One request. Times are of one monotonic clock, which all processes of a host share."""

    prompt: int  # its number
    started_s: float
    arrivals_s: list[float] = field(default_factory=list)  # of every piece, which holds one token or more
    text: str = ""
    completion_tokens: int = 0  # as the server counts them
    experts: dict[str, float] = field(default_factory=dict)  # the usage that the server reports
    error: str | None = None


def plan_streams(concurrency: int, num_requests: int, num_prompts: int) -> Plan:
    """As many streams as `concurrency`, with equally many requests each; together at least `num_requests`."""
    rounds = max(ROUNDS, -(-num_requests // concurrency))
    numbers = iter(range(concurrency * rounds))
    by_round = [[next(numbers) % num_prompts for _ in range(concurrency)] for _ in range(rounds)]
    return [list(stream) for stream in zip(*by_round, strict=True)]


def share_out(plan: Plan, num_parts: int) -> list[Plan]:
    """The streams dealt to so many processes; none is left without one."""
    return [plan[part::num_parts] for part in range(min(num_parts, len(plan)))]


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Throughput over the whole loop, and latencies as clients see them."""
    answered = [answer for answer in answers if answer.error is None and answer.arrivals_s]
    row: dict[str, Any] = {"requests": len(answers), "failed": len(answers) - len(answered)}
    if not answered:
        return row
    seconds = max(a.arrivals_s[-1] for a in answered) - min(a.started_s for a in answered)
    num_tokens = sum(a.completion_tokens for a in answered)
    gaps = np.concatenate([np.diff(a.arrivals_s) for a in answered])
    per_token_s = float(gaps.sum()) / max(1, num_tokens - len(answered))
    return {
        **row,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(num_tokens / seconds, 2),
        "ttft_ms": percentiles_ms(a.arrivals_s[0] - a.started_s for a in answered),
        # Percentiles of the time between two pieces; the mean is of tokens.
        "inter_token_ms": {**percentiles_ms(gaps), "mean": round(1e3 * per_token_s, 3)},
        "tokens_per_piece": round(num_tokens / sum(len(a.arrivals_s) for a in answered), 2),
    }


def percentiles_ms(seconds: Iterable[float]) -> dict[str, float]:
    """Interpolated between the nearest two values."""
    values = 1e3 * np.percentile(np.fromiter(seconds, float), PERCENTILES)
    return {f"p{rank}": round(float(value), 3) for rank, value in zip(PERCENTILES, values, strict=True)}


def token_checks(
    answers: Sequence[Answer], new_tokens: int, expected: Sequence[Answer] = ()
) -> dict[str, Any]:
    """Whether every token arrived, once and in order: as many as asked for, and the same text.

    Args:
        expected: answers from elsewhere; where a prompt is among them, its text must be the same.
    """
    answered = [answer for answer in answers if answer.error is None]
    texts: dict[int, Counter[str]] = defaultdict(Counter)
    for answer in answered:
        texts[answer.prompt][answer.text] += 1
    known = {answer.prompt: answer.text for answer in expected if answer.error is None}
    compared = [answer for answer in answered if answer.prompt in known]
    return {
        "answers_with_lost_tokens": sum(a.completion_tokens != new_tokens for a in answered),
        "prompts_repeated": sum(counts.total() > 1 for counts in texts.values()),
        "prompts_answered_differently": sum(len(counts) > 1 for counts in texts.values()),
        "answers_compared": len(compared),
        "answers_unlike_expected": sum(a.text != known[a.prompt] for a in compared),
    }


def expert_usage(answers: Iterable[Answer]) -> dict[str, Any]:
    """What the server says the requests cost in experts, summed; and the share that was in a slot."""
    total: Counter[str] = Counter()
    for answer in answers:
        total.update({name: int(answer.experts.get(name, 0)) for name in ("needed", "missed", "moved_bytes")})
    hit_rate = round(1 - total["missed"] / total["needed"], 4) if total["needed"] else None
    return {**total, "hit_rate": hit_rate}


def share(part: float, whole: float) -> float:
    return round(part / whole, 4)
