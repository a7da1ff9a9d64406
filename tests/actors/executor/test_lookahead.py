"""What is copied while a pass computes: what the predictor names last, the nearest layer first, and nothing too late."""

import logging
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.host_pager import HostPager
from actors.executor.lookahead import Lookahead
from actors.executor.pager import PrefetchCounts
from actors.executor.passes import Pass, PassClock
from actors.predictor.decoding import Shares
from tests.actors.executor.test_pager import NUM_EXPERTS, NUM_LAYERS, NumberedSource, make_host_pager, read
from tests.actors.executor.test_prefetcher import wait_until

NOBODY: Shares = np.zeros((NUM_LAYERS, NUM_EXPERTS), np.float32)


class Scripted:
    """Names what a test tells it to; `heard` is what it was told."""

    def __init__(self) -> None:
        self.shares = NOBODY.copy()
        self.heard: list[object] = []
        self.gate = threading.Event()  # `observe` waits for it
        self.gate.set()

    def begin_pass(self, requests: Sequence[str]) -> None:
        self.heard.append(("begin", *requests))

    def predict(self, layer: int) -> Shares:
        return self.shares[layer:]

    def observe(self, layer: int, expert_ids: Sequence[NDArray[np.int64]], hidden: Tensor | None) -> None:
        assert self.gate.wait(10)
        if not expert_ids:
            raise ValueError("a predictor's mistake")
        self.heard.append((layer, [ids.tolist() for ids in expert_ids]))

    def end_request(self, request: str) -> None:
        self.heard.append(("end", request))


class Setting:
    def __init__(self) -> None:
        self.source, self.clock, self.predictor = NumberedSource(), PassClock(NUM_LAYERS), Scripted()
        self.pager: HostPager = make_host_pager(num_slots=3, source=self.source)
        self.lookahead = Lookahead(self.predictor, "scripted", self.pager, self.clock, copies=2)


IDS = [np.array([[0, 1]])]


@pytest.fixture
def setting() -> Iterator[Setting]:
    setting = Setting()
    setting.lookahead.start()
    yield setting
    setting.predictor.gate.set()
    setting.lookahead.stop()
    setting.lookahead.stop()  # twice is fine


def test_copies_what_is_named_before_the_first_layer(setting: Setting) -> None:
    setting.predictor.shares[0, [4, 2]] = 0.4, 0.6
    setting.lookahead.follow(["a"])
    wait_until(lambda: setting.source.fetched == [(0, 2), (0, 4)])


def test_copies_at_most_so_many_and_the_nearer_layer_first(setting: Setting) -> None:
    setting.predictor.shares[0, 1] = setting.predictor.shares[1, 2] = 0.5
    setting.predictor.shares[1, 3] = 0.4
    followed = setting.lookahead.follow(["a"])
    assert followed is not None
    wait_until(lambda: setting.source.fetched == [(0, 1), (1, 2)])
    wait_until(lambda: followed.num_copied == 2)
    followed.routed(0, IDS)
    wait_until(lambda: setting.source.fetched[2:] == [(1, 3)])


def test_hears_of_every_layer_and_every_end_in_order(setting: Setting) -> None:
    followed = setting.lookahead.follow(["a", "b"], lengths=[2, 1], predicts=False)
    assert followed is not None
    padded = [np.array([[0, 1], [2, 3]]), np.array([[4, 5], [4, 5]])]
    followed.routed(0, padded)
    followed.routed(1, padded)
    setting.lookahead.end_request("b")
    tokens = [[[0, 1], [2, 3]], [[4, 5]]]
    wait_until(
        lambda: setting.predictor.heard == [("begin", "a", "b"), (0, tokens), (1, tokens), ("end", "b")]
    )


def test_learns_from_prompts_without_copying(setting: Setting) -> None:
    setting.predictor.shares[:] = 1
    followed = setting.lookahead.follow(["a"], predicts=False)
    assert followed is not None
    followed.routed(0, IDS)
    wait_until(lambda: len(setting.predictor.heard) == 2)
    setting.lookahead.follow(["a"])
    wait_until(lambda: len(setting.source.fetched) == 2)


def test_gives_up_a_layer_that_has_begun(setting: Setting) -> None:
    followed = setting.lookahead.follow(["a"])
    assert followed is not None
    wait_until(lambda: len(setting.predictor.heard) == 1)
    setting.predictor.gate.clear()
    setting.predictor.shares[1, 2] = 0.5
    setting.clock.begin_pass(Pass(1))
    followed.routed(0, IDS)
    setting.clock.enter(1)
    setting.predictor.gate.set()
    wait_until(lambda: len(setting.predictor.heard) == 2)
    setting.lookahead.end_request("a")
    wait_until(lambda: ("end", "a") in setting.predictor.heard)
    assert setting.source.fetched == []


def test_newer_word_replaces_older_predictions(setting: Setting) -> None:
    followed = setting.lookahead.follow(["a"])
    assert followed is not None
    wait_until(lambda: len(setting.predictor.heard) == 1)
    setting.predictor.gate.clear()
    setting.predictor.shares[1, [1, 2]] = 0.5
    followed.routed(0, IDS)
    followed.routed(1, IDS)
    setting.predictor.gate.set()
    wait_until(lambda: len(setting.predictor.heard) == 3)
    assert setting.source.fetched == [], "when layer 0 was heard of, layer 1 was routed already"


def test_a_predictor_that_is_far_behind_leaves_passes_out(setting: Setting) -> None:
    setting.predictor.gate.clear()
    passes = [setting.lookahead.follow([f"{number}"]) for number in range(40)]
    assert passes[0] is not None
    passes[0].routed(0, IDS)
    while (followed := setting.lookahead.follow(["more"])) is not None:
        followed.routed(0, IDS)
    setting.predictor.gate.set()
    wait_until(lambda: setting.lookahead.follow(["again"]) is not None)


def test_goes_on_after_a_mistake(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        followed = setting.lookahead.follow(["a"])
        assert followed is not None
        followed.routed(0, [])
        wait_until(lambda: "given up" in caplog.text)
    setting.source.broken = {(0, 3)}
    setting.predictor.shares[0, [3, 4]] = 0.6, 0.4
    setting.lookahead.follow(["a"])
    setting.source.broken = set()
    setting.lookahead.follow(["a"])
    wait_until(lambda: (0, 4) in setting.source.fetched)


def test_copies_are_counted_under_the_predictors_name(setting: Setting) -> None:
    setting.predictor.shares[0, [4, 2]] = 0.4, 0.6
    setting.lookahead.follow(["a"])
    wait_until(lambda: setting.pager.prefetches() == {"scripted": PrefetchCounts(copied=2)})
    read(setting.pager, 0, [2])
    setting.pager.prefetch(0, 5, keep=())
    read(setting.pager, 0, [0, 1, 3])
    assert setting.pager.prefetches() == {
        "scripted": PrefetchCounts(copied=2, used=1, wasted=1),
        "hash-function": PrefetchCounts(copied=1, used=0, wasted=1),
    }
    counters = setting.pager.counters(0)
    assert (counters.prefetched, counters.prefetched_used, counters.prefetched_wasted) == (3, 1, 2)
