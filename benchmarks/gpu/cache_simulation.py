"""Which eviction order of experts, computable from what decoding sees anyway, needs the fewest fetches?

Decodes a routing trace (`benchmarks.gpu.routing_trace`) against caches with a share of the experts per layer, on demand,
and counts needed experts that are resident. Every order is a score per step, layer and expert; whoever scores least
leaves, never an expert that the step needs. The first half of the trace warms the caches, chooses half-lives, fits
what is fitted and shares out unequal slots; the second half is counted. Not measured: time, prefetching, prefill.

    python -m benchmarks.gpu.cache_simulation [--trace trace.npz] [--shares 0.125 0.25 0.5] [--batch 1]
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.conditions import conditions
from benchmarks.gpu.routing_trace import RoutingTrace

Used = npt.NDArray[np.bool_]  # [steps, layers, experts]
Scores = npt.NDArray[np.float32]  # [steps, layers, experts], known once the step's routers have spoken
Counts = npt.NDArray[np.int64]

HALF_LIVES = (2, 4, 8, 16, 32, 64, 128)  # decode steps
FIT_HALF_LIVES = (2, 8, 32, 128)
NUM_SIZES = 16  # slot counts per layer that unequal sharing chooses from


def last_use(used: Used) -> Scores:
    """Least recently used first; of those used in the same step, the lowest id."""
    steps = np.arange(1, len(used) + 1)[:, None, None]
    return np.maximum.accumulate(np.where(used, steps, 0)).astype(np.float32)


def frequency(used: Used) -> Scores:
    return used.cumsum(0).astype(np.float32)


def next_use(used: Used) -> Scores:
    """Belady's MIN: whoever is needed last leaves. Reads the future: the limit of every order."""
    steps = len(used)
    following = np.full(used.shape, 2 * steps)
    for step in range(steps - 2, -1, -1):
        following[step] = np.where(used[step + 1], step + 1, following[step + 1])
    return -following.astype(np.float32)


def decayed(values: npt.NDArray[Any], half_life: float) -> Scores:
    """Exponential moving average over the steps, this step included."""
    keep = 0.5 ** (1 / half_life)
    average = np.zeros(values.shape[1:], np.float32)
    averages = np.empty(values.shape, np.float32)
    for step, value in enumerate(values):
        average = keep * average + (1 - keep) * value
        averages[step] = average
    return averages


def only_largest(probabilities: Scores, count: int) -> Scores:
    """Zero outside the `count` largest of each step and layer."""
    threshold = np.partition(probabilities, -count, axis=-1)[..., -count, None]
    largest: Scores = np.where(probabilities >= threshold, probabilities, 0)
    return largest


def recency_and_average(used: Used, probabilities: Scores, half_life: float) -> Scores:
    """A token's age halves its worth in 8 steps; the average probability counts as much."""
    age = np.arange(1, len(used) + 1)[:, None, None] - last_use(used)
    recency: Scores = (0.5 ** (age / 8)).astype(np.float32) / used.shape[-1]
    return recency + decayed(probabilities, half_life)


def fitted(used: Used, probabilities: Scores) -> Scores:
    """Least squares, per layer on the first half, of discounted future uses on averages of several half-lives."""
    averages = [decayed(values, each) for values in (used, probabilities) for each in FIT_HALF_LIVES]
    age = np.arange(1, len(used) + 1)[:, None, None] - last_use(used)
    ones = np.ones_like(probabilities)
    features = np.stack(
        [probabilities, *averages, np.log1p(age), ones], -1
    )  # [steps, layers, experts, features]
    future = np.zeros_like(ones)
    future[:-1] = decayed(used[:0:-1], 16)[::-1]
    half = len(used) // 2
    scores = np.empty_like(ones)
    for layer in range(used.shape[1]):
        known = features[:half, layer].reshape(-1, features.shape[-1])
        weights = np.linalg.lstsq(known, future[:half, layer].ravel(), rcond=None)[0]
        scores[:, layer] = features[:, layer] @ weights
    return scores


@dataclass(frozen=True)
class Order:
    """An eviction order: one variant (half-life) of a policy."""

    policy: str
    half_life: int | None
    score: Callable[[], Scores]

    @property
    def name(self) -> str:
        return self.policy if self.half_life is None else f"{self.policy}, half-life {self.half_life}"


