"""Text to text: prompts through the encoder, packed; then continuous batches of decoder steps. The library's own
generate(), prompt by prompt, is the measure; for NLLB with experts of ours, because the library's are wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel

from actors.executor.build import build_engine
from actors.executor.encoder_decoder import EncoderDecoderRunner
from actors.executor.engine import EngineLimits
from actors.executor.expert_source import CheckpointExpertSource
from actors.executor.packed_encoder import SourcePass
from actors.executor.predicted_routing import PredictedRouting
from actors.predictor.hash_function import save_hash_function
from actors.predictor.predictor import HashFunctionPredictor
from common.architecture import load_config, model_class
from common.checkpoint import Checkpoint
from common.config import ServingConfig
from common.errors import HashTableError, UnsupportedModelError
from common.hash_table import HashTable
from tests.actors.executor.harness import Harness, slot_model, start_engine
from tests.actors.predictor.conftest import make_function
from tests.tiny_models import ENCODER_DECODER_FAMILIES, NUM_EXPERTS, VOCAB_SIZE, make_checkpoint

PROMPTS = (
    [5, 9, 12, 7, 3, 4, 8, 11, 2, 6, 13, 14, 25],
    [17, 3, 20, 21],
    [30, 31, 32, 33, 34, 35, 36],
    [40],
    [41, 7],
)
NUM_TOKENS = 8
LIMITS = EngineLimits(max_batch_size=3, prefill_chunk_tokens=9, max_queued_requests=8)
START: dict[str, tuple[int, ...]] = {"switch_transformers": (0,), "nllb-moe": (2, 77)}

StartEngine = Callable[..., Harness]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# So that completions of different prompts differ, and nearby distances alone have a bias each.
_CONFIGS: dict[str, dict[str, Any]] = {
    "switch_transformers": {
        "seed": 1,
        "tie_word_embeddings": False,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 10,
    },
    # Fewer positions in its table than there are tokens in a pass, or in the longest completion.
    "nllb-moe": {"tie_word_embeddings": False, "scale_embedding": False, "max_position_embeddings": 16},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {
        family: make_checkpoint(family, tmp_path_factory.mktemp("tiny"), num_layers=4, **_CONFIGS[family])
        for family in ENCODER_DECODER_FAMILIES
    }
    # Every translation begins with the name of its language.
    GenerationConfig(decoder_start_token_id=2, forced_bos_token_id=77).save_pretrained(made["nllb-moe"])
    return made


@pytest.fixture(params=ENCODER_DECODER_FAMILIES)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def start() -> Iterator[StartEngine]:
    running: list[Harness] = []

    def start_one(
        folder: Path,
        num_slots: int | None = None,
        on_device: bool = False,
        device: str = "cpu",
        **options: Any,
    ) -> Harness:
        model = slot_model(folder, num_slots, on_device=on_device, device=device)
        running.append(start_engine(model, **{"limits": LIMITS, **options}))
        return running[-1]

    yield start_one
    for harness in running:
        harness.engine.stop()


def reference(folder: Path) -> PreTrainedModel:
    config = load_config(folder)
    is_right = config.model_type == "switch_transformers"
    loader = AutoModelForSeq2SeqLM if is_right else model_class(config)
    return loader.from_pretrained(folder, dtype=torch.float32).eval()


def generated(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    """Greedily by the library, without what every completion begins behind."""
    start = START[model.config.model_type]
    inputs = torch.tensor([prompt])
    total = num_tokens + len(start) - 1
    output = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, num_beams=1, min_new_tokens=total,
        max_new_tokens=total, pad_token_id=1,
    )[0].tolist()  # fmt: skip
    assert tuple(output[: len(start)]) == start
    tokens: list[int] = output[len(start) :]
    return tokens


def first_logprobs(model: PreTrainedModel, prompt: Sequence[int]) -> Tensor:
    """[vocab] of the first token."""
    start = torch.tensor([START[model.config.model_type]])
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits[0, -1]
    return logits.log_softmax(0)


@pytest.mark.parametrize("num_slots", [None, 3, NUM_EXPERTS])
def test_prompts_of_all_lengths_together_get_the_references_tokens(
    start: StartEngine, folder: Path, num_slots: int | None
) -> None:
    model = reference(folder)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    harness = start(folder, num_slots)
    assert harness.generate(PROMPTS, max_tokens=NUM_TOKENS) == expected


def test_requests_join_a_running_batch_and_leave_it(start: StartEngine, folder: Path) -> None:
    harness, model = start(folder), reference(folder)
    long = harness.submit(PROMPTS[0], "long", max_tokens=30)
    long.next()
    short = harness.submit(PROMPTS[1], "short", max_tokens=3)
    assert short.token_ids() == generated(model, PROMPTS[1], 3)
    late = harness.submit(PROMPTS[2], "late", max_tokens=5)
    assert late.token_ids() == generated(model, PROMPTS[2], 5)
    assert long.token_ids() == generated(model, PROMPTS[0], 30)


def test_logprobs_are_the_references(start: StartEngine, folder: Path) -> None:
    model, harness = reference(folder), start(folder)
    sinks = [harness.submit(p, f"r{i}", max_tokens=2, logprobs=3) for i, p in enumerate(PROMPTS)]
    for sink, prompt in zip(sinks, PROMPTS, strict=True):
        expected = first_logprobs(model, prompt)
        [first] = sink.next().logprobs
        assert first.logprob == pytest.approx(float(expected.max()), abs=1e-4)
        assert [token_id for token_id, _ in first.top] == expected.topk(3).indices.tolist()


def test_a_device_that_pages_is_driven_by_the_host(start: StartEngine, folder: Path, device: str) -> None:
    pytest.importorskip("triton")
    harness, model = start(folder, 3, on_device=True, device=device), reference(folder)
    expected = [generated(model, prompt, 4) for prompt in PROMPTS[:3]]
    assert harness.generate(PROMPTS[:3], max_tokens=4) == expected
    assert harness.engine.report().paging == "host"


def test_sampling_does_not_depend_on_the_batch(start: StartEngine, folder: Path) -> None:
    harness = start(folder)
    alone = harness.submit(PROMPTS[0], "alone", max_tokens=12, temperature=1.0, seed=5).token_ids()
    harness.submit(PROMPTS[1], "other", max_tokens=12, temperature=1.0, seed=6)
    beside = harness.submit(PROMPTS[0], "beside", max_tokens=12, temperature=1.0, seed=5)
    assert beside.token_ids() == alone


def test_prompts_share_a_pass_without_padding_and_are_never_cut(
    start: StartEngine, folders: dict[str, Path]
) -> None:
    """A pass has nine tokens, or one prompt that is longer; experts see as many tokens as there are."""
    harness = start(folders["switch_transformers"])
    sizes = spy_on_experts(harness)
    blocker = harness.submit(PROMPTS[0], "blocker", max_tokens=40)
    blocker.next()
    for number, prompt in enumerate(PROMPTS[3:]):
        harness.submit(prompt, f"r{number}", max_tokens=1)
    blocker.result()
    assert sizes["encoder"][0] == len(PROMPTS[0]) > LIMITS.prefill_chunk_tokens
    assert sizes["encoder"][1:] in ([len(PROMPTS[3]) + len(PROMPTS[4])], [len(PROMPTS[3]), len(PROMPTS[4])])
    assert set(sizes["decoder"]) <= {1, 2, 3}


def spy_on_experts(harness: Harness) -> dict[str, list[int]]:
    """The tokens that the first MoE layer of each half is given, pass by pass."""
    sizes: dict[str, list[int]] = {"encoder": [], "decoder": []}
    for half, seen in sizes.items():
        stack = getattr(harness.slot_model.model, half)
        experts = stack.block[1].layer[-1].mlp.experts
        experts.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(len(inputs[0])))
    return sizes


def test_packed_sources_have_the_logits_of_each_alone(folder: Path) -> None:
    runner = EncoderDecoderRunner(slot_model(folder, 3), num_rows=8, max_tokens=32)
    rows = [6, 0, 1, 5, 3]
    together = runner.read(rows, PROMPTS, SourcePass([len(prompt) for prompt in PROMPTS]))
    for logits, prompt in zip(together, PROMPTS, strict=True):
        alone = runner.read([2], [prompt], SourcePass([len(prompt)]))[0]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


def true_table(folder: Path, prompt: list[int]) -> HashTable:
    """What the encoder's routers choose."""
    model = model_class(load_config(folder)).from_pretrained(folder).eval()
    chosen: list[Tensor] = []
    for name, module in model.get_encoder().named_modules():
        if name.endswith(".router"):
            module.register_forward_hook(lambda _m, _i, output: chosen.append(output[0].flatten(0, -2)))
    model.get_encoder()(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)))
    ids = torch.stack(chosen).numpy()
    fingerprint = Checkpoint.open(folder).fingerprint
    return HashTable(ids.astype(np.uint16), np.full(ids.shape, 0.5, np.float16), fingerprint, "oracle", "1")


