"""Paging by the device alone, against the host's pager: the same page tables, and every pair computed with its expert."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.gpu.host_experts import HostExperts
from actors.executor.gpu.pager import DevicePager, Wave
from actors.executor.host_pager import HostPager
from actors.executor.pager import ABSENT, HASH_FUNCTION, NEXT_GATE, WARM_UP, PrefetchCounts
from actors.executor.resident_set import load_pinned
from actors.executor.slots import SlotPool
from tests.actors.executor.test_pager import LAYOUT, NUM_EXPERTS, NUM_LAYERS, NumberedSource, numbered_slabs

TOP_K = 2


def make_pools(num_slots: int, device: str) -> list[SlotPool]:
    return [SlotPool(LAYOUT, num_slots, torch.device(device)) for _ in range(NUM_LAYERS)]


def make_device_pager(
    num_slots: int, eviction: str, device: str, pinned: Sequence[Sequence[int]] = ()
) -> DevicePager:
    source, pools = NumberedSource(), make_pools(num_slots, device)
    experts = HostExperts(source, NUM_LAYERS, NUM_EXPERTS, torch.device(device))
    return DevicePager(source, pools, NUM_EXPERTS, experts, eviction, poison_free_slots=True, pinned=pinned)


def numbers_in(pager: DevicePager, layer: int, wave: Wave) -> dict[int, float]:
    """What the slots of a wave hold, by expert id."""
    count = int(wave.num)
    values = pager._pools[layer].views["down_proj"][wave.slots[:count].long()].flatten(1)
    assert (values == values[:, :1]).all()
    return dict(zip(wave.experts[:count].tolist(), values[:, 0].tolist(), strict=True))


def page(
    pager: DevicePager, layer: int, ids: Tensor, num_active: int | None = None
) -> list[dict[int, float]]:
    """One pass over one layer. Returns: per wave, what was in its slots while it could be computed."""
    device = pager.state.step.device
    pager.begin_pass()
    active = torch.tensor([len(ids) if num_active is None else num_active], dtype=torch.int32, device=device)
    return [numbers_in(pager, layer, wave) for wave in pager.waves(layer, ids.to(device), active)]


def pairs(num_rows: int) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=TOP_K, max_size=TOP_K, unique=True)
    return st.lists(row, min_size=num_rows, max_size=num_rows)


steps = st.lists(st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(1, 3).flatmap(pairs)), max_size=15)


@given(steps=steps, num_slots=st.integers(2, NUM_EXPERTS - 1), eviction=st.sampled_from(["lru", "fifo"]))
@settings(deadline=None, max_examples=30)
def test_device_pages_as_the_host_does(
    device: str, steps: list[tuple[int, list[list[int]]]], num_slots: int, eviction: str
) -> None:
    pager = make_device_pager(num_slots, eviction, device)
    reference = HostPager(
        NumberedSource(),
        make_pools(num_slots, "cpu"),
        NUM_EXPERTS,
        EVICTION_POLICIES[eviction],
        torch.device("cpu"),
    )
    for layer, rows in steps:
        needed = sorted({expert_id for row in rows for expert_id in row})
        served: dict[int, float] = {}
        for wave in page(pager, layer, torch.tensor(rows)):
            assert not served.keys() & wave.keys(), "an expert in two waves"
            served |= wave
        assert served == {expert_id: 10 * layer + expert_id for expert_id in needed}
        if len(needed) > num_slots:
            return  # the host parts them into other waves
        with reference.reading(layer, needed):
            pass
        assert torch.equal(residents(pager.state.slot_of), residents(reference.page_table))
    refresh(pager)
    for layer in range(NUM_LAYERS):
        assert pager.counters(layer) == reference.counters(layer)


def refresh(pager: DevicePager) -> None:
    pager.refresh()
    if pager.state.step.is_cuda:
        torch.cuda.synchronize()


def residents(slot_of: Tensor) -> Tensor:
    return slot_of.cpu() != ABSENT


def test_tables_stay_inverse_of_each_other(device: str) -> None:
    pager = make_device_pager(3, "lru", device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(3)])
        page(pager, 0, ids)
        slot_of, expert_in = pager.state.slot_of[0].tolist(), pager.state.expert_in[0].tolist()
        assert all(slot_of[expert] == slot for slot, expert in enumerate(expert_in) if expert != ABSENT)
        assert sum(slot != ABSENT for slot in slot_of) == sum(expert != ABSENT for expert in expert_in)


def test_frequently_used_experts_stay(device: str) -> None:
    pager = make_device_pager(3, "lfu", device)
    for pair in ([0, 1], [0, 1], [0, 2], [0, 3], [4, 5]):
        page(pager, 0, torch.tensor([pair]))
    residents_now = residents(pager.state.slot_of)[0].nonzero().squeeze(1).tolist()
    assert residents_now == [0, 4, 5], "what was used least left"
    with pager.host_pass(), pager.reading(0, [1, 2]):
        pass
    assert residents(pager.state.slot_of)[0, 0], "used four times, the host counts them too"


def test_what_is_prefetched_stays_until_its_layer_ran(device: str) -> None:
    pager = make_device_pager(3, "lfu", device)
    for pair in ([0, 1], [0, 1], [0, 2]):
        page(pager, 0, torch.tensor([pair]))
    with pager.host_pass():
        assert pager.prefetch(0, 5, keep=())
        with pager.reading(0, [3]):
            pass
        assert pager.resident(0)[5]


def test_more_experts_than_slots_come_in_waves(device: str) -> None:
    pager = make_device_pager(2, "lru", device)
    page(pager, 0, torch.tensor([[4, 5]]))
    waves = page(pager, 0, torch.tensor([[0, 1], [2, 3], [4, 0]]))
    assert [sorted(wave) for wave in waves] == [[4], [0], [1, 2], [3]]


def test_padding_rows_need_nothing(device: str) -> None:
    pager = make_device_pager(4, "lru", device)
    waves = page(pager, 0, torch.tensor([[0, 1], [2, 3]]), num_active=1)
    assert [sorted(wave) for wave in waves] == [[], [0, 1]]
    assert pager.row_missed[:2].tolist() == [2, 0]


@pytest.mark.parametrize("num_slots", [40, 64])
def test_padding_of_a_large_batch_needs_nothing(device: str, num_slots: int) -> None:
    """Large enough for several elements in a thread, whose order Triton may change."""
    num_experts, top_k = 64, 8
    memory = torch.zeros(num_experts, LAYOUT.slab_bytes, dtype=torch.uint8)
    source = NumberedSource()
    source._slabs = {(0, expert_id): memory[expert_id] for expert_id in range(num_experts)}
    pools = [SlotPool(LAYOUT, num_slots, torch.device(device))]
    pager = DevicePager(source, pools, num_experts, HostExperts(source, 1, num_experts, torch.device(device)))
    if pager.holds_all:
        pager.load_all()
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(32)])
    for num_active in (1, 3, 4):
        waves = page(pager, 0, ids, num_active)
        assert set().union(*waves) == set(ids[:num_active].flatten().tolist()), num_active
    pager.close()


def test_rows_know_how_many_of_their_experts_were_absent(device: str) -> None:
    pager = make_device_pager(4, "lru", device)
    page(pager, 0, torch.tensor([[0, 1]]))
    page(pager, 0, torch.tensor([[0, 1], [1, 2], [3, 4]]))
    assert pager.row_missed[:3].tolist() == [0, 1, 2]


def test_host_and_device_take_turns(device: str) -> None:
    pager = make_device_pager(3, "lru", device)
    page(pager, 1, torch.tensor([[0, 1]]))
    with pager.host_pass(), pager.reading(1, [1, 2]) as slot_of:
        assert slot_of[2] != ABSENT
        with pager.interrupted():
            assert [sorted(wave) for wave in page(pager, 0, torch.tensor([[3, 4]]))] == [[], [3, 4]]
    assert [sorted(wave) for wave in page(pager, 1, torch.tensor([[1, 5]]))] == [[1], [5]]
    assert residents(pager.state.slot_of)[1].nonzero().squeeze(1).tolist() == [1, 2, 5], "0 was the oldest"


def test_all_experts_in_slots_of_their_own(device: str) -> None:
    pager = make_device_pager(NUM_EXPERTS, "lru", device)
    pager.load_all()
    assert page(pager, 1, torch.tensor([[3, 1], [5, 3]])) == [{1: 11.0, 3: 13.0, 5: 15.0}]
    refresh(pager)
    assert (pager.counters(1).hits, pager.counters(1).misses) == (3, 0)


def test_stored_form_is_converted_on_the_way_into_slots(device: str) -> None:
    source = NumberedSource()
    layout = LAYOUT.with_dtype(torch.bfloat16)
    pools = [SlotPool(layout, 3, torch.device(device)) for _ in range(NUM_LAYERS)]
    experts = HostExperts(source, NUM_LAYERS, NUM_EXPERTS, torch.device(device))
    pager = DevicePager(source, pools, NUM_EXPERTS, experts)
    assert page(pager, 1, torch.tensor([[2, 4]]))[-1] == {2: 12.0, 4: 14.0}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_reloaded_experts_are_read_from_their_new_place(device: str, order: tuple[int, int]) -> None:
    pager = make_device_pager(2, "lru", device)
    page(pager, 0, torch.tensor([list(order)]))
    source = pager.source
    assert isinstance(source, NumberedSource)
    source._slabs = numbered_slabs()
    assert source.on_adopted is not None
    source.on_adopted()
    pager.follow_experts()
    assert page(pager, 0, torch.tensor([[2, 3]]))[-1] == {2: 2.0, 3: 3.0}
    addresses = pager._addresses[0].tolist()
    assert addresses == [source._slabs[0, expert_id].data_ptr() for expert_id in range(NUM_EXPERTS)]


def page_with_scores(pager: DevicePager, layer: int, ids: Tensor, scores: Tensor) -> None:
    device = pager.state.step.device
    pager.begin_pass()
    active = torch.tensor([len(ids)], dtype=torch.int32, device=device)
    for _ in pager.waves(layer, ids.to(device), active, scores.to(device)):
        pass


def test_likeliest_absent_experts_are_prefetched_for_the_next_layer(device: str) -> None:
    pager = make_device_pager(5, "lru", device)
    page(pager, 1, torch.tensor([[0, 1]]))
    pager.prefetch_budget.fill_(1)
    page_with_scores(pager, 0, torch.tensor([[2]]), torch.tensor([[0.5, 3.0, 0.1, 2.0, 2.5, 0.0]]))
    assert residents(pager.state.slot_of)[1].nonzero().squeeze(1).tolist() == [0, 1], (
        "1 is resident, 4 not in the top 1"
    )
    page_with_scores(pager, 0, torch.tensor([[2, 3]]), torch.tensor([[0.5, 3.0, 0.1, 2.0, 2.5, 0.0]]))
    assert residents(pager.state.slot_of)[1].nonzero().squeeze(1).tolist() == [0, 1, 4]
    assert page(pager, 1, torch.tensor([[4, 5]])) == [{4: 14.0}, {5: 15.0}]
    refresh(pager)
    counters = pager.counters(1)
    assert (counters.prefetched, counters.prefetched_used, counters.prefetched_wasted) == (1, 1, 0)


def test_prefetching_evicts_the_oldest_and_nothing_that_is_predicted(device: str) -> None:
    pager = make_device_pager(4, "lru", device)
    for pair in ([0, 1], [2, 3]):
        page(pager, 1, torch.tensor([pair]))
    page_with_scores(pager, 0, torch.tensor([[1, 2]]), torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.0, 8.0]]))
    assert residents(pager.state.slot_of)[1].nonzero().squeeze(1).tolist() == [0, 2, 3, 5], (
        "1 left for 5, 0 is predicted"
    )
    slot_of, expert_in = pager.state.slot_of[1].tolist(), pager.state.expert_in[1].tolist()
    assert all(slot_of[expert] == slot for slot, expert in enumerate(expert_in))
    page(pager, 1, torch.tensor([[0, 1]]))
    page(pager, 1, torch.tensor([[2, 3]]))
    refresh(pager)
    assert pager.counters(1).prefetched_wasted == 1


def test_no_budget_no_prefetch(device: str) -> None:
    pager = make_device_pager(5, "lfu", device)
    pager.prefetch_budget.fill_(0)
    page_with_scores(pager, 0, torch.tensor([[2, 3]]), torch.rand(1, NUM_EXPERTS))
    assert not residents(pager.state.slot_of)[1].any()


@given(seed=st.integers(0, 10_000), num_slots=st.integers(4, NUM_EXPERTS - 1))
@settings(deadline=None, max_examples=10)
def test_wrong_guesses_never_change_what_is_computed(device: str, seed: int, num_slots: int) -> None:
    pager = make_device_pager(num_slots, "lfu", device)
    generator = torch.Generator().manual_seed(seed)
    active = torch.tensor([2], dtype=torch.int32, device=device)
    for _ in range(3):
        pager.begin_pass()
        for layer in range(NUM_LAYERS):
            ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(2)])
            scores = torch.rand(2, NUM_EXPERTS, generator=generator)
            waves = pager.waves(layer, ids.to(device), active, scores.to(device))
            served: dict[int, float] = {}
            for wave in waves:
                served |= numbers_in(pager, layer, wave)
            assert served == {expert_id: 10 * layer + expert_id for expert_id in ids.unique().tolist()}


PINNED = ([2, 5], [0])


@given(
    seed=st.integers(0, 10_000),
    num_slots=st.integers(4, NUM_EXPERTS - 1),
    eviction=st.sampled_from(["lfu", "fifo"]),
    is_loaded=st.booleans(),
)
@settings(deadline=None, max_examples=8)
def test_pinned_experts_stay_in_every_wave_and_beside_every_prefetch(
    device: str, seed: int, num_slots: int, eviction: str, is_loaded: bool
) -> None:
    pager = make_device_pager(num_slots, eviction, device, PINNED)
    if is_loaded:
        load_pinned(pager, PINNED)
    generator = torch.Generator().manual_seed(seed)
    active = torch.tensor([3], dtype=torch.int32, device=device)
    for _ in range(2):
        pager.begin_pass()
        pager.prefetch_used(0, torch.randperm(NUM_EXPERTS, generator=generator)[:3].tolist())
        for layer in range(NUM_LAYERS):
            ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(3)])
            scores = torch.rand(1, NUM_EXPERTS, generator=generator).to(device)
            were_there = residents(pager.state.slot_of)[layer, PINNED[layer]]
            served: dict[int, float] = {}
            guesses = scores if pager.can_prefetch(1, TOP_K) else None
            for wave in pager.waves(layer, ids.to(device), active, guesses):
                served |= numbers_in(pager, layer, wave)
            assert served == {expert_id: 10 * layer + expert_id for expert_id in ids.unique().tolist()}
            are_there = residents(pager.state.slot_of)[layer, PINNED[layer]]
            assert (are_there >= were_there).all()
            assert are_there.all() or not is_loaded


def test_pinned_experts_need_more_waves(device: str) -> None:
    pager = make_device_pager(4, "lru", device, PINNED)
    load_pinned(pager, PINNED)
    waves = page(pager, 0, torch.tensor([[0, 1], [2, 3], [4, 0]]))
    assert [sorted(wave) for wave in waves] == [[2], [0, 1], [3, 4]], "two slots beside those of 2 and 5"


def test_copies_are_counted_by_who_asked_for_them(device: str) -> None:
    pager = make_device_pager(5, "lru", device)
    with pager.host_pass():
        pager.prefetch(1, 0, keep=(), by=WARM_UP)
        pager.prefetch(1, 1, keep=(), by=WARM_UP)
    page(pager, 1, torch.tensor([[0, 2]]))
    page_with_scores(pager, 0, torch.tensor([[2]]), torch.tensor([[0.0, 0.0, 0.0, 5.0, 0.0, 0.0]]))  # 3
    pager.prefetch_used(1, [4])
    page(pager, 1, torch.tensor([[3, 5], [4, 0]]))  # 1 leaves
    pager.prefetch_used(1, [1])  # 2 leaves
    with pager.host_pass(), pager.reading(1, [1, 2]):  # 3 leaves
        pass
    refresh(pager)
    assert pager.prefetches() == {
        HASH_FUNCTION: PrefetchCounts(copied=2, used=2),
        NEXT_GATE: PrefetchCounts(copied=1, used=1),
        WARM_UP: PrefetchCounts(copied=2, used=1, wasted=1),
    }
    counters = pager.counters(1)
    assert (counters.prefetched, counters.prefetched_used, counters.prefetched_wasted) == (5, 4, 1)


def test_a_copy_is_wasted_by_whatever_takes_its_slot(device: str) -> None:
    pager = make_device_pager(5, "lru", device)
    with pager.host_pass():
        for expert_id in range(5):
            pager.prefetch(1, expert_id, keep=(), by=WARM_UP)
    pager.begin_pass()
    pager.prefetch_used(1, [5])  # in the place of 0
    page_with_scores(pager, 0, torch.tensor([[2]]), torch.tensor([[5.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))  # of 1
    with pager.host_pass(), pager.reading(1, [1]):  # of 2
        pass
    page(pager, 1, torch.tensor([[2]]))  # of 3
    page(pager, 1, torch.tensor([[3]]))  # of 4
    page(pager, 1, torch.tensor([[4]]))  # of 5, which a table named
    page(pager, 1, torch.tensor([[5]]))  # of 0, which the next gate named
    refresh(pager)
    assert pager.prefetches() == {
        HASH_FUNCTION: PrefetchCounts(copied=1, wasted=1),
        NEXT_GATE: PrefetchCounts(copied=1, wasted=1),
        WARM_UP: PrefetchCounts(copied=5, wasted=5),
    }
    counters = pager.counters(1)
    assert (counters.prefetched, counters.prefetched_used, counters.prefetched_wasted) == (7, 0, 7)
