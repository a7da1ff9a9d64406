"""The checks of a soak see what they are there for, on a pager whose tables are spoiled by hand."""

import random
from pathlib import Path

import pytest

from actors.executor.host_pager import HostPager
from benchmarks.gpu.page_checks import broken_page_tables, wrong_slots
from tests.actors.executor.harness import slot_model
from tests.tiny_models import make_checkpoint


@pytest.fixture
def pager(tmp_path: Path) -> HostPager:
    """Holds experts 1 and 3 of every layer."""
    pager = slot_model(make_checkpoint("qwen3_moe", tmp_path)).pager
    assert isinstance(pager, HostPager)
    for layer in range(len(pager.page_table)):
        with pager.reading(layer, [1, 3]):
            pass
    return pager


def test_a_sound_pager_passes(pager: HostPager) -> None:
    assert not [*broken_page_tables(pager), *wrong_slots(pager, random.Random(0))]


def test_two_experts_in_one_slot_are_found(pager: HostPager) -> None:
    pager.page_table[1, 0] = pager.page_table[1, 1]
    assert [text.partition(":")[0] for text in broken_page_tables(pager)] == ["layer 1"]


def test_a_slot_with_another_expert_than_its_table_says_is_found(pager: HostPager) -> None:
    pager.page_table[2][[1, 3]] = pager.page_table[2][[3, 1]]
    assert not list(broken_page_tables(pager))
    assert len(list(wrong_slots(pager, random.Random(0)))) == 2
