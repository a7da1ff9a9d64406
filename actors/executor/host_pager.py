"""Demand paging of experts, driven by the host for any device: page tables, victims, counters. Copies are SlotPool's.

Two threads call it: the engine's (`acquire`, `release`) and the prefetcher's (`prefetch`). The rule both obey: a slot
that the running step reads is never a victim, and a slot is never read before its copy is complete.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.eviction import EvictionPolicy
from actors.executor.expert_source import ExpertSource
from actors.executor.gpu.host_memory import PinnedRing
from actors.executor.pager import ABSENT, Activity, LayerCounters
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
    loading: set[int] = field(default_factory=set)  # expert ids whose copy is under way
    reading: frozenset[int] = frozenset()  # expert ids that the running step reads
    step_waits: bool = False  # for a slot; prefetching must not take the next one
    unused_prefetches: set[int] = field(default_factory=set)
    counters: LayerCounters = field(default_factory=LayerCounters)
    read_done: torch.cuda.Event | None = None  # the device has finished the layer's last read


class HostPager:
    """Page tables and slots of all MoE layers, for any device that the host copies to.

    Args:
        pools: one per MoE layer, all with the same number of slots.
        poison_free_slots: fill slots with NaN when they are free; for tests.
    """

    def __init__(
        self,
        source: ExpertSource,
        pools: Sequence[SlotPool],
        num_experts: int,
        new_policy: Callable[[], EvictionPolicy],
        device: torch.device,
        poison_free_slots: bool = False,
    ) -> None:
        self.source = source
        self.num_slots = pools[0].num_slots
        self.num_experts = num_experts
        self._layers = [
            _Layer(
                pool, new_policy(), list(range(self.num_slots))[::-1], [0] * num_experts, [0] * num_experts
            )
            for pool in pools
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
        return self.num_slots

    def close(self) -> None:
        pass

    @contextmanager
    def host_pass(self) -> Iterator[None]:
        yield

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        yield

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
        state = self._layers[layer]
        assert len(expert_ids) <= self.num_slots
        try:
            self._make_resident(layer, state, expert_ids)
            yield self.page_table[layer]
        finally:
            self._end_reading(state)

    def _make_resident(self, layer: int, state: _Layer, expert_ids: Sequence[int]) -> None:
        with state.changed:
            state.reading = frozenset(expert_ids)
            missing = [e for e in expert_ids if self._slot_of[layer, e] == ABSENT]
            to_load = [e for e in missing if e not in state.loading]
            state.counters.hits += len(expert_ids) - len(missing)
            state.counters.misses += len(missing)
            for expert_id in expert_ids:
                state.uses[expert_id] += 1
            for expert_id in missing:
                state.misses[expert_id] += 1
        for expert_id in to_load:
            self._load_on_demand(layer, state, expert_id)
        with state.changed:
            # A prefetch that failed leaves its expert absent and not loading: fetch it here, where errors are answered.
            while waiting := [e for e in expert_ids if self._slot_of[layer, e] == ABSENT]:
                if not state.loading.intersection(waiting):
                    break
                state.changed.wait()
        for expert_id in waiting:
            self._load_on_demand(layer, state, expert_id)
        with state.changed:
            state.policy.used(expert_ids)
            state.counters.prefetched_used += len(state.unused_prefetches.intersection(expert_ids))
            state.unused_prefetches.difference_update(expert_ids)

    def _load_on_demand(self, layer: int, state: _Layer, expert_id: int) -> None:
        with state.changed:
            state.step_waits = True
            while (slot := self._take_slot(layer, state, state.reading)) is None:
                state.changed.wait()  # every other slot is being filled by the prefetcher
            state.step_waits = False
            state.loading.add(expert_id)
        self._copy(layer, state, expert_id, slot)

    def load_ahead(self, layer: int, expert_ids: Sequence[int]) -> None:
        pass  # a copy would end before the compute that it should run beside begins

    def prefetch(self, layer: int, expert_id: int, keep: Collection[int]) -> bool:
        state = self._layers[layer]
        with state.changed:
            # What the running step reads it also fetches; two copies of one expert would lose a slot.
            taken_care_of = state.loading.union(state.reading)
            if state.step_waits or expert_id in taken_care_of or self._slot_of[layer, expert_id] != ABSENT:
                return False
            slot = self._take_slot(layer, state, state.reading.union(keep))
            if slot is None:
                return False
            state.loading.add(expert_id)
        with self._prefetch_stream(state):
            self._copy(layer, state, expert_id, slot)
        with state.changed:
            state.counters.prefetched += 1
            state.unused_prefetches.add(expert_id)
        return True

    def _take_slot(self, layer: int, state: _Layer, keep: Collection[int]) -> int | None:
        """A free slot, or that of the first victim outside `keep`. The caller holds the layer's lock."""
        if state.free_slots:
            return state.free_slots.pop()
        for victim in state.policy.victims():
            if victim not in keep:
                slot = int(self._slot_of[layer, victim])
                self._slot_of[layer, victim] = ABSENT
                state.policy.evicted(victim)
                state.counters.prefetched_wasted += victim in state.unused_prefetches
                state.unused_prefetches.discard(victim)
                state.counters.evictions += 1
                return slot
        return None

    def _copy(self, layer: int, state: _Layer, expert_id: int, slot: int) -> None:
        loaded = False
        try:
            self._write(state.pool, slot, self.source.fetch(layer, expert_id))
            if self._copy_stream is not None:
                torch.cuda.current_stream().synchronize()
            loaded = True
        finally:
            with state.changed:
                state.loading.remove(expert_id)
                if loaded:
                    self._slot_of[layer, expert_id] = slot
                    state.policy.loaded(expert_id)
                    state.counters.moved_bytes += self.source.layout.slab_bytes
                else:
                    if self._poison:
                        state.pool.poison(slot)
                    state.free_slots.append(slot)
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

    def _end_reading(self, state: _Layer) -> None:
        if self._copy_stream is not None:
            state.read_done = torch.cuda.Event()
            state.read_done.record()
        with state.changed:
            state.reading = frozenset()
            state.changed.notify_all()
