"""The pager against a source whose every slab names its expert: what is read is what was asked for, always."""

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.pager import ABSENT, Pager
from actors.executor.slots import SlotPool
from common.errors import ExpertsUnavailableError
from common.expert_layout import ExpertLayout

NUM_LAYERS, NUM_EXPERTS = 2, 6
LAYOUT = ExpertLayout.from_shapes({"down_proj": (3, 5)}, torch.float32)


class NumberedSource:
    """Expert e of layer l is filled with 10 * l + e."""

    layout = LAYOUT
    model_fingerprint = "numbered"

    def __init__(self) -> None:
        self.fetched: list[tuple[int, int]] = []
        self.broken: set[tuple[int, int]] = set()

    def fetch(self, layer: int, expert_id: int) -> Tensor:
        if (layer, expert_id) in self.broken:
            raise ExpertsUnavailableError(layer, expert_id, 0.0)
        self.fetched.append((layer, expert_id))
        slab = torch.zeros(LAYOUT.slab_bytes, dtype=torch.uint8)
        LAYOUT.views(slab)["down_proj"].fill_(10 * layer + expert_id)
        return slab


def make_pager(num_slots: int, eviction: str = "lru", source: NumberedSource | None = None) -> Pager:
    pools = [SlotPool(LAYOUT, num_slots, torch.device("cpu")) for _ in range(NUM_LAYERS)]
    return Pager(
        source or NumberedSource(), pools, NUM_EXPERTS, EVICTION_POLICIES[eviction], torch.device("cpu"), True
    )


def contents(pager: Pager, layer: int, slot: int) -> Tensor:
    return pager._layers[layer].pool.views["down_proj"][slot]


def read(pager: Pager, layer: int, expert_ids: list[int]) -> None:
    with pager.reading(layer, expert_ids) as slot_of:
        for expert_id in expert_ids:
            assert (contents(pager, layer, int(slot_of[expert_id])) == 10 * layer + expert_id).all()


def resident(pager: Pager, layer: int = 0) -> list[int]:
    return pager.resident(layer).nonzero()[0].tolist()


def test_free_slots_hold_nan() -> None:
    pager = make_pager(num_slots=2)
    read(pager, 0, [3])
    assert contents(pager, 0, 0).isnan().all() or contents(pager, 0, 1).isnan().all()


def test_evicts_the_least_recently_used_expert() -> None:
    pager = make_pager(num_slots=3)
    for expert_ids in ([0], [1], [2], [0], [3]):
        read(pager, 0, expert_ids)
    assert resident(pager) == [0, 2, 3]
    read(pager, 0, [4])
    assert resident(pager) == [0, 3, 4]


def test_never_evicts_an_expert_the_step_needs() -> None:
    pager = make_pager(num_slots=3)
    read(pager, 0, [0, 1, 2])
    read(pager, 0, [0, 4, 5])  # 0 is the least recently used, yet needed
    assert resident(pager) == [0, 4, 5]


def test_layers_do_not_share_slots() -> None:
    pager = make_pager(num_slots=2)
    read(pager, 0, [0, 1])
    read(pager, 1, [2, 3])
    assert (resident(pager, 0), resident(pager, 1)) == ([0, 1], [2, 3])


def test_counts_hits_misses_and_bytes() -> None:
    pager = make_pager(num_slots=2)
    read(pager, 0, [0, 1])
    read(pager, 0, [1, 2])
    counters = pager.counters(0)
    assert (counters.hits, counters.misses, counters.evictions) == (1, 3, 1)
    assert counters.moved_bytes == 3 * LAYOUT.slab_bytes


def test_prefetched_expert_is_a_hit() -> None:
    pager = make_pager(num_slots=2)
    assert pager.prefetch(0, 5, keep=())
    assert not pager.prefetch(0, 5, keep=()), "it is there already"
    read(pager, 0, [5])
    counters = pager.counters(0)
    assert (counters.prefetched, counters.prefetched_used, counters.hits, counters.misses) == (1, 1, 1, 0)


