"""Training learns, picks the best weights, counts no padding; and the commands work end to end on a tiny model."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.predictor import evaluate as evaluate_command
from actors.predictor import trace
from actors.predictor import train as train_command
from actors.predictor.arguments import read_arguments
from actors.predictor.baselines import FrequentExperts
from actors.predictor.calibration import calibrate, score_calibration
from actors.predictor.evaluate import EvaluateArguments, Window, evaluate, perplexity, predicted_routing
from actors.predictor.hash_function import find_hash_function, load_hash_function
from actors.predictor.library_routing import intercepted_routing, load_resident_model
from actors.predictor.network import HashFunction, HashFunctionSpec, WeightRule
from actors.predictor.traces import TraceBatch, TraceHeader, windows
from actors.predictor.train import (
    CHECKPOINT_FILE,
    RECIPES,
    TrainArguments,
    read_training_data,
    save_training,
    train_hash_function,
)
from actors.predictor.training import (
    Evaluated,
    Objective,
    Trainer,
    TrainingOptions,
    TrainingRecord,
    choices_loss,
    distillation_loss,
    recall_per_layer,
)
from common.errors import CheckpointError, ConfigError
from tests.tiny_models import VOCAB_SIZE, make_checkpoint

LAYERS, EXPERTS, TOP_K, WORDS = 2, 8, 2, 12


class SyntheticTraces:
    """Layer 0 is routed by the token, layer 1 by the token before it: only context can tell."""

    header = TraceHeader("synthetic", LAYERS, EXPERTS, TOP_K, EXPERTS, WeightRule(1.0))

    def __init__(self, num_windows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._tokens = torch.randint(WORDS, (num_windows, 16), generator=generator)
        self._logits_of = torch.randn(LAYERS, WORDS, EXPERTS, generator=torch.Generator().manual_seed(7)) * 3

    def batches(
        self, batch_size: int, generator: torch.Generator | None, first: int = 0
    ) -> Iterator[TraceBatch]:
        order = torch.arange(len(self._tokens))
        if generator is not None:
            order = torch.randperm(len(order), generator=generator)
        for rows in order.split(batch_size)[first:]:
            yield self._batch(self._tokens[rows])

    def _batch(self, tokens: Tensor) -> TraceBatch:
        before = torch.cat([tokens[:, :1], tokens[:, :-1]], dim=1)
        logits = torch.stack([self._logits_of[0][tokens], self._logits_of[1][before]], dim=2)
        kept, ids = logits.sort(-1, descending=True)
        chosen = ids[..., :TOP_K], kept[..., :TOP_K].softmax(-1)
        return TraceBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), *chosen, ids, kept)


NETWORKS: dict[str, dict[str, Any]] = {
    "paper": {},
    "filters": {"network": "filters", "half_lives": (1.0, 8.0)},
}


def make_function(seed: int = 0, network: str = "paper") -> HashFunction:
    torch.manual_seed(seed)
    spec = HashFunctionSpec(
        "synthetic", "e", WORDS, 10, LAYERS, EXPERTS, TOP_K, WeightRule(1.0), 16, 32, **NETWORKS[network]
    )
    return HashFunction(spec, torch.randn(WORDS, 10))


def held_out_batches() -> list[TraceBatch]:
    return list(SyntheticTraces(16, seed=2).batches(16, None))


def train(
    function: HashFunction,
    options: TrainingOptions,
    report: Callable[[Evaluated], None] = lambda row: None,
) -> TrainingRecord:
    return Trainer(function, SyntheticTraces(64, seed=1), held_out_batches(), options, report).run()


def test_the_baselines_know_layers_and_tokens_but_no_context() -> None:
    held_out = held_out_batches()
    experts = FrequentExperts(SyntheticTraces(200, seed=1), held_out)
    scores = experts.recall()
    assert scores["token"][0] == 1.0  # routed by the token
    assert scores["token"][1] < 0.6  # routed by the token before
    true = held_out[0].expert_ids
    for num_named in (TOP_K, 2 * TOP_K):
        scores = experts.recall(num_named)
        for layer in range(LAYERS):
            counts = torch.bincount(true[:, :, layer].flatten(), minlength=EXPERTS).sort().values
            assert 0 < scores["layer"][layer] <= float(counts[-num_named:].sum()) / true[:, :, layer].numel()


@pytest.mark.parametrize("objective", ["distillation", "choices"])
@pytest.mark.parametrize("network", NETWORKS)
def test_learns_what_only_context_can_tell(network: str, objective: Objective) -> None:
    function, held_out = make_function(network=network), held_out_batches()
    before = recall_per_layer(function, held_out)
    rows: list[Evaluated] = []
    options = TrainingOptions(
        objective, learning_rate=1e-2, steps=120, batch_size=32, evaluate_every=40, cosine=True
    )
    record = train(function, options, rows.append)
    baseline = FrequentExperts(SyntheticTraces(64, seed=1), held_out).recall()["layer"]
    for layer in range(LAYERS):
        assert record.best_recall[layer] > max(0.75, baseline[layer] + 0.2, before[layer] + 0.2)
    assert [row.step for row in rows] == [40, 80, 120] and record.steps == 120
    assert recall_per_layer(function, held_out) == pytest.approx(record.best_recall)
    assert min(recall_per_layer(function, held_out, 2 * TOP_K)) >= max(0.9, *record.best_recall)
    assert recall_per_layer(function, held_out, EXPERTS) == [1.0] * LAYERS


def test_ends_with_the_best_weights_and_stops_when_stuck() -> None:
    function = make_function()
    options = TrainingOptions(learning_rate=30.0, steps=1000, batch_size=16, evaluate_every=5, patience=3)
    record = train(function, options)
    assert record.steps == record.best_step + 15 < 1000
    assert recall_per_layer(function, held_out_batches()) == pytest.approx(record.best_recall)


def test_stops_at_its_minutes() -> None:
    options = TrainingOptions(steps=10**9, minutes=1e-4, batch_size=16, patience=10**6)
    record = train(make_function(), options)
    assert 1 <= record.steps < 1000 and len(record.best_recall) == LAYERS


@pytest.mark.parametrize("killed_after", [1, 2])  # evaluations; 4 batches a pass, so within one and after one
def test_a_resumed_training_ends_as_one_that_went_through(killed_after: int) -> None:
    options = TrainingOptions(learning_rate=1e-2, steps=18, batch_size=16, evaluate_every=6, cosine=True)
    whole, resumed = make_function(), make_function()
    expected = train(whole, options)
    states: list[dict[str, Any]] = []

    def report(_row: Evaluated) -> None:
        states.append(deepcopy(trainer.state()))

    trainer = Trainer(make_function(), SyntheticTraces(64, seed=1), held_out_batches(), options, report)
    trainer.run()
    fresh = Trainer(resumed, SyntheticTraces(64, seed=1), held_out_batches(), options, lambda row: None)
    fresh.resume(states[killed_after - 1])
    record = fresh.run()
    assert (record.steps, record.tokens_seen) == (expected.steps, expected.tokens_seen)
    assert [row.step for row in record.history] == [6, 12, 18]
    assert record.best_recall == expected.best_recall
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def overconfident(seed: int = 0) -> HashFunction:
    """Trained a little, and then with logits that are six times too large."""
    function = make_function(seed)
    train(function, TrainingOptions(learning_rate=1e-2, steps=60, batch_size=32, cosine=True))
    with torch.no_grad():
        function.heads.weight *= 6
        function.heads.bias *= 6
    return function


def test_calibration_mends_weights_and_probabilities_and_keeps_the_choice() -> None:
    function, held_out = overconfident(), held_out_batches()
    recall, before = recall_per_layer(function, held_out), score_calibration(function, held_out)
    calibrate(function, held_out, by_expert=False)
    fresh = list(SyntheticTraces(16, seed=5).batches(16, None))
    after = score_calibration(function, fresh)
    assert recall_per_layer(function, held_out) == recall
    for layer in range(LAYERS):
        assert after.weight_error[layer] < 0.9 * after.weight_error_uncalibrated[layer]
        assert after.weight_error_uncalibrated[layer] == pytest.approx(before.weight_error[layer], rel=0.2)
        assert after.weight_moved[layer] < before.weight_moved[layer]
        assert after.use_ece[layer] < 0.7 * after.use_ece_uncalibrated[layer]
        assert after.use_ece_uncalibrated[layer] == pytest.approx(before.use_ece[layer], abs=0.03)
    assert not function.weight_offset.any()


def test_calibration_by_expert_learns_weights_that_are_not_those_of_the_choice() -> None:
    """Experts 0 to 3 are chosen by their logits but weigh nine times less than those say, as with a bias on the choice."""
    held_out = held_out_batches()
    (batch,) = held_out
    weights = batch.weights * torch.where(batch.expert_ids < 4, 1 / 9, 1.0)
    biased = [replace(batch, weights=weights / weights.sum(-1, keepdim=True))]
    function = make_function()
    train(function, TrainingOptions(learning_rate=1e-2, steps=100, batch_size=32, cosine=True))
    errors = []
    for by_expert in (False, True):
        calibrate(function, biased, by_expert)
        errors.append(score_calibration(function, biased).weight_error)
    for without, with_offsets in zip(*errors, strict=True):
        assert with_offsets < 0.5 * without


def test_scores_of_calibration_are_what_they_say() -> None:
    """Against one token after the other, in one layer."""
    function, (batch,) = make_function(), held_out_batches()
    score = score_calibration(function, [batch])
    logits = function(batch.token_ids)
    ids, weights = (each[:, :, 1].reshape(-1, TOP_K).tolist() for each in function.route(logits))
    true_ids, true_weights = (
        each[:, :, 1].reshape(-1, TOP_K).tolist() for each in (batch.expert_ids, batch.weights)
    )
    error = total = moved = 0.0
    for predicted, true in zip(zip(ids, weights), zip(true_ids, true_weights)):  # noqa: B905
        one, other = dict(zip(*predicted)), dict(zip(*true))  # noqa: B905
        error += sum(abs(one[expert] - other[expert]) for expert in one.keys() & other.keys())
        total += sum(other[expert] for expert in one.keys() & other.keys())
        moved += (
            sum(abs(one.get(expert, 0.0) - other.get(expert, 0.0)) for expert in one.keys() | other.keys())
            / 2
        )
    assert score.weight_error[1] == pytest.approx(error / total, rel=1e-3)
    assert score.weight_moved[1] == pytest.approx(moved / len(ids), rel=1e-3)


def test_padding_counts_neither_in_loss_nor_in_recall_nor_in_calibration() -> None:
    function = make_function()
    (batch,) = SyntheticTraces(4, seed=3).batches(4, None)
    mask = torch.arange(16).expand(4, 16) < 9
    inside = mask[..., None, None]
    garbage = {
        name: torch.where(inside, tensor, tensor.flip(-1))
        for name, tensor in batch.tensors().items()
        if tensor.ndim == 4
    }
    padded = replace(batch, mask=mask, **garbage)
    short = TraceBatch(**{name: tensor[:, :9] for name, tensor in batch.tensors().items()})
    assert recall_per_layer(function, [padded]) == pytest.approx(recall_per_layer(function, [short]))
    assert score_calibration(function, [padded]).use_ece == pytest.approx(
        score_calibration(function, [short]).use_ece
    )
    losses = [distillation_loss(function(each.token_ids), each, 0.005) for each in (padded, short)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(choices_loss(function(each.token_ids), each) for each in (padded, short)))


def test_the_loss_is_that_of_the_paper() -> None:
    (batch,) = SyntheticTraces(1, seed=3).batches(1, None)
    kept = 5
    batch = replace(batch, kept_ids=batch.kept_ids[..., :kept], logits=batch.logits[..., :kept])
    logits = torch.randn(*batch.token_ids.shape, LAYERS, EXPERTS)
    expected = []
    for token in range(16):
        for layer in range(LAYERS):
            ids, teacher = batch.kept_ids[0, token, layer], batch.logits[0, token, layer].softmax(-1)
            student = logits[0, token, layer]
            soft = -(teacher * student[ids].log_softmax(-1)).sum()
            expected.append(0.3 * -student.log_softmax(-1)[ids[0]] + soft)
    torch.testing.assert_close(distillation_loss(logits, batch, 0.3), torch.stack(expected).mean())


def test_the_loss_of_choices_is_the_likelihood_of_each_by_its_weight() -> None:
    (batch,) = SyntheticTraces(1, seed=3).batches(1, None)
    logits = torch.randn(*batch.token_ids.shape, LAYERS, EXPERTS)
    scaled = replace(batch, weights=2.5 * batch.weights)  # as routers do whose weights do not add up to 1
    expected = [
        -sum(
            weight * logits[0, token, layer].log_softmax(-1)[expert]
            for expert, weight in zip(
                *(each[0, token, layer].tolist() for each in (batch.expert_ids, batch.weights)), strict=True
            )
        )
        for token in range(16)
        for layer in range(LAYERS)
    ]
    torch.testing.assert_close(choices_loss(logits, scaled), torch.stack(expected).mean())


def test_the_paper_recipe_is_the_papers() -> None:
    paper = RECIPES["paper"]
    assert (paper.learning_rate, paper.batch_size, paper.ce_weight, paper.cosine) == (5e-5, 64, 0.005, False)
    assert paper.objective == "distillation"
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
        "steps": 60,
        "evaluate_every": 20,
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


class Killed(BaseException):
    pass


def test_a_killed_training_goes_on_by_the_same_command(
    model: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = arguments_for(model, text, steps=9, evaluate_every=3)
    data = read_training_data(arguments)
    whole, _ = train_hash_function(
        data, arguments_for(model, text, steps=9, evaluate_every=3, out=f"{text}.whole")
    )
    state, step = Trainer.state, Trainer._step

    def killed_step(trainer: Trainer, batch: TraceBatch) -> Tensor:
        if trainer.state()["record"]["steps"] == 5:
            raise Killed
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "_step", killed_step)
    with pytest.raises(Killed):
        train_hash_function(data, arguments)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"learning_rate='0.5' is not possible: 0.01, as in the unfinished"):
        train_hash_function(data, arguments_for(model, text, steps=9, evaluate_every=3, learning_rate=0.5))
    steps: list[int] = []
    monkeypatch.setattr(Trainer, "_step", lambda trainer, batch: (steps.append(1), step(trainer, batch))[1])
    resumed, record = train_hash_function(data, arguments)
    assert (len(steps), record.steps, Trainer.state) == (6, 9, state)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    folder = save_training(resumed, record, arguments)
    assert not (folder / CHECKPOINT_FILE).exists()  # the next training begins anew
    (folder / CHECKPOINT_FILE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="no unfinished training"):
        train_hash_function(data, arguments)


def test_routers_that_do_more_than_softmax_are_learned_from_their_choices(text: str, tmp_path: Path) -> None:
    model = make_checkpoint("deepseek_v3", tmp_path / "model", num_layers=2)
    arguments = arguments_for(model, text, steps=40)
    data = read_training_data(arguments)
    function, record = train_hash_function(data, arguments)
    assert function.spec.weight_rule == WeightRule(1.5)
    assert record.best_recall[0] > 0.4  # 2 of 8 experts by chance
    assert function.weight_offset.any()
    weights = function.route(function(data.held_out[0].token_ids))[1].sum(-1)
    torch.testing.assert_close(weights, torch.full_like(weights, 1.5))
    with pytest.raises(ConfigError, match="objective='distillation'"):
        train_hash_function(data, arguments_for(model, text, recipe="paper"))


def test_an_encoder_decoder_model_is_predicted_in_both_stacks(text: str, tmp_path: Path) -> None:
    model = make_checkpoint("switch_transformers", tmp_path / "model", num_layers=2)
    small = {"steps": 6, "evaluate_every": 3, "window_tokens": 10}
    encoder = arguments_for(model, text, **small)
    function, record = train_hash_function(read_training_data(encoder), encoder)
    save_training(function, record, encoder)
    assert function.spec.bidirectional and function.spec.num_layers == 1
    for part in ("train", "held_out"):
        trace.write_traces(
            trace.TraceArguments(
                model=str(model), text=f"{text}#{part}", source=f"{text}#{part}", stack="decoder",
                out=f"{tmp_path}/{part}", device="cpu", window_tokens=10,
            )
        )  # fmt: skip
    files = {"text": None, "traces": f"{tmp_path}/train", "held_out": f"{tmp_path}/held_out"}
    decoder = arguments_for(model, text, **small, **files, out=str(tmp_path / "decoder"))
    function, record = train_hash_function(read_training_data(decoder), decoder)
    save_training(function, record, decoder)
    assert not function.spec.bidirectional
    with pytest.raises(ConfigError, match="bidirectional"):
        train_hash_function(read_training_data(decoder), decoder.model_copy(update={"bidirectional": True}))
    held_out = f"{text}#held_out"
    common = {"model": str(model), "text": held_out, "max_tokens": 300, "device": "cpu", "window_tokens": 10}
    results = [
        evaluate(EvaluateArguments(**common, **more))
        for more in (
            {},
            {"targets": held_out},
            {"targets": held_out, "decoder_function": str(tmp_path / "decoder")},
        )
    ]
    assert results[0].perplexity_exact is None and len(results[0].recall) == 1
    assert results[1].perplexity_exact == pytest.approx(results[2].perplexity_exact)
    predicted = [result.perplexity_predicted for result in results[1:]]
    assert predicted[0] != pytest.approx(predicted[1], rel=1e-4)
    assert results[1].perplexity_exact != pytest.approx(predicted[0], rel=1e-4)


class Oracle:
    """Stands in for a hash function that is always right about one text."""

    def __init__(self, ids: Tensor, weights: Tensor) -> None:
        self._routing = ids, weights  # [windows, tokens, layers, top_k]

    def __call__(self, token_ids: Tensor, _mask: Tensor) -> Tensor:
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

    batches = [Window(token_ids, mask)]
    exact = perplexity(resident, batches, lambda _: intercepted_routing(resident, record))
    ids, weights = (torch.stack(part, dim=2) for part in zip(*seen, strict=True))

    def predicted(oracle: Oracle) -> float:
        return perplexity(resident, batches, lambda each: predicted_routing(resident, oracle, each))

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