def test_tables_of_the_encoder_are_prefetched_and_scored(start: StartEngine, folder: Path) -> None:
    """On a device, where no thread races with the pass."""
    pytest.importorskip("triton")
    model = reference(folder)
    limits = EngineLimits(max_batch_size=1, prefill_chunk_tokens=64, max_queued_requests=4)
    harness = start(folder, 4, on_device=True, limits=limits)
    blocker = harness.submit(PROMPTS[3], "blocker", max_tokens=40)
    blocker.next()
    sink = harness.submit(PROMPTS[0], "r", max_tokens=NUM_TOKENS)
    harness.engine.attach_table("r", true_table(folder, PROMPTS[0]))
    assert sink.token_ids() == generated(model, PROMPTS[0])
    report = harness.engine.report()
    assert [layer.predictor_recall for layer in report.layers] == [1.0, 1.0, None, None]
    assert report.hash_tables["on_time"] == 1
    assert [layer.prefetched > 0 for layer in report.layers] == [True, True, False, False]
    usage = sink.chunks[-1].experts
    assert usage is not None and 0 < usage.predicted < usage.needed


def test_wrong_tables_change_no_token_and_those_of_all_layers_are_refused(
    start: StartEngine, folders: dict[str, Path]
) -> None:
    folder = folders["switch_transformers"]
    right = true_table(folder, PROMPTS[0])
    harness = start(folder, 2, limits=EngineLimits(1, 64, 8))
    blocker = harness.submit(PROMPTS[3], "blocker", max_tokens=20)
    blocker.next()
    sink = harness.submit(PROMPTS[0], "r", max_tokens=NUM_TOKENS)
    twice = [np.concatenate([array, array]) for array in (right.expert_ids, right.weights)]
    with pytest.raises(HashTableError, match="4 layers x 13 tokens, expected 2 x 13"):
        harness.engine.attach_table("r", HashTable(*twice, right.model_fingerprint, "oracle", "1"))
    wrong = (right.expert_ids + 3) % NUM_EXPERTS
    harness.engine.attach_table("r", HashTable(wrong, right.weights, right.model_fingerprint, "oracle", "1"))
    assert sink.token_ids() == generated(reference(folder), PROMPTS[0])


