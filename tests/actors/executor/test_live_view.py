"""What the live page is told of experts, the same by either pager, and by a device that pages by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.executor import live_view
from actors.executor.live_view import LiveView
from actors.executor.pager import Pager
from actors.executor.report import EngineReport, LayerReport
from tests.actors.executor.gpu.test_device_pager import make_device_pager, page
from tests.actors.executor.test_pager import KINDS, NUM_EXPERTS, NUM_LAYERS, MakePager, make_host_pager, read


@pytest.fixture(params=KINDS)
def make_pager(request: pytest.FixtureRequest) -> MakePager:
    return KINDS[request.param]


@pytest.fixture
def every_look_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_view, "PERIOD_S", 0.0)


def report_of(pager: Pager) -> EngineReport:
    layers = [
        LayerReport.of(layer, pager.resident(layer).nonzero()[0].tolist(), pager.counters(layer), None)
        for layer in range(NUM_LAYERS)
    ]
    tables = {"on_time": 0, "late": 0, "lost": 0, "unusable": 0}
    return EngineReport("host", pager.num_slots, NUM_EXPERTS, tuple(layers), {}, tables, 2, 1, 30, 20)


def view_of(pager: Pager) -> LiveView:
    return LiveView(pager.activity, lambda: report_of(pager))


@pytest.mark.usefixtures("every_look_is_new")
def test_marks_what_happened_since_the_last_look(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=3)
    view = view_of(pager)
    read(pager, 0, [0, 1])
    with pager.host_pass():
        pager.prefetch(0, 5, keep=())
    assert view.look()["experts"] == ["mm...p", "......"]
    assert view.look()["experts"] == ["oo...p", "......"], "nothing happened"
    read(pager, 0, [1, 5])
    read(pager, 1, [2])
    assert view.look()["experts"] == ["oh...h", "..m..."]
    read(pager, 0, [3])
    assert view.look()["experts"] == [".o.m.o", "..o..."], "0 has left its slot"


@pytest.mark.usefixtures("every_look_is_new")
def test_an_expert_that_came_and_left_between_two_looks_was_missed(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=1)
    view = view_of(pager)
    for expert_id in (0, 1, 2):
        read(pager, 0, [expert_id])
    assert view.look()["experts"][0] == "mmm..."


def test_answers_everybody_within_a_period_alike(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=3)
    view = view_of(pager)
    read(pager, 0, [0])
    first = view.look()
    read(pager, 0, [1])
    assert view.look() == first
    assert first["experts"][0] == "m....."


def test_sums_the_layers_up(make_pager: MakePager) -> None:
    pager = make_pager(num_slots=2)
    for layer in range(NUM_LAYERS):
        read(pager, layer, [0, 1])
        read(pager, layer, [1])
    seen = view_of(pager).look()
    assert (seen["hits"], seen["misses"]) == (2, 4)
    assert seen["moved_bytes"] == 4 * pager.source.layout.slab_bytes
    assert (seen["num_running"], seen["num_waiting"]) == (2, 1)
    assert (seen["prompt_tokens"], seen["generated_tokens"]) == (30, 20)


@pytest.mark.usefixtures("every_look_is_new")
def test_the_host_tells_how_many_of_the_uses_were_misses() -> None:
    pager = make_host_pager(num_slots=2)
    view = view_of(pager)
    for needed in ([0, 1], [0, 2], [0, 1], [0, 1], [0, 1]):
        read(pager, 0, needed)
    assert view.look()["experts"][0] == "ijm...", "0 missed once in five, 1 twice in four, 2 whenever needed"


def _coarse(row: str) -> str:
    return "".join("n" if mark in live_view.NEEDED_MARKS else mark for mark in row)


expert_ids = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=2, max_size=2, unique=True)
steps = st.lists(st.tuples(st.integers(0, NUM_LAYERS - 1), expert_ids), max_size=12)


@given(steps=steps, num_slots=st.integers(2, NUM_EXPERTS - 1), look_every=st.integers(1, 4))
@settings(deadline=None, max_examples=12)
def test_the_device_shows_what_the_host_shows(
    device: str, steps: list[tuple[int, list[int]]], num_slots: int, look_every: int
) -> None:
    on_device, on_host = make_device_pager(num_slots, "lru", device), make_host_pager(num_slots)
    before = on_device.activity(), on_host.activity()
    for number, (layer, needed) in enumerate(steps, start=1):
        page(on_device, layer, torch.tensor([needed]))
        read(on_host, layer, sorted(needed))
        if number % look_every == 0:
            on_device.refresh()
            now = on_device.activity(), on_host.activity()
            drawn = [live_view._draw(*pair) for pair in zip(before, now, strict=True)]
            assert [_coarse(row) for row in drawn[0]] == [_coarse(row) for row in drawn[1]]
            if look_every == 1:  # the one use was a hit or a miss, and nothing can have come back since
                assert drawn[0] == drawn[1]
            before = now
