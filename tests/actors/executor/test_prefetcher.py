"""When a layer's experts are copied: after the pass before has left the layer, and not once its own pass is there."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from actors.executor.passes import Pass, PassClock
from actors.executor.prefetcher import PrefetchPlan, QueueingPrefetcher, ThreadedPrefetcher, plan_prefetch
from tests.actors.executor.test_pager import NUM_LAYERS, NumberedSource, make_device_pager, make_host_pager


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.001)


@pytest.fixture
def clock() -> PassClock:
    return PassClock(NUM_LAYERS)


@pytest.fixture
def source() -> NumberedSource:
    return NumberedSource()


@pytest.fixture
def prefetcher(clock: PassClock, source: NumberedSource) -> Iterator[ThreadedPrefetcher]:
    prefetcher = ThreadedPrefetcher(make_host_pager(num_slots=3, source=source), clock)
    prefetcher.start()
    yield prefetcher
    prefetcher.stop()
    prefetcher.stop()  # twice is fine


def plan(pass_number: int, *by_layer: list[int]) -> PrefetchPlan:
    return PrefetchPlan(pass_number, by_layer, on_copied=lambda _: None)


def test_plans_the_most_wanted_experts_that_fit() -> None:
    ids = np.array([[[1, 4], [4, 5], [4, 1]], [[0, 2], [0, 2], [3, 2]]], np.uint16)
    made = plan_prefetch(ids, num_experts=6, num_slots=2, pass_number=7, on_copied=lambda _: None)
    assert made.experts_by_layer == [[4, 1], [2, 0]]


def test_copies_at_once_for_the_next_pass_when_none_runs(
    prefetcher: ThreadedPrefetcher, source: NumberedSource
) -> None:
    prefetcher.submit(plan(0, [1, 2], [3]))
    wait_until(lambda: source.fetched == [(0, 1), (0, 2), (1, 3)])


def test_waits_until_the_running_pass_has_left_the_layer(
    prefetcher: ThreadedPrefetcher, source: NumberedSource, clock: PassClock
) -> None:
    clock.begin_pass(Pass(1))
    clock.enter(0)
    prefetcher.submit(plan(1, [1], [2]))
    clock.leave(0)
    wait_until(lambda: source.fetched == [(0, 1)])
    clock.enter(1)
    assert source.fetched == [(0, 1)]
    clock.leave(1)
    wait_until(lambda: source.fetched == [(0, 1), (1, 2)])


def test_skips_layers_that_their_pass_has_reached(
    prefetcher: ThreadedPrefetcher, source: NumberedSource, clock: PassClock
) -> None:
    clock.begin_pass(Pass(1))
    clock.enter(0)
    prefetcher.submit(plan(0, [1], [2]))
    wait_until(lambda: source.fetched == [(1, 2)])


def test_goes_on_after_a_failure(source: NumberedSource, prefetcher: ThreadedPrefetcher) -> None:
    source.broken = {(0, 1)}
    prefetcher.submit(plan(0, [1], [2]))
    prefetcher.submit(plan(0, [4], []))
    wait_until(lambda: source.fetched == [(0, 4)])


def test_stop_ends_a_wait_for_a_pass_that_never_comes(prefetcher: ThreadedPrefetcher) -> None:
    prefetcher.submit(plan(5, [1], [2]))
    stopper = threading.Thread(target=prefetcher.stop)
    stopper.start()
    stopper.join(10)
    assert not stopper.is_alive()


def test_queues_each_layer_when_the_one_before_is_over(clock: PassClock, source: NumberedSource) -> None:
    pager = make_device_pager(num_slots=3, source=source)
    prefetcher = QueueingPrefetcher(pager, clock)
    copied: list[int] = []
    prefetcher.submit(PrefetchPlan(0, [[1, 2], [3]], copied.append))
    prefetcher.submit(PrefetchPlan(1, [[4], [5]], copied.append))
    for pass_number in range(2):
        clock.begin_pass(Pass(1))
        with pager.host_pass():
            fetched_before = len(source.fetched)
            prefetcher.after_layer(-1)
            assert source.fetched[fetched_before:] == [[(0, 1), (0, 2)], [(0, 4)]][pass_number]
            prefetcher.after_layer(0)
            prefetcher.after_layer(1)
        clock.end_pass()
    assert source.fetched == [(0, 1), (0, 2), (1, 3), (0, 4), (1, 5)]
    assert len(copied) == 5


def test_copies_for_the_next_pass_behind_those_for_the_next_layer(
    clock: PassClock, source: NumberedSource
) -> None:
    pager = make_device_pager(num_slots=3, source=source)
    prefetcher = QueueingPrefetcher(pager, clock, for_next_pass=True)
    prefetcher.submit(plan(0, [1], [2]))
    prefetcher.submit(plan(1, [3], [4]))
    clock.begin_pass(Pass(1))
    with pager.host_pass():
        prefetcher.after_layer(-1)
        assert source.fetched == [(0, 1)]
        prefetcher.after_layer(0)
        assert source.fetched == [(0, 1), (1, 2), (0, 3)]
        prefetcher.after_layer(1)
        assert source.fetched == [(0, 1), (1, 2), (0, 3), (1, 4)]


def test_layers_without_a_table_are_left_to_demand(source: NumberedSource) -> None:
    """Those of a decoder behind an encoder."""
    clock = PassClock(NUM_LAYERS, num_encoder_layers=NUM_LAYERS - 1)
    pager = make_device_pager(num_slots=3, source=source)
    prefetcher = QueueingPrefetcher(pager, clock, for_next_pass=True)
    prefetcher.submit(plan(0, [1]))
    prefetcher.submit(plan(1, [3]))
    clock.begin_pass(Pass(1))
    with pager.host_pass():
        for layer in range(-1, NUM_LAYERS):
            prefetcher.after_layer(layer)
    assert source.fetched == [(0, 1), (0, 3)]


def test_a_pass_that_leaves_the_encoder_out_leaves_its_slots_at_once(
    prefetcher: ThreadedPrefetcher, source: NumberedSource, clock: PassClock
) -> None:
    clock.num_encoder_layers = 1
    clock.begin_pass(Pass(1))
    prefetcher.submit(plan(0, [5]))  # too late
    prefetcher.submit(plan(1, [1]))
    clock.skip_encoder()
    wait_until(lambda: source.fetched == [(0, 1)])