@pytest.mark.parametrize("with_table", [True, False], ids=["table on the bus", "table lost"])
def test_predicted_tables_route_the_encoder_and_routers_the_decoder(
    start: StartEngine, folders: dict[str, Path], with_table: bool
) -> None:
    folder = folders["switch_transformers"]
    function = make_function(folder)
    tables = HashFunctionPredictor(function).predict(PROMPTS)
    expected = [routed_by(table, folder, prompt) for table, prompt in zip(tables, PROMPTS, strict=True)]
    assert expected[0] != generated(reference(folder), PROMPTS[0])
    harness = start(folder, 2, routing=PredictedRouting(function))
    sinks = []
    for number, (prompt, table) in enumerate(zip(PROMPTS, tables, strict=True)):
        sinks.append(harness.submit(prompt, f"r{number}", max_tokens=NUM_TOKENS))
        if with_table:
            harness.engine.attach_table(f"r{number}", table)
    assert [sink.token_ids() for sink in sinks] == expected
    usage = sinks[0].chunks[-1].experts
    needed_by_encoder = sum(len(np.unique(layer)) for layer in tables[0].expert_ids)
    assert usage is not None
    assert (usage.predicted, usage.needed) == (needed_by_encoder, needed_by_encoder + 2 * NUM_TOKENS)


def routed_by(table: HashTable, folder: Path, prompt: list[int]) -> list[int]:
    """The library's generate() with what the table says in the place of what the encoder's routers say."""
    model = model_class(load_config(folder)).from_pretrained(folder).eval()
    routers = [m for name, m in model.encoder.named_modules() if name.endswith(".router")]
    for router, ids, weights in zip(routers, table.expert_ids, table.weights, strict=True):
        replaced = (
            torch.from_numpy(ids.astype(np.int64))[None],
            torch.from_numpy(weights.astype(np.float32))[None],
        )
        router.register_forward_hook(lambda _m, _i, output, replaced=replaced: (*replaced, output[2]))
    return generated(model, prompt)


def test_text_begins_anew_behind_the_prompt(start: StartEngine, folders: dict[str, Path]) -> None:
    """A decoder that strips the first word's space must not be led astray by the prompt's words."""
    vocabulary = [(f"▁w{token_id}", 0.0) for token_id in range(VOCAB_SIZE)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, False))
    tokenizer.decoder = decoders.Metaspace()
    harness = start(folders["switch_transformers"], tokenizer=tokenizer, prefix=(0,))
    sink = harness.submit(PROMPTS[0], "r", max_tokens=4)
    assert sink.text() == " " + " ".join(f"w{token_id}" for token_id in sink.token_ids())


def test_an_engine_is_built_from_a_configuration(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["nllb-moe"]
    save_hash_function(make_function(folder), tmp_path)
    args = {
        "model": str(folder), "device": "cpu", "expert_slots": "auto", "max_batch_size": 2,
        "routing": "predicted", "hash_function": str(tmp_path),
    }  # fmt: skip
    engine = build_engine(
        ServingConfig.from_args(args, environ={}), CheckpointExpertSource(Checkpoint.open(folder))
    )
    engine.start()
    try:
        sink = Harness(engine, slot_model(folder)).submit(PROMPTS[0], "r", max_tokens=3)
        assert len(sink.token_ids()) == 3
        assert engine.report().slots_per_layer == NUM_EXPERTS // 2
    finally:
        engine.stop()


def test_a_model_that_does_not_say_how_to_begin_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("switch_transformers", tmp_path, decoder_start_token_id=None, num_layers=2)
    with pytest.raises(UnsupportedModelError, match="decoder_start_token_id"):
        EncoderDecoderRunner(slot_model(folder), num_rows=1, max_tokens=8)
