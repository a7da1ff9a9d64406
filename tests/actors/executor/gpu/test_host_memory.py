"""Registering host memory with a runtime that only keeps book, staging without a GPU, and both with one."""

import logging
import mmap
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from tempfile import TemporaryFile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.executor.gpu import host_memory
from actors.executor.gpu.host_memory import (
    ALREADY_REGISTERED,
    BRIDGED_BYTES,
    CudaHostMemory,
    HostRegistration,
    PinnedRing,
    device_addresses,
)
from actors.executor.gpu.page_ranges import (
    PAGE_BYTES,
    contains,
    outside,
    overlaps,
    span,
    split,
    touched_pages,
)
from common.errors import HostRegistrationError

OUT_OF_MEMORY, NOT_REGISTERED = 2, 713
BUFFER_BYTES = 8 * BRIDGED_BYTES

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class BookKeeper:
    """HostMemoryCalls as CUDA answers them, for memory that need not be there."""

    def __init__(self) -> None:
        self.registered: list[range] = []
        self.refused: list[range] = []  # where registering fails
        self.num_calls = 0

    def register(self, address: int, num_bytes: int) -> int:
        self.num_calls += 1
        assert address % PAGE_BYTES == num_bytes % PAGE_BYTES == 0
        wanted = range(address, address + num_bytes)
        if any(overlaps([taken], wanted) for taken in self.registered):
            return ALREADY_REGISTERED
        if any(overlaps([refused], wanted) for refused in self.refused):
            return OUT_OF_MEMORY
        self.registered.append(wanted)
        return 0

    def unregister(self, address: int) -> int:
        found = [taken for taken in self.registered if taken.start == address]
        for taken in found:
            self.registered.remove(taken)
        return 0 if found else NOT_REGISTERED

    def describe(self, error: int) -> str:
        return f"error {error}"

    def can_read(self, view: Tensor) -> bool:
        return not outside([span(view)], sorted(self.registered, key=lambda taken: taken.start))


@pytest.fixture(scope="module")
def memory() -> Tensor:
    """Page-aligned, and only reserved until somebody writes."""
    return torch.from_numpy(np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8))


@pytest.fixture
def cuda() -> BookKeeper:
    return BookKeeper()


def pages(memory: Tensor, first: int, stop: int) -> range:
    return range(memory.data_ptr() + first * PAGE_BYTES, memory.data_ptr() + stop * PAGE_BYTES)


def view_of_pages(memory: Tensor, first: int, stop: int) -> Tensor:
    """A little less than these pages, as experts lie in the object store."""
    return memory[first * PAGE_BYTES + 64 : stop * PAGE_BYTES - 64]


def test_neighbours_on_one_page_become_one_registration(memory: Tensor, cuda: BookKeeper) -> None:
    views = [memory[64:9000], memory[9000:30_000], memory[30_064:40_000]]
    registration = HostRegistration(cuda)
    registration.extend(views)
    assert cuda.registered == [pages(memory, 0, 10)]


def test_small_gaps_are_bridged_and_large_ones_are_not(memory: Tensor, cuda: BookKeeper) -> None:
    gap = BRIDGED_BYTES // PAGE_BYTES
    ends = [(0, 1), (1 + gap, 2 + gap), (3 + 2 * gap, 4 + 2 * gap)]  # gaps of 1 MiB, and of a page more
    registration = HostRegistration(cuda)
    registration.extend(view_of_pages(memory, *end) for end in ends)
    assert cuda.registered == [
        pages(memory, 0, 2 + gap),
        pages(memory, 3 + 2 * gap, 4 + 2 * gap),
    ]


def test_gap_without_memory_is_left_out(memory: Tensor, cuda: BookKeeper) -> None:
    cuda.refused = [pages(memory, 5, 6)]
    views = [view_of_pages(memory, 0, 5), view_of_pages(memory, 6, 9)]
    registration = HostRegistration(cuda)
    registration.extend(views)
    assert cuda.registered == [pages(memory, 0, 5), pages(memory, 6, 9)]


def test_large_ranges_are_registered_in_chunks(memory: Tensor, cuda: BookKeeper) -> None:
    registration = HostRegistration(cuda, chunk_bytes=4 * PAGE_BYTES + 100)
    across, within = view_of_pages(memory, 3, 5), view_of_pages(memory, 5, 10)
    registration.extend([view_of_pages(memory, 0, 3), across, within])
    assert cuda.registered == [pages(memory, 0, 4), pages(memory, 4, 8), pages(memory, 8, 10)]
    assert registration.num_bytes == 10 * PAGE_BYTES
    assert registration.covers(view_of_pages(memory, 0, 3))
    assert not registration.covers(across), "two registrations hold it: the copy engine would fail"