def orders(used: Used, probabilities: Scores | None, top_k: int) -> Iterator[Order]:
    random = np.random.default_rng(0)
    yield Order("random", None, lambda: random.random(used.shape, np.float32))
    yield Order("LRU", None, lambda: last_use(used))
    yield Order("LFU", None, lambda: frequency(used))
    for each in HALF_LIVES:
        yield Order("decayed LFU", each, lambda each=each: decayed(used, each))  # type: ignore[misc]
    if probabilities is not None:
        yield from _probability_orders(used, probabilities, top_k)
    yield Order("Belady", None, lambda: next_use(used))


def _probability_orders(used: Used, probabilities: Scores, top_k: int) -> Iterator[Order]:
    for each in HALF_LIVES:
        yield Order("router probability", each, lambda each=each: decayed(probabilities, each))  # type: ignore[misc]
    # HybriMoE, arXiv 2504.05897, section on minus-recent-score caching: scores beyond twice the top k do not count.
    largest = only_largest(probabilities, 2 * top_k)
    for each in HALF_LIVES:
        yield Order("minus recent score", each, lambda each=each: decayed(largest, each))  # type: ignore[misc]
    for each in HALF_LIVES:
        yield Order(
            "recency + probability",
            each,
            lambda each=each: recency_and_average(used, probabilities, each),  # type: ignore[misc]
        )
    yield Order("fitted", None, lambda: fitted(used, probabilities))


def simulate(used: Used, scores: Scores, slots: Counts) -> Counts:
    """Decode with caches that start empty. A step that needs more experts than there are slots keeps the best scored.

    Args:
        slots: [caches, layers], slots per layer of each cache; all caches are simulated at once.
    Returns:
        [steps, caches, layers]: needed experts that were resident.
    """
    steps, _, num_experts = used.shape
    keys = np.empty(used.shape, np.int16)  # ranks from 1, unique; those of needed experts above all others
    ranks = np.arange(1, num_experts + 1, dtype=np.int16)[None, None]
    np.put_along_axis(keys, scores.argsort(-1, kind="stable"), ranks, axis=-1)
    keys += num_experts * used.astype(np.int16)
    first_kept = (num_experts - slots)[..., None]
    resident = np.zeros((*slots.shape, num_experts), np.bool_)  # [caches, layers, experts]
    hits = np.empty((steps, *slots.shape), np.int64)
    for step in range(steps):
        hits[step] = (resident & used[step]).sum(-1)
        candidates = np.where(resident | used[step], keys[step], 0)
        threshold = np.take_along_axis(np.sort(candidates, axis=-1), first_kept, axis=-1)
        resident = candidates >= np.maximum(threshold, 1)
    return hits


def share_out(misses: npt.NDArray[Any], sizes: Counts, total_slots: int) -> Counts:
    """[layers]: slots of each layer, greedily where a slot saves the most misses.

    Args:
        misses: [sizes, layers]. sizes: [sizes] ascending, the slot counts a layer may have; all get the first at least.
    """
    chosen = np.zeros(misses.shape[1], np.int64)  # index of each layer's size
    left = total_slots - sizes[0] * len(chosen)
    while True:
        best, gain = None, 0.0
        for layer, now in enumerate(chosen):
            for index in range(now + 1, len(sizes)):
                cost = sizes[index] - sizes[now]
                saved = (
                    misses[now, layer] - misses[index, layer]
                ) / cost  # per slot; curves need not be convex
                if cost <= left and saved > gain:
                    best, gain = (layer, index, cost), saved
        if best is None:
            return sizes[chosen]
        layer, chosen[best[0]], cost = best
        left -= cost


