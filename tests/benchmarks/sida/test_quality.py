"""Predicted routing is what the hash function names, hit rates leave padding out, and exact routing loses nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.predictor.hash_function import load_hash_function
from actors.predictor.library_routing import load_resident_model
from actors.predictor.traces import TraceBatch, TraceFiles
from actors.predictor.tracing import RoutingTracer
from benchmarks.cache_policies.cells import Workload
from benchmarks.sida.data.build import TaskPart, read_task
from benchmarks.sida.hash_functions import NETWORKS, TracedTask, train_hash_function
from benchmarks.sida.predicted import Answers, answers, routed, token_hit_rate
from benchmarks.sida.pretrain import perplexity
from benchmarks.sida.quality_table import print_tables
from benchmarks.sida.sizes import Size
from benchmarks.sida.task_quality import ROUTING_FILE, measure_exactness, measure_task
from benchmarks.sida.text_quality import measure_text
from benchmarks.sida.workshop import Workshop, routing_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def workshop(tiny_data: Path, tiny_size: Size, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("work"), tiny_data, tiny_size, CPU, seed=0)


def batch(token_ids: list[list[int]], experts: list[list[int]], lengths: list[int]) -> TraceBatch:
    """One layer, top 1."""
    ids = torch.tensor(token_ids)
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    chosen = torch.tensor(experts)[..., None, None]
    return TraceBatch(ids, mask, chosen, torch.ones(chosen.shape))


def test_token_hit_rate_names_what_was_frequent_and_leaves_padding_out() -> None:
    train = [batch([[5, 5, 5, 6]], [[1, 1, 2, 3]], [4])]
    test = [batch([[5, 6, 5, 5]], [[1, 3, 2, 0]], [3])]
    assert token_hit_rate(train, test, num_experts=4, vocab_size=8, num_named=1) == pytest.approx(2 / 3)
    assert token_hit_rate(train, test, num_experts=4, vocab_size=8, num_named=2) == 1.0


def test_an_unseen_token_gets_the_layers_most_frequent_expert() -> None:
    train = [batch([[5, 5, 6]], [[2, 2, 3]], [3])]
    test = [batch([[7]], [[2]], [1])]
    assert token_hit_rate(train, test, num_experts=4, vocab_size=8, num_named=1) == 1.0


def test_answers_are_compared_example_by_example() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    one = Answers(torch.eye(2)[[0, 1, 0, 0]], labels)
    other = Answers(torch.eye(2)[[0, 1, 1, 1]], labels)
    assert one.accuracy == 0.75
    assert one.agreement(other) == 0.5


def test_routing_by_the_routers_own_decisions_changes_no_answer(workshop: Workshop) -> None:
    folder = workshop.classifier(4, "short").folder
    model = load_resident_model(folder, CPU, torch.float32)
    part = read_task(workshop.data, "short", "test")
    exact = answers(model, part, 256)
    tracer = RoutingTracer(model, folder, stack="encoder")
    (traced,) = TracedTask(tracer, part, 10**6).traces(None)
    ids, weights = (each.permute(2, 0, 1, 3).flatten(1, 2) for each in (traced.expert_ids, traced.weights))
    with routed([(ids, weights)], model):
        logits = model(input_ids=traced.token_ids, attention_mask=traced.mask.long()).logits
    assert torch.allclose(logits, exact.logits, atol=1e-3), "weights travel as float16"
    with routed([(3 - ids, weights)], model):
        assert not torch.allclose(
            model(input_ids=traced.token_ids, attention_mask=traced.mask.long()).logits,
            exact.logits,
            atol=1e-3,
        )


def test_windows_of_text_as_long_as_the_examples_come_between_them(workshop: Workshop) -> None:
    folder = workshop.classifier(4, "short").folder
    model = load_resident_model(folder, CPU, torch.float32)
    tracer, part = RoutingTracer(model, folder, stack="encoder"), read_task(workshop.data, "short", "train")
    text = torch.arange(1, 1000)
    drawn = list(TracedTask(tracer, part, 64, text).traces(torch.Generator().manual_seed(0)))
    examples, windows = drawn[::2], drawn[1::2]
    assert len(windows) == len(examples) > 1
    for each in windows:
        lengths = each.mask.sum(1)
        assert set(lengths.tolist()) <= set(part.lengths.tolist())
        for ids, length in zip(each.token_ids, lengths.tolist(), strict=True):
            assert torch.equal(ids[:length], torch.arange(int(ids[0]), int(ids[0]) + length))
    assert sum(len(each.token_ids) for each in examples) == len(part.labels)


@pytest.mark.parametrize("network", list(NETWORKS))
def test_a_hash_function_learns_routing_that_follows_from_tokens(workshop: Workshop, network: str) -> None:
    folder = workshop.classifier(4, "short").folder
    model = load_resident_model(folder, CPU, torch.float32)
    few_tokens = np.random.default_rng(0).integers(1, 9, (16, 12)).astype(np.int16)
    part = TaskPart(few_tokens, np.zeros(16, np.int64), np.full(16, ""))
    traced = TracedTask(RoutingTracer(model, folder, stack="encoder"), part, 256)
    held_out = list(traced.traces(None))
    training = replace(workshop.size.hash_training, steps=60, hidden_size=32, evaluate_every=30)
    function = train_hash_function(folder, traced, held_out, network, training, 0, CPU)
    predicted: Tensor = function(held_out[0].token_ids, held_out[0].mask).argmax(-1)
    decided = held_out[0].expert_ids[..., 0]
    most_frequent = float((decided == decided.mode(dim=0).values.mode(dim=0).values).float().mean())
    assert float((predicted == decided).float().mean()) > most_frequent + 0.1


def test_a_task_row_holds_hit_rates_and_fidelity_and_is_measured_once(workshop: Workshop) -> None:
    row = measure_task(workshop, 4, "short")
    for network in NETWORKS:
        assert 0.0 <= row[network]["top_1"] <= row[network]["top_3"] <= 1.0
        assert row[network]["fidelity_1"] == pytest.approx(
            row[network]["accuracy_1"] / row["accuracy"], abs=1e-3
        )
    assert measure_task(workshop, 4, "short") == row


def test_a_task_leaves_its_hash_functions_and_the_routing_of_its_test_sentences(workshop: Workshop) -> None:
    measure_task(workshop, 4, "short")
    classifier, folder = workshop.classifier(4, "short").folder, routing_folder(workshop.root, 4, "short")
    for network in NETWORKS:
        assert load_hash_function(folder / network, classifier).spec.top_k == 1
    with np.load(folder / ROUTING_FILE) as recorded:
        ids, experts = recorded["token_ids"], recorded["experts"]
    assert np.array_equal(ids, read_task(workshop.data, "short", "test").ids)
    model = load_resident_model(classifier, CPU, torch.float32)
    tokens = torch.from_numpy(ids[:1][ids[:1] >= 0]).long()[None]
    traced = RoutingTracer(model, classifier, stack="encoder").trace(tokens, torch.ones_like(tokens).bool())
    assert np.array_equal(experts[:, 0, : tokens.shape[1]], traced.expert_ids[0, :, :, 0].T.numpy())


def test_the_engine_with_few_slots_loses_nothing(workshop: Workshop) -> None:
    row = measure_exactness(workshop, 4, "short")
    assert row["largest_logit_difference"] == 0


def test_perplexity_without_routers_is_beside_that_with_them(workshop: Workshop) -> None:
    row = measure_text(workshop, 4)
    model = load_resident_model(workshop.pretrained(4).folder, CPU, torch.float32)
    exact = perplexity(model, workshop.text.evaluated("test", workshop.size.evaluated_windows))
    assert row["perplexity"] == pytest.approx(exact, rel=1e-4)
    for name in ("encoder_paper", "encoder_ours", "decoder_ours"):
        assert row[name]["ratio_1"] == pytest.approx(row[name]["perplexity_1"] / row["perplexity"], rel=1e-3)


def test_traces_of_text_are_read_as_any_models(workshop: Workshop) -> None:
    measure_text(workshop, 4)
    for stack in ("encoder", "decoder"):
        traces = TraceFiles(routing_folder(workshop.root, 4, "text") / f"{stack}_traces")
        assert traces.header.stack == stack
        (loaded, *_) = Workload.load(traces, 4).requests
        assert loaded.shape[1:] == (1, 1)


def test_published_figures_stand_beside_ours(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    row = {**measure_task(workshop, 4, "short"), "experts": 128}
    text = {**measure_text(workshop, 4), "experts": 128}
    print_tables({"tasks": [row], "text": [text], "exact": [measure_exactness(workshop, 4, "short")]})
    printed = capsys.readouterr().out
    assert "98.78 %" in printed
    assert "93.02 % (1)" in printed
    assert "4.86 → 11.73 (2.41×)" in printed
