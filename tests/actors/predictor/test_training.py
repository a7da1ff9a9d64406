"""Training learns, picks the best weights, counts no padding; and the commands work end to end on a tiny model."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.predictor import evaluate as evaluate_command
from actors.predictor import trace
from actors.predictor import train as train_command
from actors.predictor.arguments import read_arguments
from actors.predictor.baselines import score_baselines
from actors.predictor.evaluate import EvaluateArguments, evaluate, perplexity, predicted_routing
from actors.predictor.hash_function import find_hash_function, load_hash_function
from actors.predictor.library_routing import intercepted_routing, load_resident_model
from actors.predictor.network import HashFunction, HashFunctionSpec, WeightRule
from actors.predictor.traces import TraceBatch, TraceHeader, windows
from actors.predictor.train import (
    RECIPES,
    TrainArguments,
    read_training_data,
    save_training,
    train_hash_function,
)
from actors.predictor.training import TrainingOptions, distillation_loss, recall_per_layer, train
from common.errors import ConfigError
from tests.tiny_models import VOCAB_SIZE, make_checkpoint

LAYERS, EXPERTS, TOP_K, WORDS = 2, 8, 2, 12


class SyntheticTraces:
    """Layer 0 is routed by the token, layer 1 by the token before it: only context can tell."""

    header = TraceHeader("synthetic", LAYERS, EXPERTS, TOP_K, EXPERTS, WeightRule(1.0))

    def __init__(self, num_windows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._tokens = torch.randint(WORDS, (num_windows, 16), generator=generator)
        self._logits_of = torch.randn(LAYERS, WORDS, EXPERTS, generator=torch.Generator().manual_seed(7)) * 3

    def batches(self, batch_size: int, generator: torch.Generator | None) -> Iterator[TraceBatch]:
        order = torch.arange(len(self._tokens))
        if generator is not None:
            order = torch.randperm(len(order), generator=generator)
        for rows in order.split(batch_size):
            yield self._batch(self._tokens[rows])

    def _batch(self, tokens: Tensor) -> TraceBatch:
        before = torch.cat([tokens[:, :1], tokens[:, :-1]], dim=1)
        logits = torch.stack([self._logits_of[0][tokens], self._logits_of[1][before]], dim=2)
        kept, ids = logits.sort(-1, descending=True)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        return TraceBatch(tokens, mask, ids[..., :TOP_K], kept[..., :TOP_K].softmax(-1), ids, kept)


def make_function(seed: int = 0) -> HashFunction:
    torch.manual_seed(seed)
    spec = HashFunctionSpec("synthetic", "e", WORDS, 10, LAYERS, EXPERTS, TOP_K, WeightRule(1.0), 16, 32)
    return HashFunction(spec, torch.randn(WORDS, 10))


def test_the_baselines_know_layers_and_tokens_but_no_context() -> None:
    held_out = list(SyntheticTraces(16, seed=2).batches(16, None))
    scores = score_baselines(SyntheticTraces(200, seed=1), held_out)
    assert scores["token"][0] == 1.0  # routed by the token
    assert scores["token"][1] < 0.6  # routed by the token before
    true = held_out[0].expert_ids[..., :TOP_K]
    for layer in range(LAYERS):
        best = torch.bincount(true[:, :, layer].flatten(), minlength=EXPERTS).sort().values[-TOP_K:].sum()
        assert 0 < scores["layer"][layer] <= float(best) / true[:, :, layer].numel()


def test_learns_what_only_context_can_tell() -> None:
    function = make_function()
    held_out = list(SyntheticTraces(16, seed=2).batches(16, None))
    before = recall_per_layer(function, held_out)
    rows: list[dict[str, float]] = []
    options = TrainingOptions(learning_rate=1e-2, steps=300, batch_size=32, evaluate_every=100, cosine=True)
    record = train(function, SyntheticTraces(64, seed=1), held_out, options, rows.append)
    baseline = score_baselines(SyntheticTraces(64, seed=1), held_out)["layer"]
    for layer in range(LAYERS):
        assert record.best_recall[layer] > max(0.9, baseline[layer] + 0.2, before[layer] + 0.2)
    assert [row["step"] for row in rows] == [100, 200, 300] and record.steps == 300
    assert recall_per_layer(function, held_out) == pytest.approx(record.best_recall)


def test_ends_with_the_best_weights_and_stops_when_stuck() -> None:
    function = make_function()
    held_out = list(SyntheticTraces(16, seed=2).batches(16, None))
    options = TrainingOptions(learning_rate=30.0, steps=1000, batch_size=16, evaluate_every=5, patience=3)
    record = train(function, SyntheticTraces(64, seed=1), held_out, options, lambda row: None)
    assert record.steps == record.best_step + 15 < 1000
    assert recall_per_layer(function, held_out) == pytest.approx(record.best_recall)


def test_stops_at_its_minutes() -> None:
    options = TrainingOptions(steps=10**9, minutes=1e-4, batch_size=16, patience=10**6)
    held_out = list(SyntheticTraces(4, seed=2).batches(4, None))
    record = train(make_function(), SyntheticTraces(64, seed=1), held_out, options, lambda row: None)
    assert 1 <= record.steps < 1000 and len(record.best_recall) == LAYERS


def test_padding_counts_neither_in_loss_nor_in_recall() -> None:
    function = make_function()
    (batch,) = SyntheticTraces(4, seed=3).batches(4, None)
    mask = torch.arange(16).expand(4, 16) < 9
    inside = mask[..., None, None]
    garbage = {
        name: torch.where(inside, tensor, tensor.flip(-1))
        for name, tensor in batch.tensors().items()
        if tensor.ndim == 4
    }
    padded = TraceBatch(batch.token_ids, mask, **garbage)
    short = TraceBatch(**{name: tensor[:, :9] for name, tensor in padded.tensors().items()})
    assert recall_per_layer(function, [padded]) == pytest.approx(recall_per_layer(function, [short]))
    losses = [distillation_loss(function(each.token_ids), each, 0.005) for each in (padded, short)]
    torch.testing.assert_close(*losses)


def test_the_loss_is_that_of_the_paper() -> None:
    (batch,) = SyntheticTraces(1, seed=3).batches(1, None)
    kept = 5
    assert batch.kept_ids is not None and batch.logits is not None
    batch = replace(batch, kept_ids=batch.kept_ids[..., :kept], logits=batch.logits[..., :kept])
    assert batch.kept_ids is not None and batch.logits is not None
    logits = torch.randn(*batch.token_ids.shape, LAYERS, EXPERTS)
    expected = []
    for token in range(16):
        for layer in range(LAYERS):
            ids, teacher = batch.kept_ids[0, token, layer], batch.logits[0, token, layer].softmax(-1)
            student = logits[0, token, layer]
            soft = -(teacher * student[ids].log_softmax(-1)).sum()
            expected.append(0.3 * -student.log_softmax(-1)[ids[0]] + soft)
    torch.testing.assert_close(distillation_loss(logits, batch, 0.3), torch.stack(expected).mean())


def test_the_paper_recipe_is_the_papers() -> None:
    paper = RECIPES["paper"]
    assert (paper.learning_rate, paper.batch_size, paper.ce_weight, paper.cosine) == (5e-5, 64, 0.005, False)
    assert not TrainArguments.model_fields["token_residual"].default


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path / "model", num_layers=2)


@pytest.fixture
def text(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(WORDS, (4000,), generator=generator).numpy()
    np.savez(tmp_path / "text.npz", train=tokens[:3200], held_out=tokens[3200:])
    return f"{tmp_path}/text.npz"


def arguments_for(model: Path, tokens: str, **changes: object) -> TrainArguments:
    values: dict[str, object] = {
        "model": str(model),
        "text": f"{tokens}#train",
        "held_out": f"{tokens}#held_out",
        "device": "cpu",
        "window_tokens": 20,
        "batch_size": 16,
        "steps": 120,
        "evaluate_every": 40,
        "compressed_size": 32,
        "hidden_size": 48,
        "learning_rate": 1e-2,
    }
    return TrainArguments.model_validate({**values, **changes})


def test_one_command_traces_trains_and_saves_what_serving_finds(model: Path, text: str) -> None:
    arguments = arguments_for(model, text)
    function, record = train_hash_function(read_training_data(arguments), arguments)
    folder = save_training(function, record, arguments)
    assert folder == find_hash_function(model) == model / "hash_function"
    # 2 of 8 experts by chance.
    assert record.best_recall[0] > 0.4
    evaluation = evaluate(
        EvaluateArguments(model=str(model), text=f"{text}#held_out", device="cpu", window_tokens=20)
    )
    assert evaluation.recall == pytest.approx(record.best_recall, abs=0.02)
    assert evaluation.perplexity_exact != pytest.approx(evaluation.perplexity_predicted, rel=1e-4)
    assert json.loads((folder / "training.json").read_text())["best_recall"] == record.best_recall
    assert load_hash_function(folder, model).spec.hidden_size == 48


class Oracle:
    """Stands in for a hash function that is always right about one text."""

    def __init__(self, ids: Tensor, weights: Tensor) -> None:
        self._routing = ids, weights  # [windows, tokens, layers, top_k]

    def __call__(self, token_ids: Tensor) -> Tensor:
        return token_ids

    def route(self, _logits: Tensor) -> tuple[Tensor, Tensor]:
        return self._routing


def test_a_perfect_prediction_keeps_the_perplexity_and_a_wrong_one_does_not(model: Path) -> None:
    resident = load_resident_model(model, torch.device("cpu"), torch.float32)
    token_ids, mask = windows(torch.arange(60) % VOCAB_SIZE, 16)
    seen: list[tuple[Tensor, Tensor]] = []

    def record(_layer: int, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((ids.view(4, 16, -1), weights.view(4, 16, -1)))
        return ids, weights

    exact = perplexity(resident, [(token_ids, mask)], lambda _: intercepted_routing(resident, record))
    ids, weights = (torch.stack(part, dim=2) for part in zip(*seen, strict=True))

    def predicted(oracle: Oracle) -> float:
        return perplexity(
            resident, [(token_ids, mask)], lambda each: predicted_routing(resident, oracle, each)
        )

    assert predicted(Oracle(ids, weights)) == pytest.approx(exact, rel=1e-3)
    assert predicted(Oracle((ids + 1) % EXPERTS, weights)) != pytest.approx(exact, rel=1e-2)


def test_impossible_arguments_are_named(model: Path, text: str, tmp_path: Path) -> None:
    for changes, problem in (
        ({"text": None}, "either text or traces"),
        ({"text": str(tmp_path / "none")}, "existing file"),
        ({"traces": str(tmp_path)}, "either text or traces"),
    ):
        with pytest.raises(ConfigError, match=problem):
            read_training_data(arguments_for(model, text, **changes))
    with pytest.raises(ConfigError, match="lr"):
        read_arguments(TrainArguments, ["model=x", "lr=1"])
    with pytest.raises(ConfigError, match="steps"):
        read_arguments(TrainArguments, ["model=x", "--steps=0"])
    with pytest.raises(ConfigError, match="key=value"):
        read_arguments(TrainArguments, ["model"])


def test_a_model_without_a_hash_function_cannot_be_evaluated(model: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="has no hash_function"):
        evaluate(EvaluateArguments(model=str(model), text=f"{text}#train", device="cpu"))


@pytest.mark.parametrize("command", [trace, train_command, evaluate_command])
def test_each_command_has_a_help_and_one_line_errors(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["command", "--help"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and f"python -m {command.__name__}" in shown and "model " in shown
    monkeypatch.setattr(
        "sys.argv", ["command", "model=/nowhere", "text=/nowhere", "out=/nowhere", "colour=red"]
    )
    with pytest.raises(SystemExit, match=r"^error: colour='red' is not possible.*$"):
        command.main()


def test_the_commands_run_from_the_command_line(
    model: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    common = [f"model={model}", "device=cpu", "window_tokens=20"]
    monkeypatch.setattr("sys.argv", ["trace", *common, f"text={text}#held_out", f"out={tmp_path}/traces"])
    trace.main()
    small = [
        "steps=2",
        "token_residual=true",
        "compressed_size=8",
        "hidden_size=8",
        "recipe=paper",
    ]
    monkeypatch.setattr("sys.argv", ["train", *common, *small, f"traces={tmp_path}/traces"])
    train_command.main()
    result = tmp_path / "result.json"
    monkeypatch.setattr(
        "sys.argv", ["evaluate", *common, f"text={text}#held_out", "max_tokens=50", f"out={result}"]
    )
    evaluate_command.main()
    printed = capsys.readouterr().out
    assert "mean      held-out recall@2" in printed and "perplexity, predicted routing" in printed
    assert json.loads(result.read_text()) == json.loads(printed.splitlines()[-1])
