"""Decoding predictors in the engine: they may move experts earlier, and never change a token; who may choose which."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.executor.build import build_engine
from actors.executor.drivers import new_passes, new_runner
from actors.executor.engine import EngineLimits
from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.expert_source import CheckpointExpertSource
from actors.executor.lookahead import Lookahead
from actors.executor.model_loader import SlotModel
from actors.executor.predictors import chosen_predictor, given_lookahead, new_lookahead
from actors.predictor.decoding import OraclePredictor
from actors.predictor.tracing import RoutingTracer
from common.architecture import describe_architecture
from common.checkpoint import Checkpoint
from common.config import ServingConfig
from common.errors import ConfigError
from tests.actors.executor.harness import (
    PROMPTS,
    Harness,
    library_greedy,
    library_model,
    slot_model,
    start_engine,
)
from tests.tiny_models import NUM_EXPERTS, TOP_K, make_checkpoint

NUM_TOKENS, MOST_ROUNDS = 10, 30
PREDICTORS = ("next-gate", "activation-trace", "frequency")
COUNTS = np.arange(3 * NUM_EXPERTS).reshape(3, NUM_EXPERTS) % 5 + 1


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    model = library_model(folder)
    return [library_greedy(model, prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, SlotModel]:
    pinned = [[0], [5], []]
    return {
        eviction: slot_model(folder, num_slots, eviction=eviction, pinned=pinned if num_slots > 3 else ())
        for eviction, num_slots in zip(EVICTION_POLICIES, (2, 3, 4, 5, 4), strict=True)
    }


def looking_ahead(name: str, model: SlotModel, folder: Path) -> Lookahead:
    lookahead = new_lookahead(name, model, describe_architecture(folder), COUNTS)
    assert lookahead is not None
    return lookahead


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
def test_predictions_change_no_token(
    models: dict[str, SlotModel], folder: Path, expected: list[list[int]], predictor: str, eviction: str
) -> None:
    model = models[eviction]
    harness = start_engine(model, lookahead=looking_ahead(predictor, model, folder))
    for _ in range(MOST_ROUNDS):
        assert harness.generate(PROMPTS, max_tokens=NUM_TOKENS) == expected
        if predictor in harness.engine.report().prefetches:
            break
    harness.engine.stop()
    counts = harness.engine.report().prefetches[predictor]
    assert counts.copied > 0, "else nothing was tested"
    assert counts.used + counts.wasted <= counts.copied


def test_a_request_pays_for_what_was_copied_ahead_for_it(models: dict[str, SlotModel], folder: Path) -> None:
    model = models["lru"]
    harness = start_engine(model, lookahead=looking_ahead("frequency", model, folder))
    slab_bytes = model.pager.source.layout.slab_bytes
    for number in range(MOST_ROUNDS):
        moved_before = sum(layer.moved_bytes for layer in harness.engine.report().layers)
        usage = harness.submit(PROMPTS[0], f"{number}", max_tokens=NUM_TOKENS).result()[-1].experts
        assert usage is not None
        moved = sum(layer.moved_bytes for layer in harness.engine.report().layers) - moved_before
        if moved > usage.missed * slab_bytes:
            break
    harness.engine.stop()
    assert usage is not None
    assert usage.missed * slab_bytes < usage.moved_bytes <= moved


def test_cancelled_requests_are_forgotten(models: dict[str, SlotModel], folder: Path) -> None:
    model = models["lfu"]
    lookahead = looking_ahead("activation-trace", model, folder)
    harness = start_engine(model, lookahead=lookahead)
    sink = harness.submit(PROMPTS[0], "cancelled", max_tokens=100)
    sink.next()
    harness.engine.cancel("cancelled")
    harness.generate(PROMPTS[1:], max_tokens=3)
    harness.engine.stop()
    predictor = lookahead._predictor
    assert predictor._matrices == {}  # type: ignore[attr-defined]
    assert predictor.num_entries == len(PROMPTS)  # type: ignore[attr-defined]


def test_what_an_oracle_names_is_needed(folder: Path, expected: list[list[int]]) -> None:
    """By an object: the configuration knows no oracle. Of a batch of one, whose passes are known before."""
    text = [*PROMPTS[1], *expected[1][:-1]]
    tracer = RoutingTracer(library_model(folder), folder, num_kept=1)
    ids = tracer.trace(torch.tensor([text]), torch.ones(1, len(text), dtype=torch.bool)).expert_ids[0].numpy()
    num_prompt = len(PROMPTS[1])
    passes = [ids[:num_prompt], *(ids[t : t + 1] for t in range(num_prompt, len(text)))]
    model = slot_model(folder, 4)
    for _ in range(MOST_ROUNDS):
        oracle = OraclePredictor(passes, NUM_EXPERTS)
        harness = start_engine(model, lookahead=given_lookahead(oracle, model))
        assert harness.generate([PROMPTS[1]], max_tokens=NUM_TOKENS) == [expected[1]]
        harness.engine.stop()
        counts = harness.engine.report().prefetches.get("OraclePredictor")
        if counts is not None and counts.used:
            break
    assert counts is not None
    assert counts.used == counts.copied > 0


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_predictions_change_no_token_of_a_model_with_an_encoder(tmp_path: Path, predictor: str) -> None:
    folder = make_checkpoint("switch_transformers", tmp_path, num_layers=4, tie_word_embeddings=False)
    limits = EngineLimits(max_batch_size=3, prefill_chunk_tokens=64, max_queued_requests=8)
    model = slot_model(folder, 3)
    counts = np.arange(1, 4 * NUM_EXPERTS + 1).reshape(4, NUM_EXPERTS)

    def generated(lookahead: Lookahead | None) -> tuple[list[list[int]], Harness]:
        harness = start_engine(model, limits=limits, top_k=1, lookahead=lookahead)
        return harness.generate(PROMPTS, max_tokens=NUM_TOKENS), harness

    expected, harness = generated(None)
    harness.engine.stop()
    lookahead = new_lookahead(predictor, model, describe_architecture(folder), counts)
    tokens, harness = generated(lookahead)
    for _ in range(MOST_ROUNDS):
        assert tokens == expected
        if predictor in harness.engine.report().prefetches:
            break
        tokens = harness.generate(PROMPTS, max_tokens=NUM_TOKENS)
    harness.engine.stop()
    assert harness.engine.report().prefetches[predictor].copied > 0


def config(**settings: object) -> ServingConfig:
    return ServingConfig.from_args({key: str(value) for key, value in settings.items()}, {})


@pytest.mark.parametrize(
    ("device", "settings", "chosen"),
    [
        ("cpu", {}, "none"),
        ("cuda", {}, "next-gate"),
        ("cuda", {"prefetch": "false"}, "none"),
        ("cuda", {"prefetch": "false", "decode_predictor": "next-gate"}, "next-gate"),
        ("cuda", {"routing": "predicted"}, "none"),
        ("cuda", {"decode_predictor": "none"}, "none"),
        ("cpu", {"decode_predictor": "activation-trace"}, "activation-trace"),
        ("cpu", {"decode_predictor": "frequency", "resident_set": "x"}, "frequency"),
    ],
)
def test_auto_is_what_wins_on_the_device(device: str, settings: dict[str, str], chosen: str) -> None:
    assert chosen_predictor(config(**settings), device) == chosen


@pytest.mark.parametrize(
    ("device", "settings", "told"),
    [
        ("cuda", {"decode_predictor": "activation-trace"}, "on a GPU.* one of auto, none, next-gate"),
        ("cuda", {"decode_predictor": "frequency", "resident_set": "x"}, "on a GPU.* one of auto, none"),
        ("cpu", {"decode_predictor": "frequency"}, "set resident_set"),
        ("cpu", {"decode_predictor": "next-gate", "routing": "predicted"}, "auto or none with routing"),
    ],
)
def test_refuses_what_a_device_or_a_setting_rules_out(
    device: str, settings: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError, match=f"decode_predictor='.*' is not possible: .*{told}"):
        chosen_predictor(config(**settings), device)


def test_an_engine_with_a_predictor_from_the_configuration(folder: Path, expected: list[list[int]]) -> None:
    settings = {"model": folder, "device": "cpu", "expert_slots": 3, "decode_predictor": "next-gate"}
    engine = build_engine(config(**settings), CheckpointExpertSource(Checkpoint.open(folder)))
    engine.start()
    harness = Harness(engine, slot_model=None)  # type: ignore[arg-type]  # not of interest
    for _ in range(MOST_ROUNDS):
        assert harness.generate(PROMPTS, max_tokens=NUM_TOKENS) == expected
        if "next-gate" in engine.report().prefetches:
            break
    engine.stop()
    assert engine.report().to_json()["prefetches"]["next-gate"]["copied"] > 0


def test_a_model_whose_routers_need_more_is_refused_when_it_is_built(tmp_path: Path) -> None:
    folder = make_checkpoint("minimax_m2", tmp_path)
    model = slot_model(folder, 3)
    with pytest.raises(
        ConfigError, match="decode_predictor='next-gate'.*hidden states alone.*for this model give"
    ):
        new_lookahead("next-gate", model, describe_architecture(folder))


def test_nothing_is_copied_ahead_where_every_expert_has_a_slot(folder: Path) -> None:
    model = slot_model(folder, NUM_EXPERTS)
    assert new_lookahead("frequency", model, describe_architecture(folder), COUNTS) is None
    assert new_lookahead("none", slot_model(folder, 2), describe_architecture(folder)) is None


@pytest.mark.parametrize("next_gate", [True, False])
def test_on_a_gpu_the_next_gate_is_a_switch_of_its_passes(
    folder: Path, next_gate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.executor.gpu.device_prompts import DevicePrompts

    monkeypatch.setattr(DevicePrompts, "warm_up", lambda *_: None)  # compiles, which is of no use here
    model = slot_model(folder, 4, on_device=True)
    assert new_lookahead("next-gate", model, describe_architecture(folder)) is None, "it is for hosts"
    limits = EngineLimits(max_batch_size=1, prefill_chunk_tokens=4, max_queued_requests=1)
    prompts, decoder = new_passes(model, new_runner(model, 1, 8), limits, TOP_K, next_gate=next_gate)
    assert (prompts._prefetch, decoder._prefetch) == (next_gate, next_gate)  # type: ignore[attr-defined]
