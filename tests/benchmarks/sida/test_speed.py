"""All systems of the speed table compute the same, from slots or not; tables, recordings and mistakes are what they say."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.sida.data.build import read_task
from benchmarks.sida.models import BaseShape, base_config
from benchmarks.sida.sizes import SIZES
from benchmarks.sida.speed import __main__ as speed
from benchmarks.sida.speed.engine_runs import EngineRuns, with_mistakes
from benchmarks.sida.speed.host_model import HostModel
from benchmarks.sida.speed.measure import Rates, Runs, limits_ms, measure_engine, measure_resident
from benchmarks.sida.speed.sentences import Recording, Sentence, draw, route_by_routers, write_recording
from benchmarks.sida.speed.summary import print_summary, summarise
from benchmarks.sida.task_quality import ROUTING_FILE
from benchmarks.sida.workshop import routing_folder
from common.hash_table import HashTable

NUM_EXPERTS = 8
SHAPE = BaseShape(vocab_size=6208, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=4)


@pytest.fixture(scope="module")
def host() -> Iterator[HostModel]:
    model = HostModel(base_config(SHAPE, NUM_EXPERTS, torch.float32), torch.device("cpu"), seed=0)
    yield model
    model.close()


@pytest.fixture(scope="module")
def runs(host: HostModel, tiny_data: Path) -> Runs:
    """One warms up, one is timed."""
    token_ids = draw(read_task(tiny_data, "short", "test").ids, 8, False, seed=0)[1]
    with host.all_resident():
        sentences = route_by_routers(host, "short", token_ids)
    return sentences[:4], sentences[4:]


@pytest.fixture(scope="module")
def expected(host: HostModel, runs: Runs) -> list[Tensor]:
    """Logits of the library's grouped GEMM."""
    with host.all_resident():
        return measure_resident(host, runs, "grouped")[1]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@contextmanager
def running(host: HostModel, runs: Runs, num_slots: int, prefetch: bool) -> Iterator[EngineRuns]:
    with host.slots(num_slots, "lru") as slot_model:
        engine = EngineRuns(slot_model, [sentence for run in runs for sentence in run], prefetch)
        try:
            yield engine
        finally:
            engine.stop()


@pytest.mark.parametrize("system", ["loop", "skip-empty"])
def test_every_way_to_compute_resident_experts_is_the_same(
    host: HostModel, runs: Runs, expected: list[Tensor], system: str
) -> None:
    with host.all_resident():
        assert_close(measure_resident(host, runs, system)[1], expected)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("num_slots", [3, NUM_EXPERTS])
def test_few_slots_give_the_logits_of_all_resident(
    host: HostModel, runs: Runs, expected: list[Tensor], num_slots: int, prefetch: bool
) -> None:
    with running(host, runs, num_slots, prefetch) as engine:
        row, logits = measure_engine(host, engine, runs, lambda each: each.table if prefetch else None)
    assert_close(logits, expected)
    assert (row["hit_rate"] == 1.0) == (num_slots == NUM_EXPERTS)
    assert (row["moved_gb_per_sentence"] == 0.0) == (num_slots == NUM_EXPERTS)


def test_a_table_that_names_other_experts_changes_no_logit(
    host: HostModel, runs: Runs, expected: list[Tensor]
) -> None:
    with running(host, runs, 3, True) as engine:
        _, logits = measure_engine(
            host, engine, runs, lambda each: with_mistakes(each.table, 0.0, NUM_EXPERTS, seed=1)
        )
    assert_close(logits, expected)


def test_the_clock_of_a_run_begins_before_the_first_prediction(host: HostModel, runs: Runs) -> None:
    predicted: list[float] = []

    def predict(sentence: Sentence) -> HashTable:
        predicted.append(time.perf_counter())
        time.sleep(0.02)
        return sentence.table

    with running(host, runs, 3, True) as engine:
        began = time.perf_counter()
        timed = engine.run(runs[1], predict)
    assert began + timed.seconds > predicted[0] + 4 * 0.02
    assert len(timed.predictions_s) == 4
    assert min(timed.predictions_s) >= 0.02


