"""Passes that the host drives over page tables that live on the device.

Such a pass takes the tables over in one copy, pages with the copy engine, and hands them back in one copy; between passes
the device's tables are the truth.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.eviction import HALF_LIFE_PASSES
from actors.executor.expert_source import ExpertSource
from actors.executor.gpu.copy_stream import CopyStream
from actors.executor.gpu.host_experts import HostExperts
from actors.executor.gpu.page_state import (
    ASKERS,
    EVICTION_ORDERS,
    EVICTIONS,
    FETCHED,
    HITS,
    MISSES,
    PREFETCHED,
    USED,
    WASTED,
    PageState,
)
from actors.executor.pager import (
    ABSENT,
    HASH_FUNCTION,
    RESIDENT_SET,
    Activity,
    LayerCounters,
    PrefetchCounts,
)
from actors.executor.slots import SlotPool

_TIMED_COPIES = 16


class HostPasses:
    """The part of `DevicePager` that makes it a `Pager`.

    Args:
        pools: one per MoE layer, all with the same number of slots.
        experts: where the device finds the source's experts.
        eviction: a name in EVICTION_ORDERS.
        poison_free_slots: fill slots with NaN when they are free, and what experts have yet to compute; for tests.
        pinned: of each layer the experts that keep their slots once they have one, fewer than there are slots.
    """

    def __init__(
        self,
        source: ExpertSource,
        pools: Sequence[SlotPool],
        num_experts: int,
        experts: HostExperts,
        eviction: str = "lru",
        poison_free_slots: bool = False,
        pinned: Sequence[Collection[int]] = (),
    ) -> None:
        self.source, self.num_experts, self.num_slots = source, num_experts, pools[0].num_slots
        self._pools, self._order = pools, EVICTION_ORDERS[eviction]
        device = pools[0].elements.device
        self._experts, self._addresses = experts, experts.addresses.to(device)
        shape = (len(pools), num_experts, self.num_slots)
        self.state = PageState(*shape, device=device)
        self._mirror = PageState(*shape, pin_memory=device.type == "cuda")
        self.num_pinned = max(map(len, pinned), default=0)  # of a layer
        for layer, expert_ids in enumerate(pinned):
            self._mirror.pinned[layer, list(expert_ids)] = 1
        self.state.pinned.copy_(self._mirror.pinned)
        self._copies = CopyStream(device) if device.type == "cuda" else None
        # Layer and experts of the wave that the host reads, and the experts of the next one that it loads already.
        self._reading: tuple[int, list[int]] = (ABSENT, [])
        self._loaded_ahead: list[int] = []
        self.poisons = poison_free_slots
        if poison_free_slots:
            for pool in pools:
                for slot in range(self.num_slots):
                    pool.poison(slot)

    @property
    def wave_size(self) -> int:
        """Half of the slots that are not pinned: the other half is filled meanwhile."""
        return max(1, (self.num_slots - self.num_pinned) // 2)

    def fits(self, layer: int, expert_ids: NDArray[np.int64]) -> bool:
        pinned = self._mirror.pinned[layer].numpy()
        return len(expert_ids) + int(pinned.sum() - pinned[expert_ids].sum()) <= self.num_slots

    @property
    def holds_all(self) -> bool:
        return self.num_slots == self.num_experts

    def close(self) -> None:
        if self._copies is not None:
            torch.cuda.synchronize(self._addresses.device)
        self._experts.close()

    @contextmanager
    def host_pass(self) -> Iterator[None]:
        self._take_over()
        self._mirror.step += 1
        try:
            yield
        finally:
            self._hand_back()

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        self._hand_back()
        try:
            yield
        finally:
            self._take_over()

    def requests_ended(self, share: float) -> None:
        pass  # no order in EVICTION_ORDERS looks at requests

    def follow_experts(self) -> None:
        """Between passes: read the experts where they are now, if the store was restarted."""
        addresses = self._experts.take_replacement()
        if addresses is None:
            return
        if self._copies is not None:
            torch.cuda.synchronize(self._addresses.device)
        self._addresses.copy_(addresses)
        self._experts.drop_replaced()

    def _take_over(self) -> None:
        """Wait for the device's passes and let the host page."""
        self.follow_experts()
        self._mirror.memory.copy_(self.state.memory, non_blocking=True)
        self._loaded_ahead.clear()
        if self._copies is not None:
            torch.cuda.current_stream().synchronize()
            self._copies.begin_pass()

    def _hand_back(self) -> None:
        """Let the device page, once the copies under way are complete."""
        if self._copies is not None:
            self._copies.finish()
        self.state.memory.copy_(self._mirror.memory, non_blocking=True)

    def refresh(self) -> None:
        """Have `counters` and `resident` tell what the passes queued so far have done, once they have."""
        self._mirror.memory.copy_(self.state.memory, non_blocking=True)

    def copy_time_s(self) -> float:
        """How long the copy of one expert takes; measured now, on the current stream."""
        if self._copies is None:
            return 1.0
        slab, target = self.source.fetch(0, 0), torch.empty_like(self._pools[0].elements[0])
        self._experts.copy(slab, target)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(_TIMED_COPIES):
            self._experts.copy(slab, target)
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / _TIMED_COPIES

    def resident(self, layer: int) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = self._mirror.slot_of[layer].numpy() != ABSENT
        return mask

    def loading(self, layer: int) -> NDArray[np.bool_]:
        return np.zeros(self.num_experts, np.bool_)  # what is on its way has its slot already

    def counters(self, layer: int) -> LayerCounters:
        counted = self._mirror.counters[layer].tolist()
        return LayerCounters(
            hits=counted[HITS],
            misses=counted[MISSES],
            prefetched=sum(counted[column] for column in PREFETCHED),
            prefetched_used=sum(counted[column] for column in USED),
            prefetched_wasted=sum(counted[column] for column in WASTED),
            evictions=counted[EVICTIONS],
            moved_bytes=sum(counted[column] for column in (FETCHED, *PREFETCHED))
            * self.source.layout.slab_bytes,
        )

    def prefetches(self) -> dict[str, PrefetchCounts]:
        totals = self._mirror.counters.sum(dim=0).tolist()
        columns = zip(ASKERS, PREFETCHED, USED, WASTED, strict=True)
        counts = {by: PrefetchCounts(*(totals[column] for column in three)) for by, *three in columns}
        return {by: each for by, each in counts.items() if each.copied}

    def activity(self) -> Activity:
        mirror = self._mirror
        slot_of, stamps = mirror.slot_of.numpy().astype(np.int64), mirror.stamps.numpy().copy()
        if self.holds_all:
            return Activity(slot_of, np.zeros_like(slot_of, np.bool_), np.zeros_like(stamps), None)
        unused = mirror.unused.numpy().astype(np.bool_)
        return Activity(slot_of, unused, np.where(unused, ABSENT, stamps), None)

    @contextmanager
    def reading(self, layer: int, expert_ids: Sequence[int]) -> Iterator[Tensor]:
        ids, mirror = list(expert_ids), self._mirror
        assert self.fits(layer, np.array(ids, np.int64))
        slot_of, unused = mirror.slot_of[layer].numpy(), mirror.unused[layer].numpy()
        counters = mirror.counters[layer].numpy()
        counters[HITS] += (slot_of[ids] != ABSENT).sum() - len(self._loaded_ahead)
        for expert_id in unused.nonzero()[0]:
            if expert_id in ids:
                counters[USED[unused[expert_id] - 1]] += 1
                unused[expert_id] = 0
        self._loaded_ahead.clear()
        self._reading = (layer, ids)
        self._load_missing(layer, ids, keep=ids)
        if self._order.stamp_use:
            heat = self._heat_now(layer)
            heat[ids] += 1
            self._stamp(layer, ids, heat)
        if self._copies is not None:
            self._copies.wait_for(layer, slot_of[ids].tolist())
        try:
            yield mirror.slot_of[layer]
        finally:
            self._reading = (ABSENT, [])
            if self._copies is not None:
                self._copies.mark_read(layer)

    def load_ahead(self, layer: int, expert_ids: Sequence[int]) -> None:
        self._loaded_ahead = self._load_missing(layer, expert_ids, keep=expert_ids)

    def _load_missing(self, layer: int, expert_ids: Sequence[int], keep: Collection[int]) -> list[int]:
        """Returns: the experts whose copies were queued."""
        absent = [expert_id for expert_id in expert_ids if not self._is_resident(layer, expert_id)]
        loaded = self._load(layer, absent, keep)
        self._mirror.counters[layer].numpy()[[MISSES, FETCHED]] += len(loaded)
        return loaded

    def prefetch(self, layer: int, expert_id: int, keep: Collection[int], by: str = HASH_FUNCTION) -> bool:
        if self._is_resident(layer, expert_id) or not self._load(layer, [expert_id], keep):
            return False
        asker = ASKERS.index(by)
        self._mirror.counters[layer].numpy()[PREFETCHED[asker]] += 1
        self._mirror.unused[layer].numpy()[expert_id] = 1 + asker
        return True

    def _is_resident(self, layer: int, expert_id: int) -> bool:
        return bool(self._mirror.slot_of[layer].numpy()[expert_id] != ABSENT)

    def load_all(self) -> None:
        """Fill the slots with the first experts of every layer: all of them where all fit, each in its own slot."""
        with self.host_pass():
            for layer in range(len(self._pools)):
                for expert_id in range(self.num_slots):
                    self.prefetch(layer, expert_id, keep=range(expert_id), by=RESIDENT_SET)

    def _load(self, layer: int, expert_ids: Sequence[int], keep: Collection[int]) -> list[int]:
        """Queue the copies of absent experts. Returns: those for which a slot could be had."""
        mirror = self._mirror
        slot_of, expert_in = mirror.slot_of[layer].numpy(), mirror.expert_in[layer].numpy()
        heat = self._heat_now(layer)
        loaded = []
        for expert_id, slot in zip(expert_ids, self._slots_to_take(layer, heat, keep), strict=False):
            slab = self.source.fetch(layer, expert_id)
            self._evict(layer, slot)
            with self._copies.copying(layer, slot) if self._copies is not None else nullcontext():
                self._experts.copy(slab, self._pools[layer].elements[slot])
            slot_of[expert_id], expert_in[slot] = slot, expert_id
            self._stamp(layer, [expert_id], heat)
            loaded.append(expert_id)
        return loaded

    def _slots_to_take(self, layer: int, heat: NDArray[np.float32], keep: Collection[int]) -> list[int]:
        """Slots without a pinned expert or one of `keep`, in the order of eviction of `paging_kernels`."""
        mirror = self._mirror
        expert_in, stamps = mirror.expert_in[layer].numpy(), mirror.stamps[layer].numpy()
        value = heat if self._order.by_heat else stamps
        fresh = mirror.unused[layer].numpy().astype(bool) & (stamps == mirror.step.numpy())
        reading_layer, reading = self._reading
        kept = {*keep, *mirror.pinned[layer].numpy().nonzero()[0].tolist()}
        if reading_layer == layer:
            kept.update(reading)
        free = np.flatnonzero(expert_in == ABSENT)
        occupied = [slot for slot in np.flatnonzero(expert_in != ABSENT) if expert_in[slot] not in kept]
        experts = expert_in[occupied]
        order = np.lexsort((experts, value[experts], fresh[experts]))
        return [*free.tolist(), *np.array(occupied, np.int64)[order].tolist()]

    def _evict(self, layer: int, slot: int) -> None:
        mirror = self._mirror
        expert_id = int(mirror.expert_in[layer].numpy()[slot])
        if expert_id == ABSENT:
            return
        counters, unused = mirror.counters[layer].numpy(), mirror.unused[layer].numpy()
        counters[EVICTIONS] += 1
        if unused[expert_id]:
            counters[WASTED[unused[expert_id] - 1]] += 1
            unused[expert_id] = 0
        mirror.slot_of[layer].numpy()[expert_id] = ABSENT
        mirror.expert_in[layer].numpy()[slot] = ABSENT

    def _heat_now(self, layer: int) -> NDArray[np.float32]:
        mirror = self._mirror
        age = (mirror.stamps[layer] - mirror.step).numpy().astype(np.float32)
        now: NDArray[np.float32] = mirror.heat[layer].numpy() * np.exp2(age / np.float32(HALF_LIFE_PASSES))
        return now

    def _stamp(self, layer: int, expert_ids: Sequence[int], heat: NDArray[np.float32]) -> None:
        self._mirror.heat[layer].numpy()[expert_ids] = heat[expert_ids]
        self._mirror.stamps[layer].numpy()[expert_ids] = self._mirror.step.numpy()
