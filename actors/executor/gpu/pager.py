"""Paging whose page tables live on the device: the decode graphs page by themselves, prompts are paged by the host.

Between two passes the device's tables are the truth. A pass that the host drives takes them over in one copy, pages with
the copy engine, and hands them back in one copy. One thread uses a pager; only `counters` and `resident` may be called
from others, and lag behind.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.eviction import HALF_LIFE_PASSES
from actors.executor.expert_source import ExpertSource
from actors.executor.gpu.host_experts import HostExperts
from actors.executor.gpu.paging_kernels import fetch_kernel, list_kernel, page_kernel, prefetch_kernel
from actors.executor.gpu.prefetch_governor import PrefetchGovernor
from actors.executor.pager import ABSENT, LayerCounters
from actors.executor.slots import SlotPool

# Columns of the counters; `paging_kernels` counts on this order.
COUNTERS = (
    "hits",
    "misses",
    "fetched",
    "evictions",
    "prefetched",
    "prefetched_used",
    "prefetched_wasted",
    "spare",
)
_HITS, _MISSES, _FETCHED, _EVICTIONS, _PREFETCHED, _USED, _WASTED, _ = range(len(COUNTERS))

MAX_ROWS = 32  # of a pass that pages by itself
MAX_PREFETCHED = 4  # experts of a layer and step
# Enough reads in flight to fill the link, few enough to leave the processors to the compute.
_FETCH_PROGRAMS = 16
_FETCH_BYTES = 16384  # per program and step
_TIMED_COPIES = 16


@dataclass(frozen=True)
class _Order:
    """How an eviction policy values residents, in the terms of `paging_kernels`."""

    stamp_use: bool  # a use counts, not only the copy
    by_heat: bool  # value frequent use, not the last one


_ORDERS = {"lru": _Order(True, False), "fifo": _Order(False, False), "lfu": _Order(True, True)}


class PageState:
    """Page tables, stamps and counters of all layers in one block of memory, so that one copy moves them."""

    def __init__(self, num_layers: int, num_experts: int, num_slots: int, **placement: Any) -> None:
        fields = {
            "step": (torch.int64, (1,)),
            "counters": (torch.int64, (num_layers, len(COUNTERS))),
            "stamps": (torch.int64, (num_layers, num_experts)),  # step of the last use, or of the copy
            "heat": (
                torch.float32,
                (num_layers, num_experts),
            ),  # uses, halved every HALF_LIFE_PASSES; as of the stamp
            "slot_of": (torch.int32, (num_layers, num_experts)),  # or ABSENT
            "expert_in": (torch.int32, (num_layers, num_slots)),  # or ABSENT
            "unused": (torch.int8, (num_layers, num_experts)),  # prefetched, and not needed since
        }
        sizes = [int(np.prod(shape)) * dtype.itemsize for dtype, shape in fields.values()]
        self.memory = torch.zeros(sum(sizes), dtype=torch.uint8, **placement)
        parts = self.memory.split(sizes)
        views = (
            part.view(dtype).view(shape) for part, (dtype, shape) in zip(parts, fields.values(), strict=True)
        )
        self.step, self.counters, self.stamps, self.heat, self.slot_of, self.expert_in, self.unused = views
        self.slot_of.fill_(ABSENT)
        self.expert_in.fill_(ABSENT)


@dataclass(frozen=True)
class Wave:
    """Experts of one layer that are in slots together, in device memory: nothing here is known to the host.

    `slots` and `experts` hold `num` entries each, at most `max_experts`; `slot_map` is [experts], ABSENT for those that
    the wave does not hold.
    """

    slots: Tensor  # int32
    experts: Tensor  # int32
    num: Tensor  # int32 [1]
    slot_map: Tensor  # int32 [experts]
    max_experts: int


class DevicePager:
    """
    Args:
        pools: one per MoE layer, all with the same number of slots.
        experts: where the device finds the source's experts.
        eviction: a name in EVICTION_POLICIES.
        poison_free_slots: fill slots with NaN when they are free; for tests.
    """

    def __init__(
        self,
        source: ExpertSource,
        pools: Sequence[SlotPool],
        num_experts: int,
        experts: HostExperts,
        eviction: str = "lru",
        poison_free_slots: bool = False,
    ) -> None:
        self.source, self.num_experts, self.num_slots = source, num_experts, pools[0].num_slots
        self._pools, self._order = pools, _ORDERS[eviction]
        device = pools[0].elements.device
        self._on_cuda = device.type == "cuda"
        self._experts, self._addresses = experts, experts.addresses.to(device)
        shape = (len(pools), num_experts, self.num_slots)
        self.state = PageState(*shape, device=device)
        self._mirror = PageState(*shape, pin_memory=self._on_cuda)
        self._scratch, self._prefetch_scratch = (
            _Scratch(num_experts, self.num_slots, device) for _ in range(2)
        )
        self._prefetched: torch.cuda.Event | None = (
            None  # while a pass is queued: what its next layer waits for
        )
        self._budget = np.full(len(pools), MAX_PREFETCHED, np.int32)
        # [layers, 1] int32: experts that a step may prefetch for each layer.
        self.prefetch_budget = torch.full((len(pools), 1), MAX_PREFETCHED, dtype=torch.int32, device=device)
        self.row_missed = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        self._copies = _CopyStream(device) if self._on_cuda else None
        self._reading: tuple[int, list[int]] = (
            ABSENT,
            [],
        )  # layer and experts of the wave that the host reads
        self._loaded_ahead: list[int] = []  # experts of the next one, counted as missed already
        if poison_free_slots:
            for pool in pools:
                for slot in range(self.num_slots):
                    pool.poison(slot)

    # Passes that the host drives.

    @property
    def wave_size(self) -> int:
        """Half of the slots: the other half is filled meanwhile."""
        return max(1, self.num_slots // 2)

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

    def review_prefetching(self, governor: PrefetchGovernor) -> None:
        """Set what each layer may prefetch by what the last `refresh` brought."""
        counters = self._mirror.counters.numpy()
        budget = governor.review(counters[:, _PREFETCHED], counters[:, _USED])
        if not np.array_equal(budget, self._budget):
            self._budget = budget
            self.prefetch_budget.copy_(torch.from_numpy(budget)[:, None])

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
            hits=counted[_HITS],
            misses=counted[_MISSES],
            prefetched=counted[_PREFETCHED],
            prefetched_used=counted[_USED],
            prefetched_wasted=counted[_WASTED],
            evictions=counted[_EVICTIONS],
            moved_bytes=(counted[_FETCHED] + counted[_PREFETCHED]) * self.source.layout.slab_bytes,
        )

    @contextmanager
    def reading(self, layer: int, expert_ids: Sequence[int]) -> Iterator[Tensor]:
        assert len(expert_ids) <= self.num_slots
        ids, mirror = list(expert_ids), self._mirror
        slot_of, unused = mirror.slot_of[layer].numpy(), mirror.unused[layer].numpy()
        counters = mirror.counters[layer].numpy()
        counters[_HITS] += (slot_of[ids] != ABSENT).sum() - len(self._loaded_ahead)
        counters[_USED] += unused[ids].sum()
        unused[ids] = 0
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
        self._mirror.counters[layer].numpy()[[_MISSES, _FETCHED]] += len(loaded)
        return loaded

    def prefetch(self, layer: int, expert_id: int, keep: Collection[int]) -> bool:
        if self._is_resident(layer, expert_id) or not self._load(layer, [expert_id], keep):
            return False
        self._mirror.counters[layer].numpy()[_PREFETCHED] += 1
        self._mirror.unused[layer].numpy()[expert_id] = 1
        return True

    def _is_resident(self, layer: int, expert_id: int) -> bool:
        return bool(self._mirror.slot_of[layer].numpy()[expert_id] != ABSENT)

    def load_all(self) -> None:
        """Fill the slots with the first experts of every layer: all of them where all fit, each in its own slot."""
        with self.host_pass():
            for layer in range(len(self._pools)):
                for expert_id in range(self.num_slots):
                    self.prefetch(layer, expert_id, keep=range(expert_id))

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
        """Slots without an expert of `keep`, in the order of eviction of `paging_kernels`."""
        mirror = self._mirror
        expert_in, stamps = mirror.expert_in[layer].numpy(), mirror.stamps[layer].numpy()
        value = heat if self._order.by_heat else stamps
        fresh = mirror.unused[layer].numpy().astype(bool) & (stamps == mirror.step.numpy())
        reading_layer, reading = self._reading
        kept = {*keep, *reading} if reading_layer == layer else set(keep)
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
        counters[[_EVICTIONS, _WASTED]] += (1, unused[expert_id])
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

    # Passes that page by themselves, queued or captured on the current stream.

    def begin_pass(self) -> None:
        self.state.step.add_(1)
        self.row_missed.zero_()

    def can_prefetch(self, num_rows: int, top_k: int) -> bool:
        """Whether a step of so many rows leaves slots for experts that it may not need."""
        return not self.holds_all and num_rows * top_k + MAX_PREFETCHED <= self.num_slots

    def waves(
        self, layer: int, ids: Tensor, num_active: Tensor, next_scores: Tensor | None = None
    ) -> Iterator[Wave]:
        """Serve a layer's experts, some at a time; the caller queues a wave's compute before it asks for the next.

        The first wave holds what is resident, while misses are copied beside it; every needed expert is in exactly one.

        Args:
            ids: [rows, top_k] int32 or int64, distinct within a row.
            num_active: int32 [1]; rows from there on are padding.
            next_scores: [rows, experts], a guess of the next layer's router logits: the likeliest absent experts are
                prefetched for it once this layer's own are on the way (Pre-gated MoE, arXiv 2308.12066; HOBBIT,
                arXiv 2411.01433). Only where `can_prefetch`.
        """
        rows, top_k = ids.shape
        most = min(rows * top_k, self.num_experts)
        if self.holds_all:
            yield self._all_resident(layer, ids, num_active, most)
            return
        scratch = self._scratch
        if (
            self._prefetched is not None
        ):  # for this layer: its page table has changed, its copies must be complete
            torch.cuda.current_stream().wait_event(self._prefetched)
            self._prefetched = None
        self._page(layer, ids, num_active, first=True)
        with self._beside():
            self._fetch(layer, scratch.num_misses, scratch.miss_slots, scratch.miss_experts)
            fetched = self._mark()
            if next_scores is not None and layer + 1 < len(self._pools):
                self._prefetch_next(layer + 1, next_scores, num_active, top_k)
                self._prefetched = self._mark()
        yield scratch.hits(min(most, self.num_slots))
        if fetched is not None:
            torch.cuda.current_stream().wait_event(fetched)
        yield scratch.misses(min(most, self.num_slots))
        for _ in range(triton.cdiv(max(0, most - self.num_slots), self.num_slots)):
            self._page(layer, ids, num_active, first=False)
            self._fetch(layer, scratch.num_misses, scratch.miss_slots, scratch.miss_experts)
            yield scratch.misses(min(most, self.num_slots))

    def _all_resident(self, layer: int, ids: Tensor, num_active: Tensor, most: int) -> Wave:
        scratch, (rows, top_k) = self._scratch, ids.shape
        list_kernel[(1,)](
            ids, num_active, self.state.counters[layer],
            scratch.hit_experts, scratch.num_hits,
            TOP_K=top_k, NUM_EXPERTS=self.num_experts, ROWS_P=_padded(rows), TOP_K_P=_padded(top_k),
            EXPERTS_P=_padded(self.num_experts),
        )  # fmt: skip
        return Wave(scratch.hit_experts, scratch.hit_experts, scratch.num_hits, scratch.identity, most)

    def _page(self, layer: int, ids: Tensor, num_active: Tensor, first: bool) -> None:
        state, scratch, (rows, top_k) = self.state, self._scratch, ids.shape
        slots_p, experts_p = _padded(self.num_slots), _padded(self.num_experts)
        page_kernel[(1,)](
            ids, num_active, state.slot_of[layer], state.expert_in[layer],
            state.stamps[layer], state.heat[layer], state.unused[layer], state.step, state.counters[layer], self.row_missed,
            scratch.done, scratch.needed, scratch.keys, scratch.order,
            scratch.hit_slots, scratch.hit_experts, scratch.num_hits, scratch.hit_map,
            scratch.miss_slots, scratch.miss_experts, scratch.num_misses, scratch.miss_map,
            FIRST=first, STAMP_USE=self._order.stamp_use, BY_HEAT=self._order.by_heat, HALF_LIFE=HALF_LIFE_PASSES,
            TOP_K=top_k, NUM_EXPERTS=self.num_experts,
            NUM_SLOTS=self.num_slots, ROWS_P=_padded(rows), TOP_K_P=_padded(top_k), EXPERTS_P=experts_p,
            SLOTS_P=slots_p, COUNTERS=len(COUNTERS), num_warps=4 if slots_p <= 128 else 8,
        )  # fmt: skip

    def _prefetch_next(self, layer: int, scores: Tensor, num_active: Tensor, top_k: int) -> None:
        state, scratch = self.state, self._prefetch_scratch
        assert scores.stride(1) == 1
        prefetch_kernel[(1,)](
            scores, num_active, self.prefetch_budget[layer],
            state.slot_of[layer], state.expert_in[layer], state.stamps[layer], state.heat[layer], state.unused[layer],
            state.step, state.counters[layer],
            scratch.needed, scratch.keys, scratch.miss_slots, scratch.miss_experts, scratch.num_misses,
            SCORES_STRIDE=scores.stride(0), MOST=MAX_PREFETCHED, STAMP_USE=self._order.stamp_use,
            BY_HEAT=self._order.by_heat, HALF_LIFE=HALF_LIFE_PASSES, TOP_K=top_k, NUM_EXPERTS=self.num_experts,
            NUM_SLOTS=self.num_slots, ROWS=len(scores), EXPERTS_P=_padded(self.num_experts),
            SLOTS_P=_padded(self.num_slots), COUNTERS=len(COUNTERS),
        )  # fmt: skip
        self._fetch(layer, scratch.num_misses, scratch.miss_slots, scratch.miss_experts)

    def _fetch(self, layer: int, num: Tensor, slots: Tensor, experts: Tensor) -> None:
        target, stored = self._pools[layer].elements, self.source.layout
        if stored.dtype == target.dtype:
            target = target.view(torch.int64)
        stored_type = getattr(tl, str(target.dtype if target.dtype == torch.int64 else stored.dtype)[6:])
        fetch_kernel[(_FETCH_PROGRAMS,)](
            num, slots, experts, self._addresses[layer], target,
            SLAB_ELEMENTS=target.shape[1], BLOCK=_FETCH_BYTES // target.element_size(), PROGRAMS=_FETCH_PROGRAMS,
            STORED=stored_type, num_warps=8,
        )  # fmt: skip

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """The body on the fetch stream, after what is queued."""
        if self._copies is None:
            yield
            return
        self._copies.fetches.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies.fetches):
            yield

    def _mark(self) -> torch.cuda.Event | None:
        """What is queued on the current stream so far."""
        if self._copies is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event


class _Scratch:
    """What one wave's kernels tell each other."""

    def __init__(self, num_experts: int, num_slots: int, device: torch.device) -> None:
        def integers(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.done, self.needed = integers(num_experts, torch.int8), integers(num_experts, torch.int8)
        self.keys, self.order = integers(num_slots, torch.int64), integers(num_slots)
        self.hit_slots, self.hit_experts, self.hit_map = (integers(num_experts) for _ in range(3))
        self.miss_slots, self.miss_experts, self.miss_map = (integers(num_experts) for _ in range(3))
        self.num_hits, self.num_misses = integers(1), integers(1)
        self.identity = torch.arange(num_experts, dtype=torch.int32, device=device)

    def hits(self, most: int) -> Wave:
        return Wave(self.hit_slots, self.hit_experts, self.num_hits, self.hit_map, most)

    def misses(self, most: int) -> Wave:
        return Wave(self.miss_slots, self.miss_experts, self.num_misses, self.miss_map, most)


class _CopyStream:
    """Orders the copies of host-driven passes against the compute that reads slots: a slot is overwritten after its
    layer's last read, and read after its copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.fetches = torch.cuda.Stream(device)  # of captured passes
        self._last_read: dict[int, torch.cuda.Event] = {}  # per layer, of this pass
        self._copied: dict[tuple[int, int], torch.cuda.Event] = {}  # (layer, slot) -> its copy is complete

    def begin_pass(self) -> None:
        self._last_read.clear()
        self._copied.clear()
        self.stream.wait_stream(torch.cuda.current_stream())

    def finish(self) -> None:
        torch.cuda.current_stream().wait_stream(self.stream)

    @contextmanager
    def copying(self, layer: int, slot: int) -> Iterator[None]:
        if (read := self._last_read.get(layer)) is not None:
            self.stream.wait_event(read)
        with torch.cuda.stream(self.stream):
            yield
            self._copied[layer, slot] = torch.cuda.Event()
            self._copied[layer, slot].record()

    def wait_for(self, layer: int, slots: Sequence[int]) -> None:
        for slot in slots:
            if (copied := self._copied.pop((layer, slot), None)) is not None:
                torch.cuda.current_stream().wait_event(copied)

    def mark_read(self, layer: int) -> None:
        self._last_read[layer] = torch.cuda.Event()
        self._last_read[layer].record()


def _padded(size: int) -> int:
    """The power of two that kernels pad a dimension to."""
    return int(triton.next_power_of_2(size))