class Simulation:
    """All orders on one trace, with equal and unequal slots."""

    def __init__(self, trace: RoutingTrace, shares: list[float], tokens: int, batch: int = 1) -> None:
        """
        Args:
            tokens: of the trace to use at most; fewer when it holds probabilities of fewer.
            batch: that many stretches of the trace are decoded at once, one token of each per step.
        """
        probabilities = trace.probabilities
        tokens = min(tokens, trace.ids.shape[1] if probabilities is None else probabilities.shape[1])
        used = trace.used()[: tokens // batch * batch]
        self.used: Used = np.logical_or.reduce(used.reshape(batch, -1, *used.shape[1:]))
        self.probabilities = None
        if probabilities is not None:
            by_step = probabilities.transpose(1, 0, 2)[: len(used)].astype(np.float32)
            self.probabilities = by_step.reshape(batch, -1, *used.shape[1:]).mean(0)
        self.top_k, self.half = trace.ids.shape[-1], len(self.used) // 2
        num_layers, num_experts = used.shape[1:]
        self.slots = np.array([max(self.top_k, round(share * num_experts)) for share in shares])
        self.equal = np.tile(self.slots[:, None], num_layers)  # [shares, layers]
        smallest, step = self.top_k, max(1, num_experts // NUM_SIZES)
        self.sizes = np.unique(np.append(np.arange(smallest, num_experts + 1, step), self.slots))

    def run(self) -> list[dict[str, Any]]:
        """One row per order: hit rates of the second half per share; unequal ones where its half-life was best."""
        rows = []
        best: dict[
            tuple[str, int], tuple[int, dict[str, Any], Order]
        ] = {}  # (hits of the first half, row, order)
        for order in orders(self.used, self.probabilities, self.top_k):
            hits = simulate(self.used, order.score(), self.equal).sum(2)  # [steps, shares]
            row: dict[str, Any] = {
                "order": order.name,
                "equal": (hits[self.half :].sum(0) / self._needed()).round(4).tolist(),
                "unequal": [None] * len(self.slots),
            }
            rows.append(row)
            for index, first_half in enumerate(hits[: self.half].sum(0).tolist()):
                if (order.policy, index) not in best or first_half > best[order.policy, index][0]:
                    best[order.policy, index] = (first_half, row, order)
        chosen = defaultdict(list)  # name of the order -> shares at which it is the best of its policy
        for (_, index), (_, row, order) in best.items():
            chosen[order.name].append((index, row, order))
        for group in chosen.values():
            indices = [index for index, _, _ in group]
            rates = self._unequal(group[0][2].score(), indices)
            for (index, row, _), rate in zip(group, rates, strict=True):
                row["unequal"][index] = rate
        return rows

    def _needed(self) -> int:
        return int(self.used[self.half :].sum())

    def _unequal(self, scores: Scores, indices: list[int]) -> list[float]:
        """Hit rates at these shares with slots that the first half shared out over the layers."""
        past, every_size = slice(self.half), np.tile(self.sizes[:, None], self.used.shape[1])
        hits = simulate(self.used[past], scores[past], every_size).sum(0)  # [sizes, layers]
        slots = [share_out(-hits, self.sizes, int(self.equal[index].sum())) for index in indices]
        counted = simulate(self.used, scores, np.array(slots))[self.half :].sum((0, 2))  # [shares]
        rates: list[float] = (counted / self._needed()).round(4).tolist()
        return rates


def print_table(rows: list[dict[str, Any]], shares: list[float], slots: Counts) -> None:
    heads = [f"{share:.1%} = {count}" for share, count in zip(shares, slots, strict=True)]
    print(f"{'hit rate, equal | unequal slots':<36}" + "".join(f"{head:>18}" for head in heads))
    for row in rows:
        cells = [
            f"{equal:.3f} | {'-' if unequal is None else f'{unequal:.3f}':>5}"
            for equal, unequal in zip(row["equal"], row["unequal"], strict=True)
        ]
        print(f"{row['order']:<36}" + "".join(f"{cell:>18}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded at once")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    started, trace = time.perf_counter(), RoutingTrace.load(arguments.trace)
    simulation = Simulation(trace, arguments.shares, arguments.tokens, arguments.batch)
    rows = simulation.run()
    print_table(rows, arguments.shares, simulation.slots)
    record = {
        "benchmark": "cache_simulation",
        "layers_steps_experts": [simulation.used.shape[axis] for axis in (1, 0, 2)],
        "top_k": simulation.top_k,
        "usage_entropy": trace.usage_entropy().round(3).tolist(),
        "step_overlap": trace.step_overlap().round(3).tolist(),
        "results": rows,
        "seconds": round(time.perf_counter() - started, 1),
        "conditions": conditions(**vars(arguments)),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
