"""Sequence classification in the engine: the unpaged model, text by text, is the measure."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.executor.build import build_engine
from actors.executor.classify import classify
from actors.executor.engine import EngineLimits
from actors.executor.expert_source import CheckpointExpertSource
from actors.executor.predicted_routing import PredictedRouting
from actors.predictor.predictor import HashFunctionPredictor
from common.architecture import describe_architecture, load_config
from common.checkpoint import Checkpoint
from common.config import ServingConfig
from common.errors import ExpertsUnavailableError, HashTableError, NonFiniteLogitsError
from common.own_experts.switch_transformers import SwitchTransformersForSequenceClassification
from tests.actors.executor.harness import Harness, slot_model, start_engine
from tests.actors.executor.test_device_memory import FakeMeter, measure
from tests.actors.executor.test_engine import GatedSource
from tests.actors.predictor.conftest import make_function
from tests.tiny_models import NUM_EXPERTS, make_classifier_checkpoint

LABELS = ("no", "perhaps", "yes")
TEXTS = (
    [5, 9, 12, 7, 3, 4, 8, 11, 2, 6, 13, 14, 25],
    [17, 3, 20, 21],
    [30, 31, 32, 33, 34, 35, 36],
    [40],
    [41, 7],
)
LIMITS = EngineLimits(max_batch_size=3, prefill_chunk_tokens=9, max_queued_requests=8)

StartEngine = Callable[..., Harness]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier_checkpoint(tmp_path_factory.mktemp("classifier"), LABELS)


@pytest.fixture
def start(folder: Path) -> Iterator[StartEngine]:
    running: list[Harness] = []

    def start_one(
        num_slots: int | None = None,
        source: Any = None,
        on_device: bool = False,
        device: str = "cpu",
        **options: Any,
    ) -> Harness:
        model = slot_model(folder, num_slots, source=source, on_device=on_device, device=device)
        running.append(start_engine(model, **{"limits": LIMITS, "top_k": 1, **options}))
        return running[-1]

    yield start_one
    for harness in running:
        harness.engine.stop()


def expected_logits(folder: Path, texts: Sequence[list[int]] = TEXTS) -> Tensor:
    model = SwitchTransformersForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([text])).logits for text in texts])


def assert_says(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert logits.argmax(1).tolist() == expected.argmax(1).tolist()


@pytest.mark.parametrize("num_slots", [None, 3, NUM_EXPERTS])
def test_texts_of_all_lengths_together_are_judged_as_each_alone(
    start: StartEngine, folder: Path, num_slots: int | None
) -> None:
    expected = expected_logits(folder)
    assert len(set(expected.argmax(1).tolist())) > 1
    assert_says(classify(start(num_slots).engine, TEXTS), expected)


def test_a_device_pages_by_itself_and_no_slot_count_changes_a_bit(
    start: StartEngine, folder: Path, device: str
) -> None:
    pytest.importorskip("triton")
    texts = [
        TEXTS[3],
        [7 + token for token in range(17)],
    ]  # the last is longer than captured passes
    tables = true_tables(folder, texts)
    tables[0].expert_ids[0, 0] = (tables[0].expert_ids[0, 0] + 1) % NUM_EXPERTS  # a wrong guess
    logits = []
    for num_slots in (NUM_EXPERTS, 3):
        engine = start(num_slots, on_device=True, device=device).engine
        logits.append(classify(engine, texts, tables))
        report = engine.report()
        assert report.paging == "device"
        for layer in report.layers:
            assert layer.hits + layer.misses > 0
            assert num_slots < NUM_EXPERTS or layer.misses == 0
    assert_says(logits[0], expected_logits(folder, texts))
    assert torch.equal(logits[0], logits[1])


def test_right_tables_are_prefetched_for_this_pass_and_the_next(
    start: StartEngine, folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that the texts behind the first need is there in time; of the last one, before its pass begins."""
    pytest.importorskip("triton")
    limits = EngineLimits(3, 4, 8)  # a pass for each text
    harness = start(NUM_EXPERTS - 1, on_device=True, device=device, limits=limits)
    prefetcher, pager = harness.engine._prefetcher, harness.slot_model.pager
    assert prefetcher is not None
    begun, go_on = threading.Event(), threading.Event()
    copied: list[tuple[str, int]] = []

    def gated(layer: int) -> None:
        begun.set()
        assert go_on.wait(10)
        after_layer(layer)

    def spied(name: str) -> Callable[[int, list[int]], None]:
        copy = getattr(pager, name)

        def spy(layer: int, expert_ids: list[int]) -> None:
            if expert_ids:
                copied.append((name, layer))
            copy(layer, expert_ids)

        return spy

    after_layer = prefetcher.after_layer
    monkeypatch.setattr(prefetcher, "after_layer", gated)
    for name in ("prefetch_used", "prefetch_ahead"):
        monkeypatch.setattr(pager, name, spied(name))
    texts = TEXTS[:3]
    tables = true_tables(folder, texts)
    sinks = [harness.submit(texts[0], "0")]
    assert begun.wait(10)
    for number in (1, 2):
        sinks.append(harness.submit(texts[number], str(number)))
        harness.engine.attach_table(str(number), tables[number])
    go_on.set()
    usages = [sink.result()[-1].experts for sink in sinks]
    assert usages[0] is not None and usages[0].missed > 0
    for usage in usages[1:]:
        assert usage is not None
        assert (usage.missed, usage.predicted) == (0, usage.needed)
    report = harness.engine.report()
    assert (report.hash_tables["on_time"], report.prefetches["hash-function"].copied > 0) == (2, True)
    layers = harness.slot_model.clock.num_layers
    own = [("prefetch_used", layer) for layer in range(layers)]
    ahead = [("prefetch_ahead", layer) for layer in range(layers)]
    assert copied[0] == own[0] and sorted(copied) == sorted(own + ahead), "nothing is asked for twice"