def test_covers_nothing_that_shares_a_page_with_a_registered_view(memory: Tensor, cuda: BookKeeper) -> None:
    registration = HostRegistration(cuda)
    registration.extend([memory[0:5000]])
    assert not registration.covers(memory[5000:20_000])
    assert not registration.covers(memory[20_000:30_000])


def test_failure_takes_back_what_the_call_registered(memory: Tensor, cuda: BookKeeper) -> None:
    registration = HostRegistration(cuda, chunk_bytes=2 * PAGE_BYTES)
    registration.extend([view_of_pages(memory, 0, 2)])
    before = list(cuda.registered)
    cuda.refused = [pages(memory, 9, 10)]
    with pytest.raises(HostRegistrationError, match=r"^0.00 GB .*: error 2; .*memlock"):
        registration.extend([view_of_pages(memory, 0, 20)])
    assert cuda.registered == before
    assert registration.num_bytes == 2 * PAGE_BYTES
    cuda.refused = []
    registration.extend([view_of_pages(memory, 0, 20)])
    assert registration.num_bytes == 20 * PAGE_BYTES


def test_pages_that_somebody_else_registered_stay_theirs(memory: Tensor, cuda: BookKeeper) -> None:
    theirs = pages(memory, 3, 6)
    cuda.register(theirs.start, len(theirs))
    registration, view = HostRegistration(cuda), view_of_pages(memory, 0, 16)
    registration.extend([view])
    assert cuda.can_read(view)
    assert registration.num_bytes == 13 * PAGE_BYTES
    registration.close()
    assert cuda.registered == [theirs]


@pytest.mark.parametrize("end", ["release", "close"])
def test_views_are_held_until_their_memory_is_unregistered(memory: Tensor, end: str) -> None:
    alive: list[bool] = []

    class Watching(BookKeeper):
        def unregister(self, address: int) -> int:
            alive.append(held() is not None)
            return super().unregister(address)

    registration, views = HostRegistration(Watching()), [memory[0:5000]]
    held = weakref.ref(views[0])
    registration.extend(views)
    if end == "release":
        registration.release(iter([views.pop()]))
    else:
        views.clear()
        registration.close()
    assert alive == [True]
    assert held() is None


def test_restarted_store_is_registered_beside_the_old_one_then_alone(
    memory: Tensor, cuda: BookKeeper
) -> None:
    registration = HostRegistration(cuda)
    kept = memory[100_000:200_000]
    old, new = [memory[0:100_000], kept], [kept, memory[200_000:300_000]]
    registration.extend(old)
    first_calls = cuda.num_calls
    registration.extend(new)
    assert cuda.num_calls == first_calls + 1
    assert all(cuda.can_read(view) for view in old + new)
    registration.release(old)
    assert all(cuda.can_read(view) for view in new), "what both need is needed still"
    registration.release(new)
    assert cuda.registered == []
    registration.release(new)


def test_closing_twice_is_fine(memory: Tensor, cuda: BookKeeper) -> None:
    registration = HostRegistration(cuda)
    registration.extend([memory])
    registration.close()
    registration.close()
    assert cuda.registered == []
    assert registration.num_bytes == 0


