"""All systems of the speed table compute the same, from slots or not; tables, recordings and mistakes are what they say."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.sida.data.build import read_task
from benchmarks.sida.models import BaseShape, base_config
from benchmarks.sida.speed.engine_runs import with_mistakes
from benchmarks.sida.speed.host_model import HostModel
from benchmarks.sida.speed.measure import Rates, limits_ms, measure_resident, measure_slots
from benchmarks.sida.speed.resident import RESIDENT_SYSTEMS
from benchmarks.sida.speed.sentences import Recording, Sentence, draw, route_by_routers, write_recording
from common.hash_table import HashTable

NUM_EXPERTS = 8
SHAPE = BaseShape(vocab_size=6208, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=4)


@pytest.fixture(scope="module")
def host() -> Iterator[HostModel]:
    model = HostModel(base_config(SHAPE, NUM_EXPERTS, torch.float32), torch.device("cpu"), seed=0)
    yield model
    model.close()


@pytest.fixture(scope="module")
def sentences(host: HostModel, tiny_data: Path) -> list[Sentence]:
    return route_by_routers(host, draw(read_task(tiny_data, "short", "test").ids, 4, False, seed=0)[1])


def test_every_way_to_compute_resident_experts_is_the_same(
    host: HostModel, sentences: list[Sentence]
) -> None:
    with host.all_resident():
        logits = [measure_resident(host, sentences, system, runs=1)[1] for system in RESIDENT_SYSTEMS]
    for others in logits[1:]:
        for one, other in zip(logits[0], others, strict=True):
            assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("num_slots", [3, NUM_EXPERTS])
def test_few_slots_give_the_logits_of_all_resident(
    host: HostModel, sentences: list[Sentence], num_slots: int, prefetch: bool
) -> None:
    with host.all_resident():
        _, expected = measure_resident(host, sentences, "grouped", runs=1)
    tables = {sentence.request_id: sentence.table if prefetch else None for sentence in sentences}
    row, logits = measure_slots(
        host, sentences, num_slots, "lru", prefetch, lambda sentence: tables[sentence.request_id], runs=2
    )
    for one, other in zip(logits, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert (row["hit_rate"] == 1.0) == (num_slots == NUM_EXPERTS)
    assert (row["moved_gb_per_sentence"] == 0.0) == (num_slots == NUM_EXPERTS)


def test_a_table_that_names_other_experts_changes_no_logit(
    host: HostModel, sentences: list[Sentence]
) -> None:
    with host.all_resident():
        _, expected = measure_resident(host, sentences, "grouped", runs=1)
    wrong = {each.request_id: with_mistakes(each.table, 0.0, NUM_EXPERTS, seed=1) for each in sentences}
    _, logits = measure_slots(host, sentences, 3, "lru", True, lambda each: wrong[each.request_id], runs=1)
    for one, other in zip(logits, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_mistakes_are_as_many_as_the_hit_rate_leaves() -> None:
    ids = np.full((2, 1000, 1), 70, np.uint16)
    table = HashTable(ids, np.ones(ids.shape, np.float16), "model", "recorded", "1")
    found = with_mistakes(table, 0.9, 128, seed=0).expert_ids == 70
    assert found.mean() == pytest.approx(0.9, abs=0.02)


def test_padded_sentences_are_as_long_as_the_longest(tiny_data: Path) -> None:
    ids = read_task(tiny_data, "short", "test").ids
    numbers, unpadded = draw(ids, 4, False, seed=0)
    _, padded = draw(ids, 4, True, seed=0)
    assert {len(row) for row in padded} == {max(map(len, unpadded))}
    for number, row, longer in zip(numbers, unpadded, padded, strict=True):
        assert row == tuple(ids[number][ids[number] >= 0].tolist())
        assert longer[: len(row)] == row
        assert not any(longer[len(row) :])


def test_a_recording_routes_each_layer_like_the_trained_one_at_its_depth(
    host: HostModel, tiny_data: Path, tmp_path: Path
) -> None:
    ids = read_task(tiny_data, "short", "test").ids
    experts = np.stack([np.full(ids.shape, 5), np.full(ids.shape, 6)])  # two trained layers
    write_recording(tmp_path / "routing.npz", NUM_EXPERTS, ids, experts)
    recording = Recording(tmp_path / "routing.npz", NUM_EXPERTS)
    for sentence in recording.sentences(host, 4, True, seed=0):
        length = len(sentence.token_ids)
        assert sentence.table.expert_ids.shape == (2, length, 1)
        assert set(sentence.table.expert_ids[0].ravel()) <= {5, 0}
        assert sentence.table.expert_ids[1, 0, 0] == 6
    with pytest.raises(ValueError, match="8 experts, not 16"):
        Recording(tmp_path / "routing.npz", 16)


def test_limits_count_each_needed_weight_once(host: HostModel, sentences: list[Sentence]) -> None:
    distinct = np.mean([sentence.distinct_experts().sum() for sentence in sentences])
    needed = host.dense_bytes + distinct * host.layout.slab_bytes
    limits = limits_ms(host, sentences, {"moved_gb_per_sentence": 0.5}, Rates(link=50.0, device_read=1e-3))
    assert limits == {"read_limit_ms": pytest.approx(needed / 1e3, abs=1e-3), "link_limit_ms": 10.0}
