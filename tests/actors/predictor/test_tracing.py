"""Traces of real library models: complete, aligned with the routers' decisions, resumable, and the same from disk."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from actors.predictor import library_routing, traces
from actors.predictor.library_routing import intercepted_routing, load_resident_model
from actors.predictor.network import WeightRule
from actors.predictor.text import TokenStream, read_tokens, read_windows
from actors.predictor.trace import TraceArguments, write_traces
from actors.predictor.traces import TraceBatch, TraceFiles, windows
from actors.predictor.tracing import LiveTraces, RoutingTracer, decoder_inputs, find_teacher
from common.architecture import find_experts_modules
from common.checkpoint import Checkpoint
from common.errors import CheckpointError, ConfigError, UnsupportedModelError, VocabularyError
from tests.tiny_models import (
    ENCODER_DECODER_FAMILIES,
    FAMILIES,
    NUM_EXPERTS,
    TOP_K,
    VOCAB_SIZE,
    make_checkpoint,
)

CPU = torch.device("cpu")


def some_windows(count: int = 3, length: int = 10) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB_SIZE, (count * length - 4,), generator=torch.Generator().manual_seed(1))
    return windows(tokens, length)


def told(
    model: torch.nn.Module, token_ids: Tensor, first_layer: int = 0, **inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """[layers, tokens, top_k] each: the ids and weights that the experts modules are called with."""
    seen: list[list[Tensor]] = []

    def keep(_module: torch.nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        ids, weights = [*arguments, *keywords.values()][-2:]
        top_k = model.config.get_text_config().num_experts_per_tok if is_llama else ids.shape[-1]
        seen.append([ids.reshape(-1, top_k), weights.reshape(-1, top_k).float()])

    is_llama = model.config.model_type == "llama4_text"
    experts = find_experts_modules(model).values()
    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in experts]
    with torch.no_grad():
        model(input_ids=token_ids, use_cache=False, **inputs)
    for hook in hooks:
        hook.remove()
    ids, weights = zip(*seen[first_layer:], strict=True)
    return torch.stack(ids), torch.stack(weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_traces_hold_what_the_experts_are_told_in_every_family(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path, num_layers=2)
    model = load_resident_model(folder, CPU, torch.float32)
    token_ids, mask = some_windows()
    source = LiveTraces(RoutingTracer(model, folder), token_ids, mask)
    assert (source.header.top_k, source.header.num_kept, source.header.stack) == (
        TOP_K,
        NUM_EXPERTS,
        "decoder",
    )
    (batch,) = source.batches(8, None)
    assert batch.logits is not None
    assert batch.logits.shape == (*token_ids.shape, source.header.num_layers, NUM_EXPERTS)
    ids, weights = told(model, token_ids)
    assert torch.equal(batch.expert_ids.permute(2, 0, 1, 3).reshape(ids.shape), ids)
    torch.testing.assert_close(batch.weights.permute(2, 0, 1, 3).reshape(ids.shape), weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "teacher", "rule"),
    [
        ("qwen3_moe", "logits", WeightRule(1.0)),
        ("mixtral", "logits", WeightRule(1.0)),
        ("olmoe", "logits", WeightRule(None)),
        ("gpt_oss", "logits", WeightRule(1.0)),
        ("deepseek_v2", "logits", WeightRule(None, scale=1.5)),  # a softmax with a factor, never renormalised
        ("deepseek_v3", "choices", WeightRule(1.5)),  # sigmoid, a bias on the choice, groups
        ("ernie4_5_moe", "choices", WeightRule(1.0)),  # softmax weights, but a bias on the choice
        ("phimoe", "choices", WeightRule(None, gates=True)),  # each expert weighted by itself
    ],
)
def test_finds_what_can_be_learned_of_a_router(
    family: str, teacher: str, rule: WeightRule, tmp_path: Path
) -> None:
    folder = make_checkpoint(family, tmp_path, num_layers=2)
    model = load_resident_model(folder, CPU, torch.float32)
    header = LiveTraces(RoutingTracer(model, folder), *some_windows()).header
    assert header.teacher == teacher
    assert replace(header.weight_rule, scale=pytest.approx(rule.scale, abs=0.01)) == rule


def test_weights_that_are_no_softmax_are_learned_from_choices() -> None:
    logits = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    values, ids = logits.topk(2)
    assert find_teacher(logits, ids, values.softmax(-1)) == ("logits", WeightRule(sum=1.0))
    scores = values.sigmoid()
    sigmoid = ids, scores / scores.sum(-1, keepdim=True)
    assert find_teacher(logits, *sigmoid) == ("choices", WeightRule(sum=1.0))
    assert find_teacher(None, *sigmoid) == ("choices", WeightRule(sum=1.0))


def test_a_model_that_shows_no_logits_is_traced_by_its_decisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path)
    model = load_resident_model(folder, CPU, torch.float32)
    (expected,) = LiveTraces(RoutingTracer(model, folder), *some_windows()).batches(8, None)

    def refuse(_model: torch.nn.Module) -> None:
        raise UnsupportedModelError("qwen3_moe", "no router logits")

    monkeypatch.setattr(library_routing, "find_routers", refuse)
    source = LiveTraces(RoutingTracer(model, folder), *some_windows())
    (batch,) = source.batches(8, None)
    assert (source.header.num_kept, source.header.teacher) == (0, "choices")
    assert batch.logits is None and batch.kept_ids is None
    assert torch.equal(batch.expert_ids, expected.expert_ids) and torch.equal(batch.weights, expected.weights)


def test_text_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path)
    tracer = RoutingTracer(load_resident_model(folder, CPU, torch.float32), folder)
    with pytest.raises(VocabularyError, match=str(VOCAB_SIZE)):
        LiveTraces(tracer, *windows(torch.tensor([1, 2, VOCAB_SIZE]), 4))


@pytest.mark.parametrize("family", ENCODER_DECODER_FAMILIES)
def test_an_encoder_is_traced_without_regard_to_padding(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path, num_layers=2)
    model = load_resident_model(folder, CPU, torch.float32)
    encoder_layers = Checkpoint.open(folder).architecture.num_encoder_layers
    tracer = RoutingTracer(model, folder)
    token_ids, mask = some_windows()  # the last window is shorter
    source = LiveTraces(tracer, token_ids, mask)
    assert (source.header.stack, source.header.num_layers) == ("encoder", encoder_layers)
    (batch,) = source.batches(8, None)
    length = int(mask[-1].sum())
    alone = tracer.trace(token_ids[-1:, :length], mask[-1:, :length])
    assert torch.equal(batch.expert_ids[-1:, :length], alone.expert_ids)
    torch.testing.assert_close(batch.weights[-1:, :length], alone.weights)
    more = torch.where(mask, token_ids, 7)
    assert torch.equal(tracer.trace(more, mask).expert_ids[mask], batch.expert_ids[mask])


@pytest.mark.parametrize("family", ENCODER_DECODER_FAMILIES)
def test_a_decoder_is_traced_beside_what_its_encoder_reads(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path, num_layers=2)
    model = load_resident_model(folder, CPU, torch.float32)
    architecture = Checkpoint.open(folder).architecture
    sources, targets = some_windows(), windows(torch.arange(18) + 3, 6)
    traces = LiveTraces(RoutingTracer(model, folder, stack="decoder"), *targets, source=sources)
    assert traces.header.num_layers == architecture.num_layers - architecture.num_encoder_layers
    (batch,) = traces.batches(8, None)
    inputs = {"attention_mask": sources[1].long(), "decoder_input_ids": targets[0]}
    ids, _ = told(model, sources[0], architecture.num_encoder_layers, **inputs)
    assert torch.equal(batch.expert_ids.permute(2, 0, 1, 3).reshape(ids.shape), ids)


def test_a_model_without_an_encoder_has_none_to_trace(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path)
    with pytest.raises(ConfigError, match="stack='encoder'"):
        RoutingTracer(load_resident_model(folder, CPU, torch.float32), folder, stack="encoder")


def test_replacing_the_routing_with_itself_changes_nothing_and_with_another_does(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path)
    model = load_resident_model(folder, CPU, torch.float32)
    token_ids, _ = some_windows()
    with torch.no_grad():
        expected = model(input_ids=token_ids).logits
        with intercepted_routing(model, lambda _layer, ids, weights: (ids, weights)):
            same = model(input_ids=token_ids).logits
        with intercepted_routing(model, lambda _layer, ids, weights: ((ids + 1) % NUM_EXPERTS, weights)):
            other = model(input_ids=token_ids).logits
        after = model(input_ids=token_ids).logits
    assert torch.equal(same, expected) and torch.equal(after, expected)
    assert not torch.allclose(other, expected, atol=1e-2)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path / "model", num_layers=2)


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path) -> TraceArguments:
    """95 tokens in windows of 10, 4 windows a shard: 3 shards."""
    tokens = torch.randint(VOCAB_SIZE, (95,), generator=torch.Generator().manual_seed(1)).numpy()
    np.savez(tmp_path / "text.npz", part=tokens, other=tokens[::-1])
    return TraceArguments(
        model=str(model_folder),
        text=f"{tmp_path}/text.npz#part",
        out=str(tmp_path / "traces"),
        device="cpu",
        window_tokens=10,
        batch_size=4,
    )


def changed(arguments: TraceArguments, **changes: object) -> TraceArguments:
    return arguments.model_copy(update=changes)


def files_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_traces_from_disk_equal_live_ones(arguments: TraceArguments) -> None:
    assert write_traces(arguments) == 95
    files, folder = TraceFiles(arguments.out), arguments.model
    token_ids, mask = read_windows(arguments.text, folder, 10)
    live = LiveTraces(RoutingTracer(load_resident_model(folder, CPU, torch.float32), folder), token_ids, mask)
    assert files.header == live.header
    assert files.num_shards == 3
    for stored, fresh in zip(files.batches(4, None), live.batches(4, None), strict=True):
        assert torch.equal(stored.token_ids, fresh.token_ids) and torch.equal(stored.mask, fresh.mask)
        assert torch.equal(stored.expert_ids, fresh.expert_ids)
        assert torch.equal(stored.kept_ids, fresh.kept_ids)
        torch.testing.assert_close(stored.weights, fresh.weights, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(stored.logits, fresh.logits, rtol=1e-3, atol=1e-3)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_at", ["begin", "write", "between"])
def test_a_killed_run_goes_on_and_ends_with_the_same_files(
    arguments: TraceArguments, tmp_path: Path, killed_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = changed(arguments, out=str(tmp_path / "whole"))
    write_traces(whole)
    traced: list[int] = []
    trace, save = RoutingTracer.trace, traces.save_file

    def killed_trace(self: RoutingTracer, *given: Tensor) -> TraceBatch:
        traced.append(1)
        if (killed_at, len(traced)) in (("begin", 1), ("between", 3)):
            raise Killed
        return trace(self, *given)

    def killed_save(tensors: dict[str, Tensor], path: Path) -> None:
        save(tensors, path)
        if killed_at == "write" and len(traced) == 2:
            path.write_bytes(path.read_bytes()[:100])  # half written
            raise Killed

    monkeypatch.setattr(RoutingTracer, "trace", killed_trace)
    monkeypatch.setattr(traces, "save_file", killed_save)
    with pytest.raises(Killed):
        write_traces(arguments)
    with pytest.raises(CheckpointError, match="of 3 trace shards"):
        TraceFiles(arguments.out)
    monkeypatch.undo()
    finished = len(list(Path(arguments.out).glob("*.safetensors")))
    assert finished == {"begin": 0, "write": 1, "between": 2}[killed_at]
    monkeypatch.setattr(RoutingTracer, "trace", killed_trace)
    traced += [1] * 10  # past where it is killed
    write_traces(arguments)
    assert (
        len(traced) - 10 - {"begin": 1, "write": 2, "between": 3}[killed_at] == 3 - finished
    )  # nothing twice
    assert files_of(arguments.out) == files_of(whole.out)


def test_a_finished_run_traces_nothing_again(
    arguments: TraceArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_traces(arguments)
    before = files_of(arguments.out)
    monkeypatch.setattr(RoutingTracer, "trace", None)
    assert write_traces(arguments) == 95
    assert files_of(arguments.out) == before


def test_traces_of_something_else_are_not_continued(arguments: TraceArguments, tmp_path: Path) -> None:
    write_traces(arguments)
    other = make_checkpoint("qwen3_moe", tmp_path / "other", num_layers=2, seed=1)
    for changes, problem in (
        ({"text": arguments.text.replace("part", "other")}, "digest"),
        ({"window_tokens": 12}, "window_tokens 10, not 12"),
        ({"batch_size": 2}, "shard_windows 4, not 2"),
        ({"num_kept": 3}, "num_kept 8, not 3"),
        ({"dtype": "bfloat16"}, "dtype float32, not bfloat16"),
        ({"model": str(other)}, "model_fingerprint"),
    ):
        with pytest.raises(ConfigError, match=problem):
            write_traces(changed(arguments, **changes))


def test_sentences_are_windows_of_their_own(arguments: TraceArguments, tmp_path: Path) -> None:
    sentences = np.full((5, 8), -1)
    for row, length in enumerate((3, 8, 1, 5, 2)):
        sentences[row, :length] = np.arange(length) + 10 * row
    np.savez(tmp_path / "sentences.npz", some=sentences)
    text = f"{tmp_path}/sentences.npz#some"
    assert write_traces(changed(arguments, text=text)) == 19
    batch = next(TraceFiles(arguments.out).batches(4, None))
    assert batch.mask.sum(1).tolist() == [3, 8, 1, 5]
    assert batch.token_ids[3, :5].tolist() == [30, 31, 32, 33, 34]
    with pytest.raises(ConfigError, match="8 or more"):
        write_traces(changed(arguments, text=text, window_tokens=7))


def test_a_decoder_is_traced_from_files_beside_its_source(arguments: TraceArguments, tmp_path: Path) -> None:
    folder = make_checkpoint("switch_transformers", tmp_path / "switch", num_layers=2)
    decoder = changed(arguments, model=str(folder), stack="decoder")
    with pytest.raises(ConfigError, match="source=None"):
        write_traces(decoder)
    source = arguments.text.replace("part", "other")
    write_traces(changed(decoder, source=source))
    files = TraceFiles(arguments.out)
    assert files.header.stack == "decoder"
    batch = next(files.batches(4, None))
    targets, mask = read_windows(arguments.text, folder, 10)
    assert torch.equal(batch.token_ids[:, 1:], targets[:4, :-1]) and not batch.token_ids[:, 0].any()
    model = load_resident_model(folder, CPU, torch.float32)
    read = read_windows(source, folder, 10)
    live = LiveTraces(
        RoutingTracer(model, folder, stack="decoder"), decoder_inputs(model, targets), mask, read
    )
    assert torch.equal(batch.expert_ids, next(live.batches(4, None)).expert_ids)
    with pytest.raises(ConfigError, match="digest"):
        write_traces(changed(decoder, source=arguments.text))


def test_text_is_read_in_pieces_that_end_with_a_line(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(
        models.WordLevel({"<unk>": 0, "<end>": 1} | {f"w{n}": n + 2 for n in range(50)}, "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    wrapped.save_pretrained(model_folder)
    (tmp_path / "text").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "text" / name).write_text("".join(f"w{n} w{n}\n" for n in range(50)))
    expected = 2 * [*(n + 2 for n in range(50) for _ in range(2)), 1]
    text = str(tmp_path / "text")
    whole = TokenStream(text, model_folder, 16).summarise()
    monkeypatch.setattr("actors.predictor.text.MAX_PIECE_CHARS", 20)
    stream = TokenStream(text, model_folder, 16)
    pieces = [piece.tolist() for piece in stream.pieces()]
    assert max(map(len, pieces)) < 10 and [token for piece in pieces for token in piece] == expected
    assert stream.summarise() == whole and (whole.num_tokens, whole.num_windows) == (202, 13)
    assert read_tokens(text, model_folder).tolist() == expected
    assert [window.tolist() for window in stream.windows(first=11)] == [expected[176:192], expected[192:]]


def test_shuffled_batches_hold_every_window_once(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path / "model")
    token_ids, mask = windows(torch.arange(120) % VOCAB_SIZE, 10)
    live = LiveTraces(RoutingTracer(load_resident_model(folder, CPU, torch.float32), folder), token_ids, mask)
    seen = torch.cat([batch.token_ids for batch in live.batches(5, torch.Generator().manual_seed(0))])
    assert not torch.equal(seen, token_ids)
    assert sorted(seen.tolist()) == sorted(token_ids.tolist())


def test_unusable_traces_and_texts_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"traces\.json"):
        TraceFiles(tmp_path)
    (tmp_path / "traces.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="another format"):
        TraceFiles(tmp_path)
    folder = make_checkpoint("qwen3_moe", tmp_path / "model")
    for text in ("none.npz#part", "none.txt"):
        with pytest.raises(ConfigError, match="text="):
            read_windows(f"{tmp_path}/{text}", folder, 8)


def test_a_damaged_shard_is_named(arguments: TraceArguments) -> None:
    write_traces(arguments)
    shard = Path(arguments.out) / "shard-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="shard-000001"):
        list(TraceFiles(arguments.out).batches(4, None))


def test_batches_of_files_are_mixed_over_shards_and_can_be_left_out(arguments: TraceArguments) -> None:
    write_traces(changed(arguments, batch_size=1))  # 10 shards

    def batches(first: int = 0) -> list[list[list[int]]]:
        files = TraceFiles(arguments.out)
        return [
            batch.token_ids.tolist() for batch in files.batches(2, torch.Generator().manual_seed(0), first)
        ]

    mixed = batches()
    assert [len(batch) for batch in mixed] == [2] * 5
    text = [
        window for batch in TraceFiles(arguments.out).batches(3, None) for window in batch.token_ids.tolist()
    ]
    shuffled = [window for batch in mixed for window in batch]
    assert shuffled != text and sorted(shuffled) == sorted(text)
    assert [batches(first) for first in range(6)] == [mixed[first:] for first in range(6)]
