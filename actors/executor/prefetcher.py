"""Copies predicted experts into slots ahead of the passes that will need them, layer by layer.

A prediction only moves experts earlier: whatever is late, wrong or lost, the pager fetches on demand.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from actors.executor.pager import Pager
from actors.executor.passes import PassClock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrefetchPlan:
    """The experts one coming pass is predicted to use."""

    pass_number: int
    # Of the first layers, or all: most wanted first, at most as many as there are slots.
    experts_by_layer: Sequence[Sequence[int]]
    on_copied: Callable[[int], None]  # called with the bytes of each copy, on the prefetcher's thread


def plan_prefetch(
    expert_ids: NDArray[np.uint16],
    num_experts: int,
    num_slots: int,
    pass_number: int,
    on_copied: Callable[[int], None],
) -> PrefetchPlan:
    """Args: expert_ids: [layers, tokens, k], the hash table's rows of the pass's tokens."""
    by_layer = [_most_wanted(ids.reshape(-1), num_experts)[:num_slots] for ids in expert_ids]
    return PrefetchPlan(pass_number, by_layer, on_copied)


def _most_wanted(ids: NDArray[np.uint16], num_experts: int) -> list[int]:
    counts = np.bincount(ids, minlength=num_experts)
    order = np.argsort(-counts, kind="stable")
    return [int(expert_id) for expert_id in order if counts[expert_id]]


class Prefetcher(Protocol):
    """Works plans off; what comes too late for a layer is skipped."""

    def start(self) -> None: ...

    def submit(self, plan: PrefetchPlan) -> None:
        """May be called from any thread, and while the plan's pass runs."""

    def after_layer(self, layer: int) -> None:
        """The running pass has finished a layer, or begins (-1). On the pass' thread."""

    def stop(self) -> None:
        """Twice is fine."""


class QueueingPrefetcher:
    """For pagers whose copies are queued behind each other: the pass' thread queues them, a layer ahead.

    Args:
        for_next_pass: copy for the pass after the running one too, once that is through with a layer.
    """

    def __init__(self, pager: Pager, clock: PassClock, for_next_pass: bool = False) -> None:
        self._pager, self._clock, self._for_next_pass = pager, clock, for_next_pass
        self._plans: dict[int, list[PrefetchPlan]] = {}  # by pass number, one per prompt chunk
        self._lock = threading.Lock()

    def start(self) -> None:
        pass

    def submit(self, plan: PrefetchPlan) -> None:
        with self._lock:
            plans = self._plans.setdefault(plan.pass_number, [])
            # A pass is planned while the one before runs, and again when it begins.
            if all(plan.experts_by_layer != known.experts_by_layer for known in plans):
                plans.append(plan)

    def after_layer(self, layer: int) -> None:
        running = self._clock.passes_begun - 1
        with self._lock:
            self._plans = {number: plans for number, plans in self._plans.items() if number >= running}
            plans = list(self._plans.get(running, ()))
            following = list(self._plans.get(running + 1, ())) if self._for_next_pass else []
        if plans and layer + 1 < self._clock.num_predicted_layers:
            self._prefetch(layer + 1, plans)
        if following and 0 <= layer < self._clock.num_predicted_layers:
            self._prefetch_ahead(layer, following)

    def _prefetch_ahead(self, layer: int, following: Sequence[PrefetchPlan]) -> None:
        """Args: following: plans of the next pass."""
        self._prefetch(layer, following)

    def _prefetch(self, layer: int, plans: Sequence[PrefetchPlan]) -> None:
        for plan in plans:
            expert_ids = plan.experts_by_layer[layer]
            for expert_id in expert_ids:
                if self._pager.prefetch(layer, expert_id, expert_ids):
                    plan.on_copied(self._pager.source.layout.slab_bytes)

    def stop(self) -> None:
        self._plans.clear()


class ThreadedPrefetcher:
    """For pagers whose copies block: a thread of its own works plans off in the order they were submitted."""

    def __init__(self, pager: Pager, clock: PassClock) -> None:
        self._pager, self._clock = pager, clock
        self._plans: queue.SimpleQueue[PrefetchPlan | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, plan: PrefetchPlan) -> None:
        self._plans.put(plan)

    def after_layer(self, layer: int) -> None:
        pass  # the clock tells

    def stop(self) -> None:
        self._stopped.set()
        self._clock.wake()
        self._plans.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while (plan := self._plans.get()) is not None and not self._stopped.is_set():
            try:
                for layer, expert_ids in enumerate(plan.experts_by_layer):
                    self._prefetch_layer(plan, layer, expert_ids)
            except Exception:  # whatever went wrong, the pass meets it again on demand, where it is answered
                logger.warning("A prefetch was given up, its experts are fetched on demand", exc_info=True)

    def _prefetch_layer(self, plan: PrefetchPlan, layer: int, expert_ids: Sequence[int]) -> None:
        if not self._clock.wait_for_turn(plan.pass_number, layer, self._stopped):
            return
        keep = frozenset(expert_ids)
        for expert_id in expert_ids:
            if self._clock.is_over(plan.pass_number, layer):
                return
            if self._pager.prefetch(layer, expert_id, keep):
                plan.on_copied(self._pager.source.layout.slab_bytes)