def test_all_systems_run_on_recorded_routing(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = read_task(tiny_data, "short", "test").ids
    folder = routing_folder(tmp_path / "cpu", NUM_EXPERTS, "short")
    folder.mkdir(parents=True)
    write_recording(folder / ROUTING_FILE, NUM_EXPERTS, ids, np.tile(ids % NUM_EXPERTS, (1, 1, 1)))

    @contextmanager
    def no_process(*_args: object) -> Iterator[Callable[[Sentence], None]]:
        yield lambda _sentence: None

    monkeypatch.setattr(speed, "hash_function_process", no_process)
    monkeypatch.setattr(speed, "measured_bandwidths", lambda _device: {"host_pageable_to_device": 1.0})
    monkeypatch.setattr(speed, "device_read_gb_per_s", lambda _device: 1.0)
    monkeypatch.setitem(SIZES, "cpu", replace(SIZES["cpu"], speed=replace(SIZES["cpu"].speed, shape=SHAPE)))
    options = ["--routing", "trained", "--experts", "8", "--task", "short", "--sentences", "2", "--runs", "2"]
    monkeypatch.setattr(
        "sys.argv", ["speed", *options, "--slots", "3", "--device", "cpu", "--work", str(tmp_path)]
    )
    record = speed.Benchmark(speed.parse_arguments()).run()
    found = {(row["padding"], row["system"]) for row in record["results"]}
    assert found == {
        *(("unpadded", system) for system in speed.SYSTEMS),
        *(("padded", system) for system in speed.PADDED_SYSTEMS),
    }
    assert max(row["logit_difference"] for row in record["results"]) < 1e-4
    assert not any(row.get("engine_difference", 0.0) for row in record["results"])
    assert {row["system"] for row in record["summary"]} == {"on-demand", "sida", "sida-exact", "oracle"}


def test_a_summary_compares_with_the_faster_of_those_that_skip_empty_experts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    case: dict[str, Any] = {"experts": 256, "dtype": "float32", "task": "short", "padding": "unpadded"}
    case["distinct_experts_per_layer"] = 13.0
    rates = {"loop": 2.0, "skip-empty": 5.0, "grouped": 10.0, "all-slots": 40.0, "sida": 20.0}
    rows = [
        {
            **case,
            "system": system,
            "slots": 32,
            "sentences_per_s": rate,
            "peak_gpu_gb": 10.0 if rate < 20 else 2.5,
        }
        for system, rate in rates.items()
    ]
    rows[3]["peak_gpu_gb"] = 10.5
    (row,) = summarise(rows)
    assert (row["over_loop"], row["over_skip_empty"], row["over_all_slots"]) == (10.0, 2.0, 0.5)
    assert row["memory_share"] == 0.25
    print_summary(rows)
    assert "10.00 (3.93) | 2.00 | 0.75 (0.80)" in capsys.readouterr().out


def test_more_sentences_than_there_are_are_refused(tiny_data: Path) -> None:
    with pytest.raises(ValueError, match="9 sentences are asked for and 8 there"):
        draw(read_task(tiny_data, "short", "test").ids, 9, False, seed=0)


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
    for sentence in recording.sentences(host, "short", 4, True, seed=0):
        length = len(sentence.token_ids)
        assert sentence.table.expert_ids.shape == (2, length, 1)
        assert set(sentence.table.expert_ids[0].ravel()) <= {5, 0}
        assert sentence.table.expert_ids[1, 0, 0] == 6
    with pytest.raises(ValueError, match="8 experts, not 16"):
        Recording(tmp_path / "routing.npz", 16)


def test_limits_count_each_needed_weight_once(host: HostModel, runs: Runs) -> None:
    sentences = runs[0]
    distinct = np.mean([sentence.distinct_experts().sum() for sentence in sentences])
    needed = host.dense_bytes + distinct * host.layout.slab_bytes
    limits = limits_ms(host, sentences, {"moved_gb_per_sentence": 0.5}, Rates(link=50.0, device_read=1e-3))
    assert limits == {"read_limit_ms": pytest.approx(needed / 1e3, abs=1e-3), "link_limit_ms": 10.0}
