"""Paging by the device: the kernels that a decode graph captures, around the page tables of `page_state`.

One thread uses a pager; only `counters` and `resident` may be called from others, and lag behind.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.executor.eviction import HALF_LIFE_PASSES
from actors.executor.gpu.chained_launch import chained
from actors.executor.gpu.host_passes import HostPasses
from actors.executor.gpu.page_state import ASKERS, NUM_COUNTERS, PREFETCHED, USED
from actors.executor.gpu.paging_kernels import (
    fetch_kernel,
    list_kernel,
    page_kernel,
    prefetch_kernel,
    prefetch_used_kernel,
)
from actors.executor.gpu.prefetch_governor import PrefetchGovernor
from actors.executor.pager import HASH_FUNCTION, NEXT_GATE

MAX_ROWS = 32  # of a pass that pages by itself
MAX_PREFETCHED = 4  # experts of a layer and step, by a guess of the next layer's routing
_TABLES, _GUESSES = ASKERS.index(HASH_FUNCTION), ASKERS.index(NEXT_GATE)
PAIRS_AT_ONCE = 1024  # (row, choice) pairs that a kernel of prompts looks at
# Enough reads in flight to fill the link, few enough to leave the processors to the compute.
_FETCH_PROGRAMS = 24
_FETCH_BYTES = 16384  # per program and step


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


class DevicePager(HostPasses):
    """A `Pager` whose decode passes are queued, or captured, without the host knowing what they page."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Args: as `HostPasses`."""
        super().__init__(*args, **options)
        device, num_layers = self.state.step.device, len(self._pools)
        self._scratch = _Scratch(self.num_experts, self.num_slots, device)
        self._table_scratch = _Scratch(self.num_experts, self.num_slots, device)
        self._ahead_scratch = _Scratch(self.num_experts, self.num_slots, device)
        # In turns: what is guessed of a layer is planned while the copies of the one before may be under way.
        self._guess_scratches = [_Scratch(self.num_experts, self.num_slots, device) for _ in range(2)]
        # First in line for processors, since the compute waits for what they do.
        self._fetches, self._plans = _stream(device, priority=-1), _stream(device, priority=-1)
        self._aheads = _stream(device)  # no layer of the running pass waits for these copies
        self._is_behind = True  # whether the stream of fetches has yet to wait for what this pass follows
        # While a pass is queued: the change to the next layer's page table and the guess it reads; then its copies.
        self._planned: torch.cuda.Event | None = None
        self._guess: Tensor | None = None
        self._prefetched: torch.cuda.Event | None = None
        self._ahead: dict[int, torch.cuda.Event | None] = {}  # what each layer of the next pass waits for
        self._budget = np.full(num_layers, MAX_PREFETCHED, np.int32)
        # [layers, 1] int32: experts that a step may prefetch for each layer.
        self.prefetch_budget = torch.from_numpy(self._budget).to(device, copy=True)[:, None]
        self.row_missed = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        # Of this prompt pass, experts prefetched in it and ahead of it; and of each layer ahead of the next one.
        self.num_prefetched, self.num_copied_ahead = torch.zeros(2, 1, dtype=torch.int64, device=device)
        self._num_ahead = torch.zeros(num_layers, dtype=torch.int64, device=device)

    def review_prefetching(self, governor: PrefetchGovernor) -> None:
        """Set what each layer may prefetch by what the last `refresh` brought."""
        counters = self._mirror.counters.numpy()
        budget = governor.review(counters[:, PREFETCHED[_GUESSES]], counters[:, USED[_GUESSES]])
        if not np.array_equal(budget, self._budget):
            self._budget = budget
            self.prefetch_budget.copy_(torch.from_numpy(budget)[:, None])

    def begin_pass(self) -> None:
        self._is_behind = True
        self.state.step.add_(1)
        self.row_missed.zero_()

    def begin_prompt(self) -> None:
        self.follow_experts()
        self._is_behind = True
        self.state.step.add_(1)
        self.num_prefetched.zero_()
        self.num_copied_ahead.zero_()

    def join(self) -> None:
        """Have what is queued from now on wait for the running pass' prefetches."""
        self.join_tables()
        _wait(self._prefetched)
        self._prefetched = None

    def join_tables(self) -> None:
        """As `join`, but only until page tables say what is prefetched: copies may still be under way."""
        _wait(self._planned)
        self._planned = self._guess = None

    def join_ahead(self, layer: int) -> None:
        """Have the layer of this pass, which is queued next, wait for what was copied for it ahead of the pass."""
        if layer in self._ahead:
            _wait(self._ahead.pop(layer))
            self.num_copied_ahead += self._num_ahead[layer]
            self._num_ahead[layer].zero_()

    def _take_over(self) -> None:
        self.join()
        for layer in range(len(self._pools)):
            self.join_ahead(layer)
        super()._take_over()

    def can_prefetch(self, num_rows: int, top_k: int) -> bool:
        """Whether a step of so many rows leaves slots for experts that it may not need."""
        return not self.holds_all and num_rows * top_k + MAX_PREFETCHED <= self.num_slots - self.num_pinned

    def waves(
        self,
        layer: int,
        ids: Tensor,
        num_active: Tensor,
        next_scores: Tensor | None = None,
        next_ids: Tensor | None = None,
        of_prompts: bool = False,
    ) -> Iterator[Wave]:
        """Serve a layer's experts, some at a time; the caller queues a wave's compute before it asks for the next.

        The first wave holds what is resident, while misses are copied beside it; every needed expert is in exactly one.

        Args:
            ids: [rows, top_k] int32 or int64, distinct within a row, contiguous.
            num_active: int32 [1]; rows from there on are padding.
            next_scores: [rows, experts], a guess of the next layer's router logits: the likeliest absent experts are
                prefetched for it once this layer's own are on the way (Pre-gated MoE, arXiv 2308.12066; HOBBIT,
                arXiv 2411.01433). Only where `can_prefetch`.
            next_ids: [rows, top_k], the same guess as choices, for any number of rows.
            of_prompts: rows are prompts' tokens, of any number, whose misses are not counted one by one: one kernel
                serves all numbers. Otherwise at most MAX_ROWS.
        """
        rows, top_k = ids.shape
        most = min(rows * top_k, self.num_experts)
        if self.holds_all:
            yield self._all_resident(layer, ids, num_active, most, of_prompts)
            return
        scratch = self._scratch
        self.join_tables()
        arriving, self._prefetched = self._prefetched, None
        guess = next_scores if next_ids is None else next_ids
        if layer + 1 == len(self._pools):
            guess = None
        guessed = self._guess_scratches[layer % 2]
        if guess is not None:
            with _beside(self._plans):
                if next_ids is None:
                    self._plan_likeliest(layer + 1, guess, num_active, top_k, guessed)
                else:
                    self._plan_used(layer + 1, guess, MAX_PREFETCHED, _GUESSES, guessed, self.num_prefetched)
                planned = self._mark()
        self._page(layer, ids, num_active, of_prompts, first=True)
        with _beside(self._fetches):  # behind the copies for this layer that are still under way
            self._is_behind = False
            self._fetch(layer, scratch)
            fetched = self._mark()
            if guess is not None:
                _wait(planned)
                self._fetch(layer + 1, guessed)
                self._planned, self._guess, self._prefetched = planned, guess, self._mark()
        _wait(arriving)
        yield scratch.hits(min(most, self.num_slots))
        _wait(fetched)
        yield scratch.misses(min(most, self.num_slots))
        for _ in range(self._num_more_waves(most)):
            self._page(layer, ids, num_active, of_prompts, first=False)
            self._fetch(layer, scratch)
            yield scratch.misses(min(most, self.num_slots))

    def _num_more_waves(self, most: int) -> int:
        """After the first, which holds whatever is needed and pinned; each of the others leaves pinned slots alone."""
        size = self.num_slots - self.num_pinned
        return int(triton.cdiv(max(0, min(most, self.num_experts - self.num_pinned) - size), size))

    def _pinned(self, layer: int) -> Tensor | None:
        return self.state.pinned[layer] if self.num_pinned else None

    def prefetch_used(self, layer: int, expert_ids: Sequence[int]) -> None:
        """Between two layers of a prompt: have experts that a coming layer is predicted to use copied beside the compute."""
        if self.holds_all or not expert_ids:
            return
        # Layers before have made the copies wait for all earlier reads of any slot; their own compute, they need not.
        with _beside(self._fetches, after_queued=self._is_behind):
            self._is_behind = False
            _wait(self._ahead.get(layer))
            ids, scratch = self._uploaded(expert_ids), self._table_scratch
            self._plan_used(layer, ids, self.num_slots, _TABLES, scratch, self.num_prefetched)
            self._planned = self._mark()
            self._fetch(layer, scratch)
            self._prefetched = self._mark()

    def prefetch_ahead(self, layer: int, expert_ids: Sequence[int]) -> None:
        """Once a layer of a prompt is queued: have experts that the next pass is predicted to use there copied beside the
        rest of this pass, none of whose layers waits for them (SiDA-MoE, section 3.4).
        """
        if self.holds_all or not expert_ids:
            return
        with _beside(self._aheads):
            ids, scratch = self._uploaded(expert_ids), self._ahead_scratch
            count = self._num_ahead[layer : layer + 1]
            self._plan_used(layer, ids, self.num_slots, _TABLES, scratch, count)
            self._fetch(layer, scratch)
            self._ahead[layer] = self._mark()

    def _uploaded(self, expert_ids: Sequence[int]) -> Tensor:
        """On the current stream."""
        ids = torch.tensor(expert_ids, dtype=torch.int32)
        if self._fetches is not None:
            ids = ids.pin_memory()
        return ids.to(self.state.step.device, non_blocking=True)

    def _all_resident(self, layer: int, ids: Tensor, num_active: Tensor, most: int, of_prompts: bool) -> Wave:
        scratch, (rows, top_k) = self._scratch, ids.shape
        list_kernel[(1,)](
            ids, num_active, self.state.counters[layer],
            scratch.hit_experts, scratch.num_hits,
            TOP_K=top_k, NUM_EXPERTS=self.num_experts, EXPERTS_P=_padded(self.num_experts),
            PAIRS=PAIRS_AT_ONCE if of_prompts else _padded(rows * top_k), **chained(ids.device),
        )  # fmt: skip
        return Wave(scratch.hit_experts, scratch.hit_experts, scratch.num_hits, scratch.identity, most)

    def _page(self, layer: int, ids: Tensor, num_active: Tensor, of_prompts: bool, first: bool) -> None:
        state, scratch, (rows, top_k) = self.state, self._scratch, ids.shape
        slots_p, experts_p = _padded(self.num_slots), _padded(self.num_experts)
        page_kernel[(1,)](
            ids, num_active, state.slot_of[layer], state.expert_in[layer],
            state.stamps[layer], state.heat[layer], state.unused[layer], self._pinned(layer), state.step,
            state.counters[layer], None if of_prompts else self.row_missed,
            scratch.done, scratch.needed, scratch.keys, scratch.order,
            scratch.hit_slots, scratch.hit_experts, scratch.num_hits, scratch.hit_map,
            scratch.miss_slots, scratch.miss_experts, scratch.num_misses, scratch.miss_map,
            FIRST=first, STAMP_USE=self._order.stamp_use, BY_HEAT=self._order.by_heat, HALF_LIFE=HALF_LIFE_PASSES,
            TOP_K=top_k, NUM_EXPERTS=self.num_experts,
            NUM_SLOTS=self.num_slots, ROWS_P=1 if of_prompts else _padded(rows), TOP_K_P=_padded(top_k), EXPERTS_P=experts_p,
            SLOTS_P=slots_p, COUNTERS=NUM_COUNTERS, PAIRS=PAIRS_AT_ONCE if of_prompts else _padded(rows * top_k),
            num_warps=4 if slots_p <= 128 else 8, **chained(ids.device),
        )  # fmt: skip

    def _plan_likeliest(
        self, layer: int, scores: Tensor, num_active: Tensor, top_k: int, scratch: "_Scratch"
    ) -> None:
        state = self.state
        assert scores.stride(1) == 1
        prefetch_kernel[(1,)](
            scores, num_active, self.prefetch_budget[layer],
            state.slot_of[layer], state.expert_in[layer], state.stamps[layer], state.heat[layer], state.unused[layer],
            self._pinned(layer), state.step, state.counters[layer],
            scratch.needed, scratch.keys, scratch.miss_slots, scratch.miss_experts, scratch.num_misses,
            SCORES_STRIDE=scores.stride(0), MOST=MAX_PREFETCHED, ASKER=_GUESSES, STAMP_USE=self._order.stamp_use,
            BY_HEAT=self._order.by_heat, HALF_LIFE=HALF_LIFE_PASSES, TOP_K=top_k, NUM_EXPERTS=self.num_experts,
            NUM_SLOTS=self.num_slots, ROWS=len(scores), EXPERTS_P=_padded(self.num_experts),
            SLOTS_P=_padded(self.num_slots), COUNTERS=NUM_COUNTERS,
        )  # fmt: skip

    def _plan_used(
        self, layer: int, ids: Tensor, budget: int, asker: int, scratch: "_Scratch", count: Tensor
    ) -> None:
        state = self.state
        prefetch_used_kernel[(1,)](
            ids, ids.numel(), budget,
            state.slot_of[layer], state.expert_in[layer], state.stamps[layer], state.heat[layer], state.unused[layer],
            self._pinned(layer), state.step, state.counters[layer], count,
            scratch.needed, scratch.keys, scratch.order, scratch.miss_slots, scratch.miss_experts, scratch.num_misses,
            BY_HEAT=self._order.by_heat, HALF_LIFE=HALF_LIFE_PASSES, NUM_EXPERTS=self.num_experts,
            NUM_SLOTS=self.num_slots, EXPERTS_P=_padded(self.num_experts), SLOTS_P=_padded(self.num_slots),
            COUNTERS=NUM_COUNTERS, PAIRS=PAIRS_AT_ONCE, ASKER=asker,
        )  # fmt: skip

    def _fetch(self, layer: int, scratch: "_Scratch") -> None:
        target, stored = self._pools[layer].elements, self.source.layout
        if stored.dtype == target.dtype:
            target = target.view(torch.int64)
        stored_type = getattr(tl, str(target.dtype if target.dtype == torch.int64 else stored.dtype)[6:])
        fetch_kernel[(_FETCH_PROGRAMS,)](
            scratch.num_misses, scratch.miss_slots, scratch.miss_experts, self._addresses[layer], target,
            SLAB_ELEMENTS=target.shape[1], BLOCK=_FETCH_BYTES // target.element_size(), PROGRAMS=_FETCH_PROGRAMS,
            STORED=stored_type, num_warps=8,
        )  # fmt: skip

    def _mark(self) -> torch.cuda.Event | None:
        """What is queued on the current stream so far."""
        if self._fetches is None:
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
        self.keys, self.order = integers(num_experts, torch.int64), integers(num_slots)
        self.hit_slots, self.hit_experts, self.hit_map = (integers(num_experts) for _ in range(3))
        self.miss_slots, self.miss_experts, self.miss_map = (integers(num_experts) for _ in range(3))
        self.num_hits, self.num_misses = integers(1), integers(1)
        self.identity = torch.arange(num_experts, dtype=torch.int32, device=device)

    def hits(self, most: int) -> Wave:
        return Wave(self.hit_slots, self.hit_experts, self.num_hits, self.hit_map, most)

    def misses(self, most: int) -> Wave:
        return Wave(self.miss_slots, self.miss_experts, self.num_misses, self.miss_map, most)


def _stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream | None:
    """None where everything runs in the order in which it is queued."""
    return torch.cuda.Stream(device, priority=priority) if device.type == "cuda" else None


@contextmanager
def _beside(stream: torch.cuda.Stream | None, after_queued: bool = True) -> Iterator[None]:
    """The body on another stream, after what is queued on the current one or beside it."""
    if stream is None:
        yield
        return
    if after_queued:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


def _wait(event: torch.cuda.Event | None) -> None:
    """Have what is queued on the current stream from now on wait for it."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def _padded(size: int) -> int:
    """The power of two that kernels pad a dimension to."""
    return int(triton.next_power_of_2(size))
