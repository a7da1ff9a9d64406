"""Both pagers against a source whose every slab names its expert: what is read is what was asked for, always."""

import mmap
import threading
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.gpu.host_experts import HostExperts
from actors.executor.gpu.page_state import EVICTION_ORDERS
from actors.executor.gpu.pager import DevicePager
from actors.executor.host_pager import HostPager
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
    on_adopted: Callable[[], None] | None = None

    def __init__(self) -> None:
        self.fetched: list[tuple[int, int]] = []
        self.broken: set[tuple[int, int]] = set()
        self._slabs = numbered_slabs()

    def fetch(self, layer: int, expert_id: int) -> Tensor:
        if (layer, expert_id) in self.broken:
            raise ExpertsUnavailableError(layer, expert_id, 0.0)
        self.fetched.append((layer, expert_id))
        return self._slabs[layer, expert_id]

    def local_slabs(self) -> Mapping[tuple[int, int], Tensor]:
        return self._slabs


def numbered_slabs() -> dict[tuple[int, int], Tensor]:
    """In pages of their own: a GPU is given whole pages."""
    memory = mmap.mmap(-1, NUM_LAYERS * NUM_EXPERTS * LAYOUT.slab_bytes)
    slabs = torch.frombuffer(memory, dtype=torch.uint8).view(NUM_LAYERS, NUM_EXPERTS, -1)
    for layer in range(NUM_LAYERS):
        for expert_id in range(NUM_EXPERTS):
            LAYOUT.views(slabs[layer, expert_id])["down_proj"].fill_(10 * layer + expert_id)
    return {(layer, e): slabs[layer, e] for layer in range(NUM_LAYERS) for e in range(NUM_EXPERTS)}


def make_pools(num_slots: int) -> list[SlotPool]:
    return [SlotPool(LAYOUT, num_slots, torch.device("cpu")) for _ in range(NUM_LAYERS)]


def make_host_pager(num_slots: int, eviction: str = "lru", source: NumberedSource | None = None) -> HostPager:
    policy = EVICTION_POLICIES[eviction]
    source = source or NumberedSource()
    return HostPager(source, make_pools(num_slots), NUM_EXPERTS, policy, torch.device("cpu"), True)


def make_device_pager(
    num_slots: int, eviction: str = "lru", source: NumberedSource | None = None
) -> DevicePager:
    source = source or NumberedSource()
    experts = HostExperts(source, NUM_LAYERS, NUM_EXPERTS, torch.device("cpu"))
    return DevicePager(source, make_pools(num_slots), NUM_EXPERTS, experts, eviction, poison_free_slots=True)


MakePager = Callable[..., HostPager | DevicePager]
KINDS: dict[str, MakePager] = {"host": make_host_pager, "device": make_device_pager}
EVICTIONS = [("host", eviction) for eviction in EVICTION_POLICIES] + [
    ("device", eviction) for eviction in EVICTION_ORDERS
]


@pytest.fixture(params=KINDS)
def make_pager(request: pytest.FixtureRequest) -> MakePager:
    return KINDS[request.param]


def contents(pager: HostPager | DevicePager, layer: int, slot: int) -> Tensor:
    pool = pager._layers[layer].pool if isinstance(pager, HostPager) else pager._pools[layer]
    return pool.views["down_proj"][slot]


def page_table(pager: HostPager | DevicePager) -> Tensor:
    return pager.page_table if isinstance(pager, HostPager) else pager.state.slot_of


def read(pager: HostPager | DevicePager, layer: int, expert_ids: list[int]) -> None:
    with pager.host_pass(), pager.reading(layer, expert_ids) as slot_of:
        for expert_id in expert_ids:
            assert (contents(pager, layer, int(slot_of[expert_id])) == 10 * layer + expert_id).all()


def resident(pager: Pager, layer: int = 0) -> list[int]:
    return pager.resident(layer).nonzero()[0].tolist()


def test_free_slots_hold_nan(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=2)
    read(pager, 0, [3])
    assert contents(pager, 0, 0).isnan().all() or contents(pager, 0, 1).isnan().all()


def test_evicts_the_least_recently_used_expert(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=3)
    for expert_ids in ([0], [1], [2], [0], [3]):
        read(pager, 0, expert_ids)
    assert resident(pager) == [0, 2, 3]
    read(pager, 0, [4])
    assert resident(pager) == [0, 3, 4]


def test_never_evicts_an_expert_the_step_needs(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=3)
    read(pager, 0, [0, 1, 2])
    read(pager, 0, [0, 4, 5])  # 0 is the least recently used, yet needed
    assert resident(pager) == [0, 4, 5]


def test_layers_do_not_share_slots(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=2)
    read(pager, 0, [0, 1])
    read(pager, 1, [2, 3])
    assert (resident(pager, 0), resident(pager, 1)) == ([0, 1], [2, 3])


def test_counts_hits_misses_and_bytes(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=2)
    read(pager, 0, [0, 1])
    read(pager, 0, [1, 2])
    counters = pager.counters(0)
    assert (counters.hits, counters.misses, counters.evictions) == (1, 3, 1)
    assert counters.moved_bytes == 3 * LAYOUT.slab_bytes


