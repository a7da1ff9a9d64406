"""One timed case each: decoding at a batch size and routing, or reading long prompts. Computes no limits."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from benchmarks.gpu.baselines import synchronize
from benchmarks.gpu.paged_model import Case, Counts, DecodeStream, PagedDecoding, Prompts
from benchmarks.gpu.routings import Table

Row = dict[str, Any]

# Warm-up steps after which logits are kept to be compared; a slow case stops warming up at one of them.
KEPT_AT = (2, 4, 8, 16)
WARM_SHARE = 0.5  # of a case's time at most
MIN_REPLAYS = 2
# Prefetching is reviewed twice a second: until it has settled, a case that prefetches goes on warming up.
SETTLING_S = 1.0
SETTLING_STEPS = 192


@dataclass(frozen=True)
class Plan:
    """Steps of a case that is fast enough to have them all."""

    warmup: int
    steps: int  # per run
    runs: int

    @property
    def most_steps(self) -> int:
        return self.warmup + SETTLING_STEPS + (self.runs + 1) * self.steps + 2 + MIN_REPLAYS


@dataclass
class Outputs:
    """What a case computed."""

    tokens: list[list[int | None]] = field(default_factory=list)  # [steps][rows]
    # By number of steps done, [rows, vocab] on the host.
    logits: dict[int, Tensor] = field(default_factory=dict)


def measure_decode(
    decoding: PagedDecoding, case: Case, table: Table | None, plan: Plan, limit_s: float
) -> tuple[Row, Outputs]:
    """Warm-up, runs back to back, then replays of the graph alone.

    Args:
        limit_s: a slow case warms up less and has shorter runs, of one step at least, to stay near it.
    """
    started = time.perf_counter()
    stream, before = decoding.restart(case, table), decoding.counts()
    logits, step_s = _warm_up(stream, plan, WARM_SHARE * limit_s)
    if case.prefetch and decoding.can_prefetch(case.batch):
        _settle(stream, min(SETTLING_S, WARM_SHARE * limit_s) - (time.perf_counter() - started), step_s)
    num_warm, warm = len(stream.tokens), decoding.counts()
    affordable = (limit_s - (time.perf_counter() - started)) / step_s / (plan.runs + 1)
    steps = min(plan.steps, max(1, int(affordable)))
    # Runs begin with the first result, and end while the last step is under way.
    num_timed = plan.runs * steps + 2
    stream.run(num_timed)
    stream.drain()
    row = {
        **_timed(stream.taken_at_s[num_warm:-1], steps, case.batch),
        "warmup_steps": num_warm,
        "refills_in_warmup": round(warm.since(before).fetched / decoding.num_slots_in_all, 2),
        **_counted(decoding.counts().since(warm), num_timed, decoding.host.num_layers),
        **_replayed(stream.replay_ms(max(MIN_REPLAYS, steps))),
    }
    return row, Outputs(stream.tokens, logits)


def measure_prefill(decoding: PagedDecoding, prompts: Prompts) -> tuple[Row, Outputs]:
    """Each prompt once; the first only warms up."""
    times, fetched = [], []
    for prompt in prompts:
        before, started = decoding.counts(), time.perf_counter()
        logits = decoding.read(prompt)
        synchronize(decoding.host.device)
        times.append(1e3 * (time.perf_counter() - started))
        fetched.append(decoding.counts().since(before).fetched)
    row = {
        "tokens": len(prompts[0]),
        **_spread("step_ms", times[1:]),
        "runs": len(times) - 1,
        "fetched_per_step": statistics.mean(fetched[1:]),
        "in_vain_per_step": 0.0,
    }
    return row, Outputs(logits={1: logits.cpu()})


def _warm_up(stream: DecodeStream, plan: Plan, limit_s: float) -> tuple[dict[int, Tensor], float]:
    """Returns: kept logits, and the seconds of a step."""
    started, logits = time.perf_counter(), {}
    for steps in _chunks(plan.warmup):
        chunk_started = time.perf_counter()
        stream.run(steps)
        stream.drain()
        step_s = (time.perf_counter() - chunk_started) / steps
        logits[len(stream.tokens)] = stream.logits()
        if time.perf_counter() - started > limit_s:
            break
    return logits, step_s


def _settle(stream: DecodeStream, seconds: float, step_s: float) -> None:
    stream.run(min(SETTLING_STEPS, max(0, int(seconds / step_s))))
    stream.drain()


def _chunks(warmup: int) -> Iterator[int]:
    ends = [*(at for at in KEPT_AT if at < warmup), warmup]
    return (end - start for start, end in pairwise([0, *ends]))


def _timed(taken_at_s: list[float], steps: int, batch: int) -> Row:
    """Runs between every `steps`-th result and the next."""
    ends = taken_at_s[::steps]
    run_ms = [1e3 * (end - start) / steps for start, end in pairwise(ends)]
    return {
        **_spread("step_ms", run_ms),
        "runs": len(run_ms),
        "steps_per_run": steps,
        "tokens_per_s": round(1e3 * batch / statistics.median(run_ms), 1),
    }


def _counted(counts: Counts, steps: int, num_layers: int) -> Row:
    needed = counts.hits + counts.misses
    return {
        "distinct_experts": round(needed / steps / num_layers, 2),  # per layer
        "hit_rate": round(counts.hits / needed, 4),
        "misses_per_step": round(counts.misses / steps, 2),
        "fetched_per_step": round(counts.fetched / steps, 2),
        "in_vain_per_step": round(counts.fetched_in_vain / steps, 2),
        "prefetched_per_step": round(counts.prefetched / steps, 2),
        "evictions_per_step": round(counts.evictions / steps, 2),
    }


def _replayed(replay_ms: list[float]) -> Row:
    return _spread("device_ms", replay_ms) if replay_ms else {"device_ms": None}


def _spread(name: str, times_ms: list[float]) -> Row:
    low, high = min(times_ms), max(times_ms)
    return {name: round(statistics.median(times_ms), 3), f"{name}_min_max": [round(low, 3), round(high, 3)]}