def test_memory_that_stays_locked_is_told(
    memory: Tensor, cuda: BookKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    registration = HostRegistration(cuda)
    registration.extend([memory])
    cuda.registered.clear()
    registration.close()
    assert f"stay locked: error {NOT_REGISTERED}" in caplog.text


def test_logs_progress(
    memory: Tensor, cuda: BookKeeper, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "LOG_EVERY_S", -1.0)
    with caplog.at_level(logging.INFO):
        HostRegistration(cuda, chunk_bytes=BUFFER_BYTES // 4).extend([memory])
    assert len(caplog.records) == 4
    assert "registered 0.01 of 0.01 GB" in caplog.records[-1].getMessage()


parts = st.lists(
    st.tuples(st.integers(0, BUFFER_BYTES - 1), st.integers(1, 300_000)).map(
        lambda part: (part[0], min(part[0] + part[1], BUFFER_BYTES))
    ),
    min_size=1,
    max_size=12,
)


@given(spans=parts, gap_pages=st.integers(0, 300))
def test_touched_pages_hold_every_byte_and_few_more(spans: list[tuple[int, int]], gap_pages: int) -> None:
    wanted = [range(*ends) for ends in spans]
    ranges = touched_pages(wanted, gap_pages * PAGE_BYTES)
    assert all(contains(ranges, part) for part in wanted)
    assert all(edge % PAGE_BYTES == 0 for pages in ranges for edge in (pages.start, pages.stop))
    assert all(b.start - a.stop > gap_pages * PAGE_BYTES for a, b in pairwise(ranges))
    without_gaps = touched_pages(wanted, 0)
    indices = {page for part in wanted for page in range(part[0] // PAGE_BYTES, part[-1] // PAGE_BYTES + 1)}
    assert page_set(without_gaps) == {page * PAGE_BYTES for page in indices}
    assert all(len(gap) <= gap_pages * PAGE_BYTES for gap in outside(ranges, without_gaps))


@given(spans=parts, taken=parts, max_pages=st.integers(1, 50))
def test_split_and_outside_lose_and_add_nothing(
    spans: list[tuple[int, int]], taken: list[tuple[int, int]], max_pages: int
) -> None:
    ranges, others = (touched_pages([range(*ends) for ends in some], 0) for some in (spans, taken))
    pieces = split(ranges, max_pages * PAGE_BYTES)
    assert page_set(pieces) == page_set(ranges)
    assert sum(map(len, pieces)) == sum(map(len, ranges))
    assert all(0 < len(piece) <= max_pages * PAGE_BYTES for piece in pieces)
    assert page_set(outside(ranges, others)) == page_set(ranges) - page_set(others)


def page_set(ranges: Sequence[range]) -> set[int]:
    return {address for pages in ranges for address in range(pages.start, pages.stop, PAGE_BYTES)}


@given(generations=st.lists(parts, min_size=1, max_size=4), chunk_pages=st.integers(1, 40))
def test_any_order_of_generations_leaves_what_is_needed_and_no_more(
    memory: Tensor, generations: list[list[tuple[int, int]]], chunk_pages: int
) -> None:
    cuda = BookKeeper()
    registration = HostRegistration(cuda, chunk_pages * PAGE_BYTES)
    current: list[Tensor] = []
    for ends in generations:
        old, current = current, [memory[start:stop] for start, stop in ends]
        registration.extend(current)
        assert all(cuda.can_read(view) for view in old + current)
        registration.release(old)
        assert all(cuda.can_read(view) for view in current)
        needed = touched_pages(map(span, current), 0)
        assert all(overlaps(needed, taken) for taken in cuda.registered)
        assert registration.num_bytes == sum(map(len, cuda.registered))
    registration.close()
    assert cuda.registered == []


def test_addresses_are_the_hosts_own(memory: Tensor) -> None:
    views = {
        (layer, expert): memory[64 * (3 * layer + expert) :][:64] for layer in range(2) for expert in range(3)
    }
    addresses = device_addresses(views, 2, 3)
    assert addresses is not None
    assert addresses.dtype == torch.int64
    assert (addresses - memory.data_ptr()).tolist() == [[0, 64, 128], [192, 256, 320]]


def test_no_addresses_when_an_expert_lies_elsewhere(memory: Tensor) -> None:
    assert device_addresses({(0, 0): memory[:64]}, 1, 2) is None


class LoggedEvent:
    """A CUDA event's place in the order of things."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record(self) -> None:
        self.log.append(f"record {self.name}")

    def synchronize(self) -> None:
        self.log.append(f"wait {self.name}")


@pytest.fixture
def ring_log() -> list[str]:
    return []


@pytest.fixture
def new_event(ring_log: list[str]) -> Callable[[], LoggedEvent]:
    names = iter("abcdef")
    return lambda: LoggedEvent(ring_log, next(names))


def test_ring_takes_buffers_in_turns_and_waits_for_each(
    ring_log: list[str], new_event: Callable[[], LoggedEvent]
) -> None:
    ring = PinnedRing(64, num_buffers=2, pin_memory=False, new_event=new_event)
    targets = torch.zeros(3, 64, dtype=torch.uint8)
    for number, target in enumerate(targets):
        ring.copy(torch.full((64,), number, dtype=torch.uint8), target)
    assert [int(value) for value in targets[:, 0]] == [0, 1, 2]
    assert ring_log == ["wait a", "record a", "wait b", "record b", "wait a", "record a"]


def test_ring_copies_smaller_slabs_and_converts(new_event: Callable[[], LoggedEvent]) -> None:
    ring = PinnedRing(256, pin_memory=False, new_event=new_event)
    slab, target = torch.arange(32, dtype=torch.float32), torch.zeros(32, dtype=torch.bfloat16)
    ring.copy(slab, target)
    assert torch.equal(target.float(), slab)


@pytest.fixture
def shared_file() -> Tensor:
    """24 MB of /dev/shm, mapped as Ray maps its object store."""
    with TemporaryFile(dir="/dev/shm") as file:
        return torch.from_numpy(np.asarray(np.memmap(file, np.uint8, "w+", shape=24_000_000)))


def slabs_of(memory: Tensor, num_slabs: int, slab_bytes: int) -> list[Tensor]:
    """Apart by less than a page, and filled with random bytes."""
    slabs = [memory[index * (slab_bytes + 192) + 64 :][:slab_bytes] for index in range(num_slabs)]
    generator = torch.Generator().manual_seed(1)
    for slab in slabs:
        slab.random_(0, 256, generator=generator)
    return slabs


@pytest.mark.gpu
@needs_gpu
def test_gpu_copies_from_registered_shared_memory(shared_file: Tensor) -> None:
    """In place where one registration holds a slab; through the ring where two do."""
    slabs = slabs_of(shared_file, num_slabs=40, slab_bytes=500_032)
    registration = HostRegistration(CudaHostMemory(torch.device("cuda")), chunk_bytes=1000 * PAGE_BYTES)
    registration.extend(slabs[:20])
    registration.extend(slabs)
    assert all(slab.is_pinned() for slab in slabs)
    assert 30 < sum(map(registration.covers, slabs)) < 40
    ring, copies = PinnedRing(500_032), torch.empty(40, 500_032, dtype=torch.uint8, device="cuda")
    for slab, copy in zip(slabs, copies, strict=True):
        if registration.covers(slab):
            copy.copy_(slab, non_blocking=True)
        else:
            ring.copy(slab, copy)
    assert torch.equal(copies.cpu(), torch.stack(slabs))
    registration.close()
    assert not any(slab.is_pinned() for slab in slabs)
    assert torch.equal(slabs[3].to("cuda").cpu(), slabs[3])


@pytest.mark.gpu
@needs_gpu
def test_gpu_works_on_after_a_failed_registration(shared_file: Tensor) -> None:
    cuda = CudaHostMemory(torch.device("cuda"))
    start = pages(shared_file, 0, 1).start
    assert cuda.register(start, 8 * PAGE_BYTES) == 0
    assert cuda.register(start, 8 * PAGE_BYTES) == ALREADY_REGISTERED
    assert int(torch.ones(5, device="cuda").sum()) == 5
    assert str(ALREADY_REGISTERED) in cuda.describe(ALREADY_REGISTERED)
    registration = HostRegistration(cuda)
    registration.extend([shared_file[8 * PAGE_BYTES - 64 : 20 * PAGE_BYTES]])
    assert registration.num_bytes == 12 * PAGE_BYTES
    registration.close()
    assert cuda.unregister(start) == 0
    assert cuda.unregister(start) != 0
    assert int(torch.ones(5, device="cuda").sum()) == 5


@pytest.mark.gpu
@needs_gpu
def test_gpu_ring_copies_pageable_slabs() -> None:
    slabs = slabs_of(torch.empty(12_000_000, dtype=torch.uint8), num_slabs=10, slab_bytes=1_000_000)
    ring, targets = PinnedRing(1_000_000), torch.empty(10, 1_000_000, dtype=torch.uint8, device="cuda")
    for slab, target in zip(slabs, targets, strict=True):
        ring.copy(slab, target)
    assert torch.equal(targets.cpu(), torch.stack(slabs))


@pytest.mark.gpu
@pytest.mark.cluster
@needs_gpu
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_gpu_copies_from_rays_object_store(ray_cluster: None) -> None:
    import ray

    random = np.random.default_rng(1)
    expected = [random.integers(0, 256, 1 << 20, np.uint8) for _ in range(64)]
    refs = [ray.put(slab) for slab in expected]
    arrays = ray.get(refs)
    views = [torch.from_numpy(array) for array in arrays]
    registration = HostRegistration(CudaHostMemory(torch.device("cuda")))
    registration.extend(views)
    assert all(registration.covers(view) for view in views)
    copies = [view.to("cuda", non_blocking=True) for view in views]
    assert all(np.array_equal(copy.cpu(), slab) for copy, slab in zip(copies, expected, strict=True))
    registration.close()
