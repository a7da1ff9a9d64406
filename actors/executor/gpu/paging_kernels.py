"""Triton kernels of device-side paging: which experts a step lacks, which slots they get, and their copy.

`page_kernel` is one program that does one layer's bookkeeping, so nothing needs an atomic; `fetch_kernel` spreads the
copies over a few programs and reads experts from any memory that the device can address. Launch code and the page tables
are `DevicePager`'s.
"""

import triton
import triton.language as tl

from actors.executor.gpu.chained_launch import wait_for_previous

_MAX_EXPERTS = tl.constexpr(4096)  # of a layer; scales stamps so that expert ids break ties
_FREE = tl.constexpr(-(1 << 40))
_LAST = tl.constexpr(1 << 61)
_FRESH = tl.constexpr(1 << 60)  # after all others that may be evicted
_RANKED_AT_ONCE = tl.constexpr(16)


@triton.jit  # type: ignore[untyped-decorator]
def _heat_now(heat, stamps, step, HALF_LIFE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Heat was valid at its stamp, and halves every HALF_LIFE steps."""
    return heat * tl.exp2((stamps - step).to(tl.float32) / HALF_LIFE)


@triton.jit  # type: ignore[untyped-decorator]
def _ranks(keys, keys_ptr, NUM: tl.constexpr, NUM_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Place of each key, distinct ones, in rising order. Args: keys_ptr: where they have been stored."""
    ranks = tl.zeros((NUM_P,), tl.int32)
    for start in tl.static_range(0, NUM_P, _RANKED_AT_ONCE):
        others = start + tl.arange(0, _RANKED_AT_ONCE)
        other_keys = tl.load(keys_ptr + others, mask=others < NUM, other=2 * _LAST)
        ranks += tl.sum((keys[:, None] > other_keys[None, :]).to(tl.int32), axis=1)
    return ranks


@triton.jit  # type: ignore[untyped-decorator]
def _victim_ranks(  # type: ignore[no-untyped-def]
    value,
    is_occupied,
    expert_in,
    in_need,
    is_fresh,
    slots,
    keys_ptr,
    NUM_SLOTS: tl.constexpr,
    SLOTS_P: tl.constexpr,
):
    """Place of each slot in the order of eviction: free ones, then the lowest value, then the lowest expert id.

    What was prefetched in this very step comes after all others, and last are slots whose expert the step needs: there
    are never more misses than other slots.
    """
    slots_64 = slots.to(tl.int64)
    keys = tl.where(is_occupied, value * _MAX_EXPERTS + expert_in, slots_64 + _FREE)
    keys = tl.where(is_fresh, slots_64 + _FRESH, keys)
    keys = tl.where(in_need, slots_64 + _LAST, keys)
    tl.store(keys_ptr + slots, keys, mask=slots < NUM_SLOTS)
    tl.debug_barrier()
    return _ranks(keys, keys_ptr, NUM_SLOTS, SLOTS_P)


@triton.jit
def _packed(asker):  # type: ignore[no-untyped-def]
    """One copy of an asker's: 16 bits of the sum are each asker's count. Args: asker: 0 to 3."""
    return (asker.to(tl.int64) * 0 + 1) << (asker.to(tl.int64) * 16)


@triton.jit
def _by_asker(chosen, unused):  # type: ignore[no-untyped-def]
    """Packed counts of those chosen that nothing has needed since they were prefetched. Args: unused: 0, or 1 + asker."""
    return tl.sum(tl.where(chosen & (unused > 0), _packed(tl.maximum(unused - 1, 0)), 0), axis=0)


@triton.jit
def _asker_columns(column, used, wasted):  # type: ignore[no-untyped-def]
    """What packed counts add to the counters: to columns 5, 8, ... the used, to 6, 9, ... the wasted."""
    asker, kind = (tl.maximum(column, 4) - 4) // 3, (tl.maximum(column, 4) - 4) % 3
    packed = tl.where(kind == 1, used, tl.where(kind == 2, wasted, 0))
    return (packed >> (asker.to(tl.int64) * 16)) & 0xFFFF


@triton.jit  # type: ignore[untyped-decorator]
def _uses(  # type: ignore[no-untyped-def]
    ids_ptr,
    first,
    end,
    EXPERTS_P: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """[EXPERTS_P] how many of the pairs from `first` to before `end` chose each expert.

    In one dimension from the start: flattening may reorder a block's elements, and a mask's differently.
    """
    uses = tl.zeros((EXPERTS_P,), tl.int32)
    for start in range(first, end, PAIRS):
        pairs = start + tl.arange(0, PAIRS)
        ids = tl.load(ids_ptr + pairs, mask=pairs < end, other=0).to(tl.int32)
        uses += tl.histogram(ids, EXPERTS_P, mask=pairs < end)
    return uses


@triton.jit  # type: ignore[untyped-decorator]
def _count_missed_pairs(  # type: ignore[no-untyped-def]
    ids_ptr,
    num_active,
    slot_of_ptr,
    row_missed_ptr,
    TOP_K: tl.constexpr,
    ROWS_P: tl.constexpr,
    TOP_K_P: tl.constexpr,
):
    """Add to each active row how many of its experts are absent."""
    rows, choices = tl.arange(0, ROWS_P), tl.arange(0, TOP_K_P)
    active = (rows < num_active)[:, None] & (choices < TOP_K)[None, :]
    ids = tl.load(ids_ptr + rows[:, None] * TOP_K + choices[None, :], mask=active, other=0)
    absent = tl.load(slot_of_ptr + ids, mask=active, other=0) < 0
    before = tl.load(row_missed_ptr + rows, mask=rows < num_active, other=0)
    tl.store(row_missed_ptr + rows, before + tl.sum(absent.to(tl.int32), axis=1), mask=rows < num_active)


@triton.jit  # type: ignore[untyped-decorator]
def page_kernel(  # type: ignore[no-untyped-def]
    ids_ptr,  # [rows, top_k] integers
    num_active_ptr,  # int32: rows beyond are padding and need nothing
    slot_of_ptr, expert_in_ptr,  # int32 [experts], [slots]; -1: absent, free
    stamps_ptr, heat_ptr,  # int64, float32 [experts]: step of the last use or copy; uses, the older the less they count
    unused_ptr,  # int8 [experts]: prefetched, and not needed since: 1 + who asked for it
    pinned_ptr,  # int8 [experts]: no victims; None: all may be
    step_ptr,  # int64
    counters_ptr,  # int64 [COUNTERS], columns in the order of page_state
    row_missed_ptr,  # int32 [rows] or None
    done_ptr,  # int8 [experts]: needed by this step and served by an earlier wave
    needed_ptr, keys_ptr, order_ptr,  # scratch: int8 [experts], int64 [slots], int32 [slots]
    hit_slots_ptr, hit_experts_ptr, num_hits_ptr, hit_map_ptr,  # what can be computed at once
    miss_slots_ptr, miss_experts_ptr, num_misses_ptr, miss_map_ptr,  # what is to be copied, then computed
    FIRST: tl.constexpr, STAMP_USE: tl.constexpr, BY_HEAT: tl.constexpr, HALF_LIFE: tl.constexpr, TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    NUM_SLOTS: tl.constexpr, ROWS_P: tl.constexpr, TOP_K_P: tl.constexpr, EXPERTS_P: tl.constexpr,
    SLOTS_P: tl.constexpr, COUNTERS: tl.constexpr, PAIRS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One wave of one layer. The first wave serves what is resident and as many misses as other slots can take; each
    later wave serves what is left, in slots whose experts this step no longer needs. Names with _P are padded to powers
    of two.
    """
    wait_for_previous(CHAINED)
    experts, slots = tl.arange(0, EXPERTS_P), tl.arange(0, SLOTS_P)
    is_expert = experts < NUM_EXPERTS
    step, num_active = tl.load(step_ptr), tl.load(num_active_ptr)
    needed = (_uses(ids_ptr, 0, num_active * TOP_K, EXPERTS_P, PAIRS) > 0) & is_expert
    slot_of = tl.load(slot_of_ptr + experts, mask=is_expert, other=-1)
    unused = tl.load(unused_ptr + experts, mask=is_expert, other=0)
    expert_in = tl.load(expert_in_ptr + slots, mask=slots < NUM_SLOTS, other=-1)
    is_occupied = expert_in >= 0
    stamps = tl.load(stamps_ptr + expert_in, mask=is_occupied, other=0)  # [slots]
    slot_unused = tl.load(unused_ptr + expert_in, mask=is_occupied, other=0)
    expert_stamps = tl.load(stamps_ptr + experts, mask=is_expert, other=0)
    heat = tl.load(heat_ptr + experts, mask=is_expert, other=0.0)
    heat = _heat_now(heat, expert_stamps, step, HALF_LIFE)
    if BY_HEAT:
        slot_heat = tl.load(heat_ptr + expert_in, mask=is_occupied, other=0.0)
        slot_heat = _heat_now(slot_heat, stamps, step, HALF_LIFE)
        value = slot_heat.to(tl.int32, bitcast=True).to(tl.int64)  # floats from 0 up sort like their bits
    else:
        value = stamps
    if FIRST:
        if row_missed_ptr is not None:
            _count_missed_pairs(ids_ptr, num_active, slot_of_ptr, row_missed_ptr, TOP_K, ROWS_P, TOP_K_P)
    else:
        needed = needed & (tl.load(done_ptr + experts, mask=is_expert, other=1) == 0)

    tl.store(needed_ptr + experts, needed.to(tl.int8), mask=is_expert)
    hit, miss = needed & (slot_of >= 0), needed & (slot_of < 0)
    num_hits, num_absent = tl.sum(hit.to(tl.int32), axis=0), tl.sum(miss.to(tl.int32), axis=0)
    num_takeable = NUM_SLOTS - num_hits
    if pinned_ptr is not None:
        is_pinned = tl.load(pinned_ptr + experts, mask=is_expert, other=0) != 0
        num_takeable -= tl.sum((is_pinned & (slot_of >= 0) & (hit == 0)).to(tl.int32), axis=0)
    num_misses = tl.minimum(num_absent, num_takeable)
    place = tl.cumsum(miss.to(tl.int32), axis=0) - 1  # [experts], among the misses
    assigned = miss & (place < num_misses)
    tl.store(miss_experts_ptr + place, experts, mask=assigned)
    tl.debug_barrier()
    in_need = tl.load(needed_ptr + expert_in, mask=is_occupied, other=0) != 0
    if pinned_ptr is not None:
        in_need = in_need | (tl.load(pinned_ptr + expert_in, mask=is_occupied, other=0) != 0)
    is_fresh = is_occupied & (slot_unused != 0) & (stamps == step)
    rank = _victim_ranks(
        value, is_occupied, expert_in, in_need, is_fresh, slots, keys_ptr, NUM_SLOTS, SLOTS_P
    )
    tl.store(order_ptr + rank, slots, mask=slots < NUM_SLOTS)
    is_victim = (rank < num_misses) & (slots < NUM_SLOTS)
    evicted = is_victim & is_occupied
    new_expert = tl.load(miss_experts_ptr + rank, mask=is_victim, other=0)  # [slots]

    tl.debug_barrier()  # all of the above is read before the page table is written
    new_slot = tl.load(order_ptr + place, mask=assigned, other=0)  # [experts]
    tl.store(slot_of_ptr + expert_in, -1, mask=evicted)
    tl.store(unused_ptr + expert_in, 0, mask=evicted)
    tl.store(unused_ptr + experts, 0, mask=hit)
    tl.store(slot_of_ptr + experts, new_slot, mask=assigned)
    tl.store(expert_in_ptr + slots, new_expert, mask=is_victim)
    tl.store(heat_ptr + experts, heat + 1.0, mask=(hit | assigned) & STAMP_USE)
    tl.store(stamps_ptr + experts, step, mask=(hit | assigned) if STAMP_USE else assigned)
    tl.store(miss_slots_ptr + place, new_slot, mask=assigned)
    tl.store(miss_map_ptr + experts, tl.where(assigned, new_slot, -1), mask=is_expert)
    tl.store(num_misses_ptr, num_misses)
    column = tl.arange(0, COUNTERS)
    gained = tl.where(column == 2, num_misses, 0)
    gained += tl.where(column == 3, tl.sum(evicted.to(tl.int32), axis=0), 0)
    used = step * 0
    if FIRST:
        used = _by_asker(hit, unused)
        hit_place = tl.cumsum(hit.to(tl.int32), axis=0) - 1
        tl.store(hit_slots_ptr + hit_place, slot_of, mask=hit)
        tl.store(hit_experts_ptr + hit_place, experts, mask=hit)
        tl.store(hit_map_ptr + experts, tl.where(hit, slot_of, -1), mask=is_expert)
        tl.store(num_hits_ptr, num_hits)
        tl.store(done_ptr + experts, (hit | assigned).to(tl.int8), mask=is_expert)
        gained += tl.where(column == 0, num_hits, 0) + tl.where(column == 1, num_absent, 0)
    else:
        tl.store(done_ptr + experts, 1, mask=assigned)
    gained += _asker_columns(column, used, _by_asker(evicted, slot_unused))
    tl.store(counters_ptr + column, tl.load(counters_ptr + column) + gained)


@triton.jit  # type: ignore[untyped-decorator]
def prefetch_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,  # [rows, NUM_EXPERTS], SCORES_STRIDE apart: what the layer's router says of an earlier hidden state
    num_active_ptr, budget_ptr,  # int32: rows beyond are padding; experts to prefetch at most
    slot_of_ptr, expert_in_ptr, stamps_ptr, heat_ptr, unused_ptr, pinned_ptr, step_ptr, counters_ptr,  # as in `page_kernel`
    needed_ptr, keys_ptr,  # scratch: int8 [experts], int64 [slots]
    new_slots_ptr, new_experts_ptr, num_new_ptr,  # what is to be copied
    SCORES_STRIDE: tl.constexpr, MOST: tl.constexpr, ASKER: tl.constexpr, STAMP_USE: tl.constexpr, BY_HEAT: tl.constexpr,
    HALF_LIFE: tl.constexpr, TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, NUM_SLOTS: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS_P: tl.constexpr, SLOTS_P: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """Give slots to the likeliest absent experts among every row's TOP_K, before their layer's own router decides.

    What a row is predicted to use and is resident is no victim. At most MOST, and TOP_K * rows must leave that many slots
    beside pinned ones.
    """
    experts, slots = tl.arange(0, EXPERTS_P), tl.arange(0, SLOTS_P)
    is_expert = experts < NUM_EXPERTS
    num_active, step = tl.load(num_active_ptr), tl.load(step_ptr)
    best = tl.full((EXPERTS_P,), float("-inf"), tl.float32)  # the highest score relative to a row's maximum
    for row in tl.static_range(ROWS):
        scores = tl.load(scores_ptr + row * SCORES_STRIDE + experts, mask=is_expert, other=float("-inf")).to(
            tl.float32
        )
        left = scores - tl.max(scores, axis=0)
        for _ in tl.static_range(TOP_K):
            highest = tl.max(left, axis=0)
            chosen = (left == highest) & (row < num_active) & is_expert
            best = tl.where(chosen, tl.maximum(best, highest), best)
            left = tl.where(left == highest, float("-inf"), left)
    slot_of = tl.load(slot_of_ptr + experts, mask=is_expert, other=0)
    expert_in = tl.load(expert_in_ptr + slots, mask=slots < NUM_SLOTS, other=-1)
    is_occupied = expert_in >= 0
    stamps = tl.load(stamps_ptr + expert_in, mask=is_occupied, other=0)
    if BY_HEAT:
        slot_heat = tl.load(heat_ptr + expert_in, mask=is_occupied, other=0.0)
        value = _heat_now(slot_heat, stamps, step, HALF_LIFE).to(tl.int32, bitcast=True).to(tl.int64)
    else:
        value = stamps
    tl.store(needed_ptr + experts, (best > float("-inf")).to(tl.int8), mask=is_expert)
    tl.debug_barrier()
    in_need = tl.load(needed_ptr + expert_in, mask=is_occupied, other=0) != 0
    if pinned_ptr is not None:
        in_need = in_need | (tl.load(pinned_ptr + expert_in, mask=is_occupied, other=0) != 0)
    rank = _victim_ranks(
        value, is_occupied, expert_in, in_need, slots < 0, slots, keys_ptr, NUM_SLOTS, SLOTS_P
    )
    budget = tl.load(budget_ptr)
    wanted = tl.where(slot_of < 0, best, float("-inf"))
    num_new = 0
    num_evicted = 0
    wasted = step * 0
    for place in tl.static_range(MOST):
        highest = tl.max(wanted, axis=0)
        expert = tl.min(tl.where(wanted == highest, experts, EXPERTS_P), axis=0)
        if (highest > float("-inf")) & (place < budget):
            slot = tl.min(tl.where(rank == place, slots, SLOTS_P), axis=0)
            old = tl.load(expert_in_ptr + slot)
            if old >= 0:
                tl.store(slot_of_ptr + old, -1)
                unused = tl.load(unused_ptr + old)
                wasted += tl.where(unused > 0, _packed(tl.maximum(unused - 1, 0)), 0)
                tl.store(unused_ptr + old, 0)
                num_evicted += 1
            heat = tl.load(heat_ptr + expert)
            tl.store(heat_ptr + expert, _heat_now(heat, tl.load(stamps_ptr + expert), step, HALF_LIFE))
            tl.store(stamps_ptr + expert, step)
            tl.store(unused_ptr + expert, 1 + ASKER)
            tl.store(slot_of_ptr + expert, slot)
            tl.store(expert_in_ptr + slot, expert)
            tl.store(new_slots_ptr + place, slot)
            tl.store(new_experts_ptr + place, expert)
            num_new += 1
        wanted = tl.where(experts == expert, float("-inf"), wanted)
    tl.store(num_new_ptr, num_new)
    column = tl.arange(0, COUNTERS)
    gained = tl.where(column == 3, num_evicted, 0) + tl.where(column == 4 + 3 * ASKER, num_new, 0)
    gained += _asker_columns(column, 0, wasted)
    tl.store(counters_ptr + column, tl.load(counters_ptr + column) + gained)


@triton.jit(do_not_specialize=["num_ids", "budget"])  # type: ignore[untyped-decorator]
def prefetch_used_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, num_ids,  # expert ids, those of many tokens or each once
    budget,  # experts to prefetch at most
    slot_of_ptr, expert_in_ptr, stamps_ptr, heat_ptr, unused_ptr, pinned_ptr, step_ptr, counters_ptr,  # as in `page_kernel`
    num_prefetched_ptr,  # int64, added to
    needed_ptr, keys_ptr, order_ptr,  # scratch: int8 [experts], int64 [experts], int32 [slots]
    new_slots_ptr, new_experts_ptr, num_new_ptr,  # what is to be copied
    BY_HEAT: tl.constexpr, HALF_LIFE: tl.constexpr, NUM_EXPERTS: tl.constexpr, NUM_SLOTS: tl.constexpr,
    EXPERTS_P: tl.constexpr, SLOTS_P: tl.constexpr, COUNTERS: tl.constexpr, PAIRS: tl.constexpr, ASKER: tl.constexpr,
):  # fmt: skip
    """Give slots to absent experts that a layer is predicted to use, those of the most tokens first.

    Neither a resident expert that is predicted or pinned nor one prefetched in this very step is a victim.
    """
    experts, slots = tl.arange(0, EXPERTS_P), tl.arange(0, SLOTS_P)
    is_expert, is_slot = experts < NUM_EXPERTS, slots < NUM_SLOTS
    step = tl.load(step_ptr)
    uses = tl.where(is_expert, _uses(ids_ptr, 0, num_ids, EXPERTS_P, PAIRS), 0)
    slot_of = tl.load(slot_of_ptr + experts, mask=is_expert, other=0)
    wanted = (uses > 0) & (slot_of < 0)
    tl.store(needed_ptr + experts, (uses > 0).to(tl.int8), mask=is_expert)
    experts_64 = experts.to(tl.int64)
    wanted_keys = tl.where(wanted, experts_64 - uses.to(tl.int64) * _MAX_EXPERTS, experts_64 + _LAST)
    tl.store(keys_ptr + experts, wanted_keys, mask=is_expert)
    tl.debug_barrier()
    place = _ranks(wanted_keys, keys_ptr, NUM_EXPERTS, EXPERTS_P)  # [experts]
    expert_in = tl.load(expert_in_ptr + slots, mask=is_slot, other=-1)
    is_occupied = expert_in >= 0
    stamps = tl.load(stamps_ptr + expert_in, mask=is_occupied, other=0)
    slot_unused = tl.load(unused_ptr + expert_in, mask=is_occupied, other=0)
    in_need = tl.load(needed_ptr + expert_in, mask=is_occupied, other=0) != 0
    if pinned_ptr is not None:
        in_need = in_need | (tl.load(pinned_ptr + expert_in, mask=is_occupied, other=0) != 0)
    is_fresh = is_occupied & (slot_unused != 0) & (stamps == step)
    if BY_HEAT:
        slot_heat = tl.load(heat_ptr + expert_in, mask=is_occupied, other=0.0)
        value = _heat_now(slot_heat, stamps, step, HALF_LIFE).to(tl.int32, bitcast=True).to(tl.int64)
    else:
        value = stamps
    tl.debug_barrier()
    rank = _victim_ranks(
        value, is_occupied, expert_in, in_need, is_fresh, slots, keys_ptr, NUM_SLOTS, SLOTS_P
    )
    num_free = tl.sum((is_slot & (in_need == 0) & (is_fresh == 0)).to(tl.int32), axis=0)
    num_new = tl.minimum(tl.minimum(tl.sum(wanted.to(tl.int32), axis=0), budget), num_free)
    assigned = wanted & (place < num_new)
    tl.store(order_ptr + rank, slots, mask=is_slot)
    tl.store(new_experts_ptr + place, experts, mask=assigned)
    heat = tl.load(heat_ptr + experts, mask=is_expert, other=0.0)
    heat = _heat_now(heat, tl.load(stamps_ptr + experts, mask=is_expert, other=0), step, HALF_LIFE)
    tl.debug_barrier()
    is_victim = is_slot & (rank < num_new)
    evicted = is_victim & is_occupied
    new_expert = tl.load(new_experts_ptr + rank, mask=is_victim, other=0)  # [slots]
    new_slot = tl.load(order_ptr + place, mask=assigned, other=0)  # [experts]
    tl.store(slot_of_ptr + expert_in, -1, mask=evicted)
    tl.store(unused_ptr + expert_in, 0, mask=evicted)
    tl.store(slot_of_ptr + experts, new_slot, mask=assigned)
    tl.store(expert_in_ptr + slots, new_expert, mask=is_victim)
    tl.store(heat_ptr + experts, heat, mask=assigned)
    tl.store(stamps_ptr + experts, step, mask=assigned)
    tl.store(unused_ptr + experts, 1 + ASKER, mask=assigned)
    tl.store(new_slots_ptr + place, new_slot, mask=assigned)
    tl.store(num_new_ptr, num_new)
    tl.store(num_prefetched_ptr, tl.load(num_prefetched_ptr) + num_new)
    column = tl.arange(0, COUNTERS)
    gained = tl.where(column == 3, tl.sum(evicted.to(tl.int32), axis=0), 0)
    gained += tl.where(column == 4 + 3 * ASKER, num_new, 0)
    gained += _asker_columns(column, 0, _by_asker(evicted, slot_unused))
    tl.store(counters_ptr + column, tl.load(counters_ptr + column) + gained)


@triton.jit  # type: ignore[untyped-decorator]
def count_kernel(  # type: ignore[no-untyped-def]
    ids_ptr,  # [tokens, TOP_K] integers
    starts_ptr,  # int32 [chunks + 1]: first token of each chunk
    slot_of_ptr,  # int32 [experts]
    needed_ptr, missed_ptr,  # int64 [chunks], added to
    TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, EXPERTS_P: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """How many distinct experts each prompt chunk needs of a layer, and how many of them are absent."""
    chunk = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_P)
    first, end = tl.load(starts_ptr + chunk) * TOP_K, tl.load(starts_ptr + chunk + 1) * TOP_K
    is_needed = (_uses(ids_ptr, first, end, EXPERTS_P, PAIRS) > 0) & (experts < NUM_EXPERTS)
    is_absent = tl.load(slot_of_ptr + experts, mask=is_needed, other=0) < 0
    tl.store(needed_ptr + chunk, tl.load(needed_ptr + chunk) + tl.sum(is_needed.to(tl.int32), axis=0))
    tl.store(missed_ptr + chunk, tl.load(missed_ptr + chunk) + tl.sum(is_absent.to(tl.int32), axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def fetch_kernel(  # type: ignore[no-untyped-def]
    num_ptr, slots_ptr, experts_ptr,  # the copies of a wave, as `page_kernel` lists them
    addresses_ptr,  # int64 [experts]: where each expert's stored slab begins
    slabs_ptr,  # [slots, SLAB_ELEMENTS] of the slots' element type
    SLAB_ELEMENTS: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Copy experts into their slots, converting from the stored element type. The one place that knows both forms."""
    chunks: tl.constexpr = (SLAB_ELEMENTS + BLOCK - 1) // BLOCK
    itemsize: tl.constexpr = STORED.primitive_bitwidth // 8
    lanes = tl.arange(0, BLOCK)
    for index in range(tl.program_id(0), tl.load(num_ptr) * chunks, PROGRAMS):
        entry = index // chunks
        offsets = (index % chunks) * BLOCK + lanes
        # As a distance from the slabs, so that the compiler knows its alignment and reads 16 bytes at once.
        distance = tl.load(addresses_ptr + tl.load(experts_ptr + entry)) - slabs_ptr.to(tl.int64)
        distance = tl.multiple_of(distance // itemsize, 16 // itemsize)
        source = slabs_ptr.to(tl.pointer_type(STORED)) + distance
        target = slabs_ptr + tl.load(slots_ptr + entry).to(tl.int64) * SLAB_ELEMENTS
        values = tl.load(source + offsets, mask=offsets < SLAB_ELEMENTS)
        tl.store(target + offsets, values.to(slabs_ptr.dtype.element_ty), mask=offsets < SLAB_ELEMENTS)


@triton.jit  # type: ignore[untyped-decorator]
def list_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, num_active_ptr, counters_ptr,  # as in `page_kernel`
    experts_ptr, num_ptr,
    TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, EXPERTS_P: tl.constexpr, PAIRS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The distinct experts of a step, where all are resident."""
    wait_for_previous(CHAINED)
    experts = tl.arange(0, EXPERTS_P)
    needed = _uses(ids_ptr, 0, tl.load(num_active_ptr) * TOP_K, EXPERTS_P, PAIRS) > 0
    needed = needed & (experts < NUM_EXPERTS)
    count = tl.sum(needed.to(tl.int32), axis=0)
    tl.store(experts_ptr + tl.cumsum(needed.to(tl.int32), axis=0) - 1, experts, mask=needed)
    tl.store(num_ptr, count)
    tl.store(counters_ptr, tl.load(counters_ptr) + count)