def test_prefetched_expert_is_a_hit(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=2)
    with pager.host_pass():
        assert pager.prefetch(0, 5, keep=())
        assert not pager.prefetch(0, 5, keep=()), "it is there already"
    read(pager, 0, [5])
    counters = pager.counters(0)
    assert (counters.prefetched, counters.prefetched_used, counters.hits, counters.misses) == (1, 1, 1, 0)


def test_prefetch_takes_no_slot_of_what_is_read_or_kept(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=2)
    with pager.host_pass():
        with pager.reading(0, [0, 1]):
            assert not pager.prefetch(0, 2, keep=())
        assert not pager.prefetch(0, 2, keep={0, 1})
        assert pager.prefetch(0, 2, keep={1})
    assert resident(pager) == [1, 2]


def test_failed_fetch_is_answered_and_leaves_the_pager_usable(make_pager: MakePager) -> None:
    source = NumberedSource()
    source.broken = {(0, 1)}
    pager = make_pager(num_slots=2, source=source)
    with pytest.raises(ExpertsUnavailableError):
        read(pager, 0, [0, 1])
    with pytest.raises(ExpertsUnavailableError), pager.host_pass():
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
    pager = make_host_pager(num_slots=2, source=source)
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


def stream(pager: HostPager, layer: int, expert_ids: list[int]) -> list[int]:
    order = []
    with pager.streaming(layer, expert_ids) as slots:
        for expert_id, slot in slots:
            assert (contents(pager, layer, slot) == 10 * layer + expert_id).all()
            order.append(expert_id)
    return order


@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
def test_more_experts_than_slots_pass_through_one(eviction: str) -> None:
    pager = make_host_pager(num_slots=3, eviction=eviction)
    read(pager, 0, [1, 4])
    assert stream(pager, 0, [0, 1, 2, 3, 4, 5]) == [1, 4, 0, 2, 3, 5], "those in slots first"
    stayed = resident(pager)
    assert len(stayed) == 3
    assert 5 in stayed, "the last one keeps the slot"
    counters = pager.counters(0)
    assert (counters.hits, counters.misses) == (2, 6)
    assert counters.moved_bytes == 6 * LAYOUT.slab_bytes


def test_every_needed_expert_in_a_slot_makes_room_for_one_more() -> None:
    pager = make_host_pager(num_slots=2)
    read(pager, 0, [0, 1])
    assert stream(pager, 0, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert resident(pager) == [1, 3]


@pytest.mark.parametrize("broken", range(NUM_EXPERTS))
def test_failed_fetch_in_a_stream_is_answered_and_leaves_the_pager_usable(broken: int) -> None:
    source = NumberedSource()
    source.broken = {(0, broken)}
    pager = make_host_pager(num_slots=3, source=source)
    with pytest.raises(ExpertsUnavailableError):
        stream(pager, 0, list(range(NUM_EXPERTS)))
    source.broken.clear()
    for _ in range(3):
        assert sorted(stream(pager, 0, list(range(NUM_EXPERTS)))) == list(range(NUM_EXPERTS))
        read(pager, 0, [0, 3, 5])


steps = st.lists(
    st.tuples(
        st.integers(0, NUM_LAYERS - 1),
        st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=3, unique=True),
        st.booleans(),
    ),
    max_size=40,
)


@given(
    steps=steps,
    num_slots=st.integers(3, NUM_EXPERTS),
    kind_and_eviction=st.sampled_from(EVICTIONS),
)
@settings(deadline=None)
def test_any_order_of_steps_and_prefetches_reads_the_right_experts(
    steps: list[tuple[int, list[int], bool]], num_slots: int, kind_and_eviction: tuple[str, str]
) -> None:
    kind, eviction = kind_and_eviction
    pager = KINDS[kind](num_slots, eviction)
    for layer, expert_ids, is_prefetch in steps:
        if is_prefetch:
            with pager.host_pass():
                for expert_id in expert_ids:
                    pager.prefetch(layer, expert_id, keep=expert_ids)
        else:
            read(pager, layer, expert_ids)
        row = page_table(pager)[layer]
        slots = row[row != ABSENT]
        assert len(slots.unique()) == len(slots), "two experts in one slot"


@pytest.fixture
def racing_prefetcher() -> Iterator[tuple[HostPager, threading.Event]]:
    pager, stop = make_host_pager(num_slots=3), threading.Event()

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
    racing_prefetcher: tuple[HostPager, threading.Event],
) -> None:
    pager, _ = racing_prefetcher
    generator = torch.Generator().manual_seed(2)
    for step in range(1500):
        read(pager, step % NUM_LAYERS, torch.randperm(NUM_EXPERTS, generator=generator)[:3].tolist())
        if step % 4 == 0:
            stream(pager, step % NUM_LAYERS, torch.randperm(NUM_EXPERTS, generator=generator)[:5].tolist())