def true_tables(folder: Path, texts: list[list[int]]) -> list[Any]:
    """What the routers choose."""
    model = SwitchTransformersForSequenceClassification.from_pretrained(folder).eval()
    function = make_function(folder)
    tables = HashFunctionPredictor(function).predict(texts)
    chosen: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(".router"):
            module.register_forward_hook(lambda _m, _i, output: chosen.append(output[0][0]))
    found = []
    for text, table in zip(texts, tables, strict=True):
        chosen.clear()
        model(input_ids=torch.tensor([text]))
        found.append(replace(table, expert_ids=torch.stack(chosen).numpy().astype(np.uint16)))
    return found


@pytest.mark.parametrize(
    ("with_tables", "on_device"),
    [(True, False), (False, False), (True, True)],
    ids=["tables on the bus", "tables lost", "paged by the device"],
)
def test_predicted_tables_route_the_classifier(
    start: StartEngine, folder: Path, device: str, with_tables: bool, on_device: bool
) -> None:
    function = make_function(folder)
    tables = HashFunctionPredictor(function).predict(TEXTS)
    model = SwitchTransformersForSequenceClassification.from_pretrained(folder).eval()
    routers = [module for name, module in model.named_modules() if name.endswith(".router")]
    expected = []
    for text, table in zip(TEXTS, tables, strict=True):
        hooks = []
        for router, ids, weights in zip(routers, table.expert_ids, table.weights, strict=True):
            routing = (
                torch.from_numpy(ids.astype(np.int64))[None],
                torch.from_numpy(weights.astype(np.float32))[None],
            )
            hooks.append(
                router.register_forward_hook(lambda _m, _i, output, routing=routing: (*routing, output[2]))
            )
        with torch.no_grad():
            expected.append(model(input_ids=torch.tensor([text])).logits)
        for hook in hooks:
            hook.remove()
    assert not torch.allclose(torch.cat(expected), expected_logits(folder), atol=0.1)
    where = {"on_device": True, "device": device} if on_device else {}
    engine = start(2, routing=PredictedRouting(function), **where).engine
    assert_says(classify(engine, TEXTS, tables if with_tables else None), torch.cat(expected))


