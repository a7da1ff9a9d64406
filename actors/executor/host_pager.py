"""Demand paging of experts, driven by the host for any device: page tables, victims, counters. Copies are SlotPool's.

The engine's thread reads (`reading`, `streaming`), those of the prefetcher and the lookahead copy ahead (`prefetch`). The
rule they obey: a slot that the running step reads is never a victim, and a slot is never read before its copy is complete.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.eviction import EvictionPolicy
from actors.executor.expert_source import ExpertSource
from actors.executor.gpu.host_memory import PinnedRing
from actors.executor.pager import ABSENT, HASH_FUNCTION, Activity, LayerCounters, PrefetchCounts
from actors.executor.slots import SlotPool


@dataclass
class _Layer:
    pool: SlotPool
    policy: EvictionPolicy
    free_slots: list[int]
    # [experts], for `activity`; lists, because a step touches few: to index an array with them takes 5 us, this 0.3.
    uses: list[int]
    misses: list[int]
    changed: threading.Condition = field(default_factory=threading.Condition)
    loading: set[int] = field(default_factory=set)  # expert ids that are copied ahead now
    reading: frozenset[int] = frozenset()  # expert ids that the running step reads
    step_waits: bool = False  # for a slot; prefetching must not take the next one
    pinned: frozenset[int] = frozenset()  # expert ids that are no victims
    unused_prefetches: dict[int, str] = field(default_factory=dict)  # expert id -> who asked
    prefetches: defaultdict[str, PrefetchCounts] = field(default_factory=lambda: defaultdict(PrefetchCounts))
    counters: LayerCounters = field(default_factory=LayerCounters)
    read_done: torch.cuda.Event | None = None  # the device has finished the layer's last read


class HostPager:
    """Page tables and slots of all MoE layers, for any device that the host copies to.

    Args:
        pools: one per MoE layer, all with the same number of slots.
        poison_free_slots: fill slots with NaN when they are free; for tests.
        pinned: of each layer the experts that keep their slots once they have one, fewer than there are slots.
    """

    def __init__(
        self,
        source: ExpertSource,
        pools: Sequence[SlotPool],
        num_experts: int,
        new_policy: Callable[[], EvictionPolicy],
        device: torch.device,
        poison_free_slots: bool = False,
        pinned: Sequence[Collection[int]] = (),
    ) -> None:
        self.source = source
        self.num_slots = pools[0].num_slots
        self.num_experts = num_experts
        self._layers = [
            _Layer(
                pool,
                new_policy(),
                list(range(self.num_slots))[::-1],
                [0] * num_experts,
                [0] * num_experts,
                pinned=frozenset(experts),
            )
            for pool, experts in zip(pools, pinned or [()] * len(pools), strict=True)
        ]
        self._poison = poison_free_slots
        if poison_free_slots:
            for pool in pools:
                for slot in range(self.num_slots):
                    pool.poison(slot)
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._of_thread = threading.local()  # on a GPU, its ring of staging buffers
        # [layers, experts] int64 on the host: the slot of each expert, or ABSENT.
        self.page_table = torch.full((len(pools), num_experts), ABSENT)
        self._slot_of: NDArray[np.int64] = self.page_table.numpy()  # the same memory

    @property
    def wave_size(self) -> int:
        return self.num_slots - max(len(state.pinned) for state in self._layers)

    def fits(self, layer: int, expert_ids: NDArray[np.int64]) -> bool:
        return self._fits(self._layers[layer], expert_ids.tolist())

    def _fits(self, state: _Layer, expert_ids: Sequence[int]) -> bool:
        if len(expert_ids) > self.num_slots:
            return False
        return len(state.pinned.union(expert_ids)) <= self.num_slots

    def close(self) -> None:
        pass

    @contextmanager
    def host_pass(self) -> Iterator[None]:
        yield

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        yield

    def requests_ended(self, share: float) -> None:
        for state in self._layers:
            with state.changed:
                state.policy.requests_ended(share)

    def resident(self, layer: int) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = self._slot_of[layer] != ABSENT
        return mask

    def loading(self, layer: int) -> NDArray[np.bool_]:
        state = self._layers[layer]
        mask = np.zeros(self.num_experts, np.bool_)
        with state.changed:
            mask[list(state.loading)] = True
        return mask

    def counters(self, layer: int) -> LayerCounters:
        return self._layers[layer].counters

    def prefetches(self) -> dict[str, PrefetchCounts]:
        totals: defaultdict[str, PrefetchCounts] = defaultdict(PrefetchCounts)
        for state in self._layers:
            with state.changed:
                for by, counts in state.prefetches.items():
                    totals[by] += counts
        return dict(totals)

    def activity(self) -> Activity:
        slot_of = np.empty_like(self._slot_of)
        unused, uses, misses = (
            np.zeros_like(slot_of, np.bool_),
            np.zeros_like(slot_of),
            np.zeros_like(slot_of),
        )
        for layer, state in enumerate(self._layers):
            with state.changed:
                slot_of[layer], uses[layer], misses[layer] = self._slot_of[layer], state.uses, state.misses
                unused[layer, list(state.unused_prefetches)] = True
        return Activity(slot_of, unused, uses, misses)

    @contextmanager
    def reading(self, layer: int, expert_ids: Sequence[int]) -> Iterator[Tensor]:
        assert self._fits(self._layers[layer], expert_ids)
        if self.num_slots == self.num_experts and (self._slot_of[layer, expert_ids] != ABSENT).all():
            with self._layers[layer].changed:
                self._count(self._layers[layer], expert_ids, missing=())
            yield self.page_table[layer]  # where every expert has a slot, none leaves
            return
        with self.streaming(layer, expert_ids) as slots:
            for _ in slots:
                pass
            yield self.page_table[layer]

    @contextmanager
    def streaming(self, layer: int, expert_ids: Sequence[int]) -> Iterator[Iterator[tuple[int, int]]]:
        """Let the body read any number of experts: first those in slots, then each of the others when it is copied.

        Experts that fit stay in their slots to the end. With more of them, what finds no slot passes through
        one: there it lies until the next one is asked for. The others stay for the next pass.

        Args:
            expert_ids: distinct.
        Yields:
            An iterator over (expert id, slot). It raises ExpertsUnavailableError.
        """
        state = self._layers[layer]
        slots = self._stream(layer, state, expert_ids)
        try:
            yield slots
        finally:
            slots.close()
            self._end_reading(state, expert_ids)

    def _stream(
        self, layer: int, state: _Layer, expert_ids: Sequence[int]
    ) -> Generator[tuple[int, int], None, None]:
        passing = not self._fits(state, expert_ids)
        with state.changed:
            state.reading = frozenset(expert_ids)
            slots = dict(zip(expert_ids, self._slot_of[layer, expert_ids].tolist(), strict=True))
            missing = [expert_id for expert_id, slot in slots.items() if slot == ABSENT]
            self._count(state, expert_ids, missing)
            under_way = state.loading.intersection(missing)
            to_load = [expert_id for expert_id in missing if expert_id not in under_way]
            free = self._take_slots(layer, state, len(to_load), state.reading)
        num_staying = len(free) if passing else len(to_load)
        try:
            yield from ((expert_id, slot) for expert_id, slot in slots.items() if slot != ABSENT)
            for expert_id in to_load[:num_staying]:
                slot = free.pop(0) if free else self._wait_for_slot(layer, state, state.reading)
                self._copy(layer, state, expert_id, slot)
                yield expert_id, slot
        finally:
            with state.changed:
                self._give_back(state, free)
        if num_staying < len(to_load):
            yield from self._pass_through(layer, state, to_load[num_staying:])
        for expert_id in under_way:
            self._await_copy(layer, state, expert_id, keep=() if passing else state.reading)
            yield expert_id, int(self._slot_of[layer, expert_id])

    def _pass_through(
        self, layer: int, state: _Layer, expert_ids: Sequence[int]
    ) -> Generator[tuple[int, int], None, None]:
        """Bring experts one by one into one slot, in which the last one stays."""
        assert self._copy_stream is None, "a device may still read the expert before"
        slot = self._wait_for_slot(
            layer, state, keep=()
        )  # whatever has a slot has been read, but pinned ones stay
        try:
            for expert_id in expert_ids[:-1]:
                self._write(state.pool, slot, self.source.fetch(layer, expert_id))
                with state.changed:
                    state.counters.moved_bytes += self.source.layout.slab_bytes
                yield expert_id, slot
        except BaseException:
            with state.changed:
                self._give_back(state, [slot])
            raise
        self._copy(layer, state, expert_ids[-1], slot)
        yield expert_ids[-1], slot

    def _count(self, state: _Layer, expert_ids: Sequence[int], missing: Sequence[int]) -> None:
        state.counters.hits += len(expert_ids) - len(missing)
        state.counters.misses += len(missing)
        for expert_id in expert_ids:
            state.uses[expert_id] += 1
        for expert_id in missing:
            state.misses[expert_id] += 1
        self._count_used_prefetches(state, expert_ids)

    def _count_used_prefetches(self, state: _Layer, expert_ids: Sequence[int]) -> None:
        if state.unused_prefetches:
            for expert_id in state.unused_prefetches.keys() & set(expert_ids):
                state.counters.prefetched_used += 1
                state.prefetches[state.unused_prefetches.pop(expert_id)].used += 1

    def _wait_for_slot(self, layer: int, state: _Layer, keep: Collection[int]) -> int:
        """A slot without an expert of `keep`, even if the prefetcher has to fill it first."""
        with state.changed:
            state.step_waits = True
            while not (slots := self._take_slots(layer, state, 1, keep)):
                state.changed.wait()
            state.step_waits = False
            return slots[0]

    def _await_copy(self, layer: int, state: _Layer, expert_id: int, keep: Collection[int]) -> None:
        """Wait for the prefetcher's copy of an expert; one that failed is fetched here, where errors are answered."""
        with state.changed:
            state.changed.wait_for(lambda: expert_id not in state.loading)
            is_resident = self._slot_of[layer, expert_id] != ABSENT
        if not is_resident:
            self._copy(layer, state, expert_id, self._wait_for_slot(layer, state, keep))

    def load_ahead(self, layer: int, expert_ids: Sequence[int]) -> None:
        pass  # a copy would end before the compute that it should run beside begins

    def prefetch(self, layer: int, expert_id: int, keep: Collection[int], by: str = HASH_FUNCTION) -> bool:
        state = self._layers[layer]
        with state.changed:
            # What the running step reads it also fetches; two copies of one expert would lose a slot.
            taken_care_of = state.loading.union(state.reading)
            if state.step_waits or expert_id in taken_care_of or self._slot_of[layer, expert_id] != ABSENT:
                return False
            slots = self._take_slots(layer, state, 1, state.reading.union(keep))
            if not slots:
                return False
            state.loading.add(expert_id)
        with self._prefetch_stream(state):
            self._copy(layer, state, expert_id, slots[0])
        with state.changed:
            state.counters.prefetched += 1
            state.prefetches[by].copied += 1
            state.unused_prefetches[expert_id] = by
        return True

    def _take_slots(self, layer: int, state: _Layer, count: int, keep: Collection[int]) -> list[int]:
        """At most `count` slots: free ones, then those of the first victims outside `keep`. The caller holds the lock."""
        slots = [state.free_slots.pop() for _ in range(min(count, len(state.free_slots)))]
        if len(slots) < count:
            victims = [
                expert_id
                for expert_id in state.policy.victims()
                if expert_id not in keep and expert_id not in state.pinned
            ]
            slots += [self._evict(layer, state, victim) for victim in victims[: count - len(slots)]]
        return slots

    def _evict(self, layer: int, state: _Layer, victim: int) -> int:
        """Returns: its slot. The caller holds the lock."""
        slot = int(self._slot_of[layer, victim])
        self._slot_of[layer, victim] = ABSENT
        state.policy.evicted(victim)
        if (by := state.unused_prefetches.pop(victim, None)) is not None:
            state.counters.prefetched_wasted += 1
            state.prefetches[by].wasted += 1
        state.counters.evictions += 1
        return slot

    def _give_back(self, state: _Layer, slots: Sequence[int]) -> None:
        """The caller holds the lock."""
        if self._poison:
            for slot in slots:
                state.pool.poison(slot)
        state.free_slots.extend(slots)

    def _copy(self, layer: int, state: _Layer, expert_id: int, slot: int) -> None:
        loaded = False
        try:
            self._write(state.pool, slot, self.source.fetch(layer, expert_id))
            if self._copy_stream is not None:
                torch.cuda.current_stream().synchronize()
            loaded = True
        finally:
            with state.changed:
                state.loading.discard(expert_id)
                if loaded:
                    self._slot_of[layer, expert_id] = slot
                    state.policy.loaded(expert_id)
                    state.counters.moved_bytes += self.source.layout.slab_bytes
                else:
                    self._give_back(state, [slot])
                state.changed.notify_all()

    def _write(self, pool: SlotPool, slot: int, slab: Tensor) -> None:
        if self._copy_stream is None or slab.is_pinned():
            pool.write(slot, slab, self.source.layout)
            return
        if not hasattr(self._of_thread, "ring"):
            self._of_thread.ring = PinnedRing(self.source.layout.slab_bytes)
        self._of_thread.ring.copy(slab.view(self.source.layout.dtype), pool.elements[slot])

    @contextmanager
    def _prefetch_stream(self, state: _Layer) -> Iterator[None]:
        """On a GPU, copies beside the compute, but only after the device's last read of the layer's slots."""
        if self._copy_stream is None:
            yield
            return
        if state.read_done is not None:
            self._copy_stream.wait_event(state.read_done)
        with torch.cuda.stream(self._copy_stream):
            yield

    def _end_reading(self, state: _Layer, expert_ids: Sequence[int]) -> None:
        if self._copy_stream is not None:
            state.read_done = torch.cuda.Event()
            state.read_done.record()
        with state.changed:
            state.policy.used(expert_ids)
            self._count_used_prefetches(state, expert_ids)  # those that came meanwhile
            state.reading = frozenset()
            state.changed.notify_all()
