"""Span corruption, the optimiser, router losses and skew; and that a trained model is the library's when it is loaded."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import SwitchTransformersForConditionalGeneration

from benchmarks.sida.batches import batches
from benchmarks.sida.corruption import NOISE_SHARE, SpanCorruption
from benchmarks.sida.data.build import read_task
from benchmarks.sida.data.tokens import NUM_SENTINELS, Vocabulary
from benchmarks.sida.fused_norms import fuse_norms
from benchmarks.sida.optimize import RelativeAdam, Schedule, optimize
from benchmarks.sida.pretrain import target_loss
from benchmarks.sida.routers import SkewCounter, balance_loss
from benchmarks.sida.sizes import Size
from benchmarks.sida.workshop import Workshop
from common.own_experts.switch_transformers import (
    OwnSwitchTransformersForConditionalGeneration,
    SwitchTransformersForSequenceClassification,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary()


def test_a_corrupted_window_holds_every_token_once(vocabulary: Vocabulary) -> None:
    text = torch.arange(100, 1100, dtype=torch.int16)
    corrupted = SpanCorruption(vocabulary, text, 60).draw(16, torch.Generator().manual_seed(0))
    sentinels = range(vocabulary.first_sentinel_id, vocabulary.first_sentinel_id + NUM_SENTINELS)
    for inputs, labels in zip(corrupted.inputs.tolist(), corrupted.labels.tolist(), strict=True):
        assert inputs[-1] == labels[-1] == vocabulary.end_id
        spans: dict[int, list[int]] = {}
        for token in labels[:-1]:
            if token in sentinels:
                spans[token] = []
            else:
                spans[list(spans)[-1]].append(token)
        whole = [each for token in inputs[:-1] for each in spans.get(token, [token])]
        assert whole == list(range(whole[0], whole[0] + 60))
        assert list(spans) == list(sentinels)[: len(spans)]
        assert sum(map(len, spans.values())) == round(NOISE_SHARE * 60)


def test_steps_are_relative_to_the_size_of_a_tensor() -> None:
    model = nn.ParameterDict(
        {"large": nn.Parameter(torch.full((4,), 8.0)), "small": nn.Parameter(torch.full((4,), 0.5))}
    )
    optimizer = RelativeAdam(model)
    sum(param.sum() for param in model.values()).backward()
    optimizer.step(0.25)
    assert torch.allclose(model["large"], torch.full((4,), 6.0), atol=1e-4)
    assert torch.allclose(model["small"], torch.full((4,), 0.375), atol=1e-4)


def test_steps_of_some_parameters_are_larger() -> None:
    model = nn.ParameterDict({"router": nn.Parameter(torch.ones(4)), "other": nn.Parameter(torch.ones(4))})
    optimizer = RelativeAdam(model, lambda name: 2.0 if name == "router" else 1.0)
    sum(param.sum() for param in model.values()).backward()
    optimizer.step(0.25)
    assert torch.allclose(model["router"], torch.full((4,), 0.5), atol=1e-4)
    assert torch.allclose(model["other"], torch.full((4,), 0.75), atol=1e-4)


def test_steps_below_the_precision_of_a_parameter_add_up() -> None:
    model = nn.ParameterDict({"weight": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))})
    optimizer = RelativeAdam(model)
    for _ in range(20):
        model["weight"].sum().backward()
        optimizer.step(1e-3)
    assert float(model["weight"].detach()[0]) == pytest.approx(0.98, abs=0.004)


def test_optimising_ends_with_the_steps_and_checks_in_evaluation_mode() -> None:
    model, modes = nn.Linear(2, 1), list[bool]()

    def check(progress: float) -> dict[str, float]:
        modes.append(model.training)
        return {"progress": progress}

    curve = optimize(
        model, Schedule(1.0, 0.1, 1, steps=30), lambda: model(torch.ones(1, 2)).square().sum(), check
    )
    assert curve.steps == 30
    assert curve.points[-1]["progress"] == 1
    assert curve.points[-1]["loss"] < 0.1 * curve.points[0]["loss"]
    assert not any(modes)
    assert not model.training


def routed_to(experts: list[int], strength: float = 20.0) -> Tensor:
    logits = torch.zeros(len(experts), 4)
    logits[range(len(experts)), experts] = strength
    return logits


def test_the_balance_loss_asks_for_an_even_use_of_every_layers_experts() -> None:
    even, collapsed = routed_to([0, 1, 2, 3]), routed_to([0, 0, 0, 0])
    assert float(balance_loss([even])) == pytest.approx(1, rel=1e-3)
    assert float(balance_loss([collapsed])) == pytest.approx(4, rel=1e-3)
    assert float(balance_loss([even, collapsed])) == pytest.approx(5, rel=1e-3)


def test_skew_tells_collapsed_from_even_routing() -> None:
    counter = SkewCounter()
    counter.add(
        [routed_to([0, 1, 2, 3]), routed_to([2, 2, 2, 0])], torch.tensor([[True, True], [True, False]])
    )
    skew = counter.skew()
    assert skew.entropy == [pytest.approx(0.7925, abs=1e-3), 0.0]
    assert skew.busiest_share == [pytest.approx(1 / 3, abs=1e-3), 1.0]
    assert skew.experts_per_text == pytest.approx((2 + 1 + 1 + 1) / 4)


def test_batches_hold_every_example_without_more_padding_than_their_longest(tiny_data: Path) -> None:
    part = read_task(tiny_data, "short", "train")
    seen = []
    for batch in batches(part, 100, CPU):
        assert batch.mask.any(0).all(), "a column of padding alone"
        seen += [tuple(ids[mask].tolist()) for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    assert sorted(seen) == sorted(tuple(row[row >= 0].tolist()) for row in part.ids)


@pytest.fixture(scope="module")
def workshop(tiny_data: Path, tiny_size: Size, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("work"), tiny_data, tiny_size, CPU, seed=0)


def test_what_is_trained_is_the_librarys_model_and_made_once(workshop: Workshop) -> None:
    made = workshop.pretrained(4)
    assert made.record["steps"] == 3
    assert len(made.record["skew"]["entropy"]) == 1, "encoder layers alone"
    model = SwitchTransformersForConditionalGeneration.from_pretrained(made.folder)
    assert model.config.num_experts == 4
    assert workshop.pretrained(4).record == made.record


def test_fused_norms_give_the_librarys_loss_and_gradients(workshop: Workshop) -> None:
    batch = workshop.text.evaluated("train", 2)[0]
    losses, gradients = list[Tensor](), list[Tensor]()
    for change in (lambda _model: None, fuse_norms):
        model = OwnSwitchTransformersForConditionalGeneration.from_pretrained(workshop.pretrained(4).folder)
        change(model)
        loss = target_loss(model, batch)
        loss.backward()
        losses.append(loss.detach())
        gradient = model.get_parameter("shared.weight").grad
        assert gradient is not None
        gradients.append(gradient)
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


def test_a_classifier_begins_with_the_pretrained_encoder(workshop: Workshop) -> None:
    made = workshop.classifier(4, "short")
    assert 0.0 <= made.record["accuracy"] <= 1.0
    classifier = SwitchTransformersForSequenceClassification.from_pretrained(made.folder)
    pretrained = SwitchTransformersForConditionalGeneration.from_pretrained(workshop.pretrained(4).folder)
    moved = (classifier.shared.weight - pretrained.shared.weight).detach().abs().max()
    assert float(moved) < 0.1
    assert classifier.config.num_labels == 2