def test_a_table_of_another_length_is_refused(start: StartEngine, folder: Path) -> None:
    source = GatedSource(folder)
    harness = start(source=source)
    source.gate.clear()
    sink = harness.submit(TEXTS[0], "r")
    [table] = HashFunctionPredictor(make_function(folder)).predict([TEXTS[1]])
    with pytest.raises(HashTableError, match="2 layers x 4 tokens, expected 2 x 13"):
        harness.engine.attach_table("r", table)
    source.gate.set()
    assert len(sink.result()) == 1


def test_one_chunk_tells_the_logits_the_experts_and_the_time(start: StartEngine, folder: Path) -> None:
    harness = start(prefetch=False)
    [chunk] = harness.submit(TEXTS[0], "r").result()
    assert (chunk.token_ids, chunk.text, chunk.finish_reason) == ((), "", "stop")
    assert chunk.label_logits == pytest.approx(expected_logits(folder)[0].tolist(), abs=1e-4)
    assert chunk.experts is not None and 0 < chunk.experts.missed <= chunk.experts.needed
    assert chunk.timings is not None and chunk.timings.prefill_s > 0
    report = harness.engine.report()
    assert (report.prompt_tokens, report.generated_tokens, report.num_running) == (len(TEXTS[0]), 0, 0)


def test_a_failed_fetch_or_a_broken_head_fails_its_texts_alone(start: StartEngine, folder: Path) -> None:
    source = GatedSource(folder)
    harness = start(2, source=source, prefetch=False)
    source.error = ExpertsUnavailableError(0, 1, 60.0)
    with pytest.raises(ExpertsUnavailableError):
        classify(harness.engine, TEXTS[:1])
    source.error = None
    head = harness.slot_model.model.classifier
    intact = head.bias.detach().clone()
    with torch.no_grad():
        head.bias[1] = float("nan")
        with pytest.raises(NonFiniteLogitsError):
            classify(harness.engine, TEXTS[:1])
        head.bias.copy_(intact)
    assert_says(classify(harness.engine, TEXTS), expected_logits(folder))


def test_cancelled_while_waiting_is_never_read(start: StartEngine, folder: Path) -> None:
    source = GatedSource(folder)
    harness = start(source=source, limits=EngineLimits(1, 9, 4))
    source.gate.clear()
    source.waiting.clear()
    first = harness.submit(TEXTS[0], "first")
    assert source.waiting.wait(10)
    second = harness.submit(TEXTS[1], "second")
    harness.engine.cancel("second")
    source.gate.set()
    first.result()
    harness.submit(TEXTS[2], "third").result()
    assert second.is_silent()


def test_its_only_memory_beside_the_slots_is_of_the_passes(folder: Path) -> None:
    memory, _, _ = measure(folder, FakeMeter())
    assert (memory.cache_bytes, memory.passes_bytes > 1200) == (0, True)


def test_the_configuration_names_the_labels_and_builds_an_engine(folder: Path) -> None:
    architecture = describe_architecture(folder)
    assert architecture.labels == LABELS
    assert (architecture.is_encoder_decoder, architecture.num_encoder_layers) == (
        False,
        architecture.num_layers,
    )
    assert load_config(folder).architectures == ["SwitchTransformersForSequenceClassification"]
    args = {"model": str(folder), "device": "cpu", "max_batch_size": 2}
    source = CheckpointExpertSource(Checkpoint.open(folder))
    engine = build_engine(ServingConfig.from_args(args, environ={}), source)
    engine.start()
    try:
        assert_says(classify(engine, TEXTS), expected_logits(folder))
    finally:
        engine.stop()