def test_prefetch_takes_no_slot_of_what_is_read_or_kept() -> None:
    pager = make_pager(num_slots=2)
    with pager.reading(0, [0, 1]):
        assert not pager.prefetch(0, 2, keep=())
    assert not pager.prefetch(0, 2, keep={0, 1})
    assert pager.prefetch(0, 2, keep={1})
    assert resident(pager) == [1, 2]


def test_failed_fetch_is_answered_and_leaves_the_pager_usable() -> None:
    source = NumberedSource()
    source.broken = {(0, 1)}
    pager = make_pager(num_slots=2, source=source)
    with pytest.raises(ExpertsUnavailableError):
        read(pager, 0, [0, 1])
    with pytest.raises(ExpertsUnavailableError):
        pager.prefetch(0, 1, keep=())
    source.broken.clear()
    for _ in range(3):
        read(pager, 0, [0, 1])
        read(pager, 0, [2, 3])


def test_step_waits_for_a_prefetch_under_way_and_does_not_copy_twice() -> None:
    gate, entered = threading.Event(), threading.Event()

    class SlowSource(NumberedSource):
        def fetch(self, layer: int, expert_id: int) -> Tensor:
            entered.set()
            assert gate.wait(10)
            return super().fetch(layer, expert_id)

    source = SlowSource()
    pager = make_pager(num_slots=2, source=source)
    prefetch = threading.Thread(target=pager.prefetch, args=(0, 4, ()))
    prefetch.start()
    assert entered.wait(10)
    step = threading.Thread(target=read, args=(pager, 0, [4]))
    step.start()
    assert (pager.page_table[0] == ABSENT).all(), "not readable before its copy is complete"
    gate.set()
    step.join(10)
    prefetch.join(10)
    assert source.fetched == [(0, 4)]
    assert resident(pager) == [4]


steps = st.lists(
    st.tuples(
        st.integers(0, NUM_LAYERS - 1),
        st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=3, unique=True),
        st.booleans(),
    ),
    max_size=40,
)


@given(
    steps=steps, num_slots=st.integers(3, NUM_EXPERTS), eviction=st.sampled_from(sorted(EVICTION_POLICIES))
)
@settings(deadline=None)
def test_any_order_of_steps_and_prefetches_reads_the_right_experts(
    steps: list[tuple[int, list[int], bool]], num_slots: int, eviction: str
) -> None:
    pager = make_pager(num_slots, eviction)
    for layer, expert_ids, is_prefetch in steps:
        if is_prefetch:
            for expert_id in expert_ids:
                pager.prefetch(layer, expert_id, keep=expert_ids)
        else:
            read(pager, layer, expert_ids)
        slots = pager.page_table[layer][pager.page_table[layer] != ABSENT]
        assert len(slots.unique()) == len(slots), "two experts in one slot"


@pytest.fixture
def racing_prefetcher() -> Iterator[tuple[Pager, threading.Event]]:
    pager, stop = make_pager(num_slots=3), threading.Event()

    def run() -> None:
        generator = torch.Generator().manual_seed(1)
        while not stop.is_set():
            drawn = int(torch.randint(0, NUM_LAYERS * NUM_EXPERTS, (1,), generator=generator))
            pager.prefetch(drawn // NUM_EXPERTS, drawn % NUM_EXPERTS, keep=())

    thread = threading.Thread(target=run)
    thread.start()
    yield pager, stop
    stop.set()
    thread.join(10)


def test_steps_read_the_right_experts_while_a_prefetcher_races_them(
    racing_prefetcher: tuple[Pager, threading.Event],
) -> None:
    pager, _ = racing_prefetcher
    generator = torch.Generator().manual_seed(2)
    for step in range(1500):
        read(pager, step % NUM_LAYERS, torch.randperm(NUM_EXPERTS, generator=generator)[:3].tolist())
