"""A new executor's slots, filled with what others hold: by both pagers, most useful first, never at any price."""

import logging

import pytest

from actors.executor.build import warm_up_softly
from actors.executor.warm_up import Residents, most_useful, residents_of, warm_up
from tests.actors.executor.test_pager import (
    LAYOUT,
    MakePager,
    NumberedSource,
    make_host_pager,
    make_pager,
    read,
    resident,
)

__all__ = ["make_pager"]  # the fixture: each test runs with both pagers


def peer(*by_layer: tuple[int, ...]) -> Residents:
    return Residents(NumberedSource.model_fingerprint, by_layer)


def test_what_most_peers_hold_comes_first_and_then_what_they_use_most() -> None:
    peers = [peer((4, 1, 0), (5,)), peer((3, 1, 0), (2,)), peer((0, 2), ())]
    assert most_useful(peers, num_slots=9) == [[0, 1, 3, 4, 2], [2, 5]]
    assert most_useful(peers, num_slots=2) == [[0, 1], [2, 5]]
    assert most_useful([], num_slots=2) == []


def test_an_executor_tells_what_it_holds_the_most_used_first(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=3)
    for expert_ids in ([4], [1, 4], [1], [1, 2]):
        read(pager, 0, expert_ids)
    held = residents_of(pager)
    assert held.model_fingerprint == NumberedSource.model_fingerprint
    assert held.by_layer[0][0] == 1 and set(held.by_layer[0]) == {1, 2, 4}
    assert held.by_layer[1] == ()


def test_the_new_executor_begins_with_hits(make_pager: MakePager) -> None:
    old, new = make_pager(num_slots=3), make_pager(num_slots=3)
    read(old, 0, [1, 4, 5])
    read(old, 1, [0, 2])
    assert warm_up(new, [residents_of(old)]) == 5
    assert (resident(new, 0), resident(new, 1)) == ([1, 4, 5], [0, 2])
    read(new, 0, [1, 4, 5])
    counters = new.counters(0)
    assert (counters.hits, counters.misses) == (3, 0)
    assert (counters.prefetched, counters.prefetched_used, counters.prefetched_wasted) == (3, 3, 0)
    assert counters.moved_bytes == 3 * LAYOUT.slab_bytes


def test_what_was_not_needed_counts_as_wasted(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=2)
    warm_up(pager, [peer((1, 4), ())])
    read(pager, 0, [0, 2])
    assert pager.counters(0).prefetched_wasted == 2


def test_it_takes_the_slots_of_what_nobody_holds_and_copies_nothing_twice(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=2)
    read(pager, 0, [0, 3])
    assert warm_up(pager, [peer((1, 3), ())]) == 1
    assert resident(pager) == [1, 3]


@pytest.mark.parametrize("eviction", ["lru", "fifo"])
def test_where_age_decides_the_most_useful_leaves_last(eviction: str) -> None:
    pager = make_host_pager(num_slots=3, eviction=eviction)  # on a device all of it has the same age
    warm_up(pager, [peer((4, 1, 2), ())])
    read(pager, 0, [0])
    read(pager, 0, [3])
    assert resident(pager) == [0, 3, 4]


def test_an_expert_that_cannot_be_fetched_is_a_warning(
    make_pager: MakePager, caplog: pytest.LogCaptureFixture
) -> None:
    source = NumberedSource()
    source.broken = {(1, 2)}
    pager = make_pager(num_slots=3, source=source)
    warm_up_softly(pager, [peer((1, 4), (2,))], logging.getLogger("test"))
    (warning,) = caplog.records
    assert warning.levelname == "WARNING" and "expert 2 of layer 1" in warning.getMessage()
    read(pager, 0, [1, 4])
    assert pager.counters(0).hits == 2
    source.broken.clear()
    read(pager, 1, [2])
