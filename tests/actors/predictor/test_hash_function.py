"""The hash function: causality, padding, stepping without recomputing, and its folder."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.predictor import paper_network
from actors.predictor.filter_network import CausalFilters
from actors.predictor.hash_function import (
    SPEC_FILE,
    WEIGHTS_FILE,
    HashFunctionState,
    find_embedding_key,
    find_hash_function,
    load_hash_function,
    save_hash_function,
    step_together,
)
from actors.predictor.network import HashFunction, HashFunctionSpec, WeightRule
from actors.predictor.paper_network import causal_attention
from actors.predictor.predictor import HashFunctionPredictor
from actors.predictor.sparsemax import sparsemax
from common.errors import CheckpointError, ConfigError, VocabularyError
from common.hash_table import HashTable
from tests.actors.predictor.conftest import make_function
from tests.tiny_models import NUM_EXPERTS, TOP_K, VOCAB_SIZE, make_checkpoint


def prompt(length: int, seed: int = 0) -> list[int]:
    ids: list[int] = torch.randint(
        VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return ids


def assert_same(table: HashTable, other: HashTable) -> None:
    np.testing.assert_array_equal(table.expert_ids, other.expert_ids)
    np.testing.assert_allclose(table.weights, other.weights, atol=2e-3)


def test_a_token_changes_nothing_before_itself_and_something_at_itself(function: HashFunction) -> None:
    tokens = prompt(20)
    changed = [*tokens[:12], (tokens[12] + 1) % VOCAB_SIZE, *tokens[13:]]
    before, after = (function(torch.tensor([ids])) for ids in (tokens, changed))
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=0)
    assert not torch.allclose(before[:, 12], after[:, 12], atol=1e-3)


def test_predictions_depend_on_what_came_before(function: HashFunction) -> None:
    one, other = (function(torch.tensor([[first, 5, 6, 7]])) for first in (1, 2))
    assert not torch.allclose(one[:, -1], other[:, -1], atol=1e-3)


def test_attention_in_blocks_equals_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    history = torch.randn(2, 23, 8)
    scores = (history @ history.mT / 8**0.5).masked_fill(torch.ones(23, 23).triu(1).bool(), -torch.inf)
    expected = sparsemax(scores) @ history
    monkeypatch.setattr(paper_network, "ATTENTION_ROWS", 5)
    torch.testing.assert_close(causal_attention(history, history), expected)
    torch.testing.assert_close(causal_attention(history[:, -7:], history), expected[:, -7:])


def test_batching_and_padding_do_not_change_a_prompts_table(function: HashFunction) -> None:
    prompts = [prompt(length, seed) for seed, length in enumerate((1, 30, 17, 31, 4, 2))]
    predictor = HashFunctionPredictor(function)
    for table, alone in zip(
        predictor.predict(prompts), (predictor.predict([each])[0] for each in prompts), strict=True
    ):
        assert_same(table, alone)


def test_a_table_has_the_models_shape_and_origin(function: HashFunction) -> None:
    (table,) = HashFunctionPredictor(function).predict([prompt(9)])
    table.check_fits(function.spec.model_fingerprint, function.spec.num_layers, NUM_EXPERTS, 9)
    assert table.expert_ids.shape == (function.spec.num_layers, 9, TOP_K)
    assert (table.predictor, table.predictor_version) == ("hash_function", "1")
    assert HashTable.from_bytes(table.to_bytes()).to_bytes() == table.to_bytes()


def test_stepping_equals_reading_everything_at_once(function: HashFunction) -> None:
    tokens = prompt(90)
    (whole,) = HashFunctionPredictor(function).predict([tokens])
    state = HashFunctionState(function)
    np.testing.assert_array_equal(state.prefill(tokens[:30]).expert_ids, whole.expert_ids[:, :30])
    np.testing.assert_array_equal(state.prefill(tokens[30:41]).expert_ids, whole.expert_ids[:, 30:41])
    for position in range(41, 90):
        ids, weights = state.step(tokens[position])
        np.testing.assert_array_equal(ids, whole.expert_ids[:, position])
        np.testing.assert_allclose(weights, whole.weights[:, position], atol=2e-3)


def test_stepping_together_equals_stepping_alone(function: HashFunction) -> None:
    alone, together = ([HashFunctionState(function) for _ in range(4)] for _ in range(2))
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        one.prefill(prompt(3 + 5 * number, number))
        other.prefill(prompt(3 + 5 * number, number))
    for step in range(5):
        tokens = prompt(4, 100 + step)
        expected = [state.step(token) for state, token in zip(alone, tokens, strict=True)]
        for (ids, weights), (other_ids, other_weights) in zip(
            expected, step_together(together, tokens), strict=True
        ):
            np.testing.assert_array_equal(ids, other_ids)
            np.testing.assert_allclose(weights, other_weights, atol=2e-3)


def test_a_sequence_may_begin_with_a_step(function: HashFunction) -> None:
    (whole,) = HashFunctionPredictor(function).predict([[3]])
    ids, _ = HashFunctionState(function).step(3)
    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids, whole.expert_ids[:, 0])


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_tokens_outside_the_vocabulary_are_refused(function: HashFunction, token: int) -> None:
    with pytest.raises(VocabularyError, match=str(token)):
        HashFunctionPredictor(function).predict([[1], [2, token]])
    with pytest.raises(VocabularyError):
        HashFunctionState(function).prefill([token])


def test_weights_follow_the_rule_of_the_models_router(function: HashFunction) -> None:
    logits = torch.randn(5, function.spec.num_layers, NUM_EXPERTS)
    probabilities, expected = logits.softmax(-1).topk(TOP_K)
    ids, weights = function.route(logits)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(weights, probabilities / probabilities.sum(-1, keepdim=True))
    object.__setattr__(function.spec, "weight_rule", WeightRule(sum=None, scale=2.5))
    torch.testing.assert_close(function.route(logits)[1], 2.5 * probabilities)
    object.__setattr__(function.spec, "weight_rule", WeightRule(sum=None, scale=2.0, gates=True))
    torch.testing.assert_close(function.route(logits)[1], 2.0 * logits.gather(-1, ids).sigmoid())


def test_calibration_changes_weights_layer_by_layer_and_no_choice(function: HashFunction) -> None:
    logits = torch.randn(5, function.spec.num_layers, NUM_EXPERTS)
    ids, weights = function.route(logits)
    function.weight_scale[1] = 0.5
    function.weight_offset[2, 3] = 1.0
    same_ids, scaled = function.route(logits)
    assert torch.equal(ids, same_ids)
    torch.testing.assert_close(scaled[:, 0], weights[:, 0])
    torch.testing.assert_close(scaled[:, 1], (logits[:, 1].gather(-1, ids[:, 1]) / 2).softmax(-1))
    moved = (ids[:, 2] == 3).any(-1)
    assert moved.any() and not torch.allclose(scaled[moved, 2], weights[moved, 2])
    torch.testing.assert_close(scaled[~moved, 2], weights[~moved, 2])


def test_use_probabilities_add_up_to_k_in_the_order_of_the_logits(function: HashFunction) -> None:
    logits = 5 * torch.randn(50, function.spec.num_layers, NUM_EXPERTS)
    function.use_temperature.copy_(torch.linspace(0.1, 4, function.spec.num_layers))
    probabilities = function.use_probabilities(logits)
    torch.testing.assert_close(probabilities.sum(-1), torch.full(logits.shape[:-1], float(TOP_K)))
    assert (probabilities.gather(-1, logits.argsort(-1)).diff(dim=-1) >= 0).all()
    assert (probabilities[:, 0] - probabilities[:, 0].round()).abs().max() < (
        probabilities[:, -1] - probabilities[:, -1].round()
    ).abs().max()


def test_what_is_saved_is_loaded_without_the_embeddings(
    model_folder: Path, function: HashFunction, tmp_path: Path
) -> None:
    save_hash_function(function, tmp_path)
    loaded = load_hash_function(tmp_path, model_folder)
    assert loaded.spec == function.spec
    own_bytes = 2 * sum(tensor.numel() for tensor in function.state_dict().values())
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < own_bytes + 4000
    tokens = torch.tensor([prompt(40)])
    function.load_state_dict({name: tensor.half() for name, tensor in function.state_dict().items()})
    torch.testing.assert_close(loaded(tokens), function(tokens), rtol=0, atol=2e-3)


def test_a_folder_without_newer_options_has_the_papers_form(
    model_folder: Path, function: HashFunction, tmp_path: Path
) -> None:
    save_hash_function(function, tmp_path)
    fields = json.loads((tmp_path / SPEC_FILE).read_text())
    for name in ("token_residual", "network", "blocks", "taps", "half_lives", "bidirectional"):
        del fields[name]
    (tmp_path / SPEC_FILE).write_text(json.dumps(fields))
    if (
        function.spec.token_residual or function.spec.network != "paper"
    ):  # its heads are wider than the paper's
        with pytest.raises(CheckpointError, match="heads"):
            load_hash_function(tmp_path, model_folder)
    else:
        loaded = load_hash_function(tmp_path, model_folder)
        assert loaded.spec == dataclasses.replace(function.spec, half_lives=HashFunctionSpec.half_lives)


def test_the_token_residual_lets_the_token_through_whatever_the_context(model_folder: Path) -> None:
    functions = [make_function(model_folder, token_residual=residual) for residual in (False, True)]
    for function in functions:  # nothing but the token is left: the LSTM's outputs count for nothing
        function.heads.weight[:, : function.spec.hidden_size] = 0
    prompts = torch.tensor([[1, 2, 5], [3, 4, 5], [3, 4, 6]])
    without, with_residual = (function(prompts)[:, -1] for function in functions)
    torch.testing.assert_close(without[0], without[2])
    torch.testing.assert_close(with_residual[0], with_residual[1])
    assert not torch.allclose(with_residual[0], with_residual[2], atol=1e-3)


def test_another_models_hash_function_is_refused(
    model_folder: Path, function: HashFunction, tmp_path: Path
) -> None:
    other = make_checkpoint("qwen3_moe", tmp_path / "other", seed=1)
    save_hash_function(function, tmp_path / "other" / "hash_function")
    with pytest.raises(ConfigError, match=f"trained for model {function.spec.model_fingerprint}"):
        load_hash_function(other / "hash_function", other)
    with pytest.raises(ConfigError, match="hash_function"):
        find_hash_function(other)


def test_finds_the_hash_function_beside_the_model_or_none(function: HashFunction, tmp_path: Path) -> None:
    model = make_checkpoint("qwen3_moe", tmp_path / "model")
    assert find_hash_function(model, "auto") is None
    save_hash_function(function, model / "hash_function")
    assert find_hash_function(model, "auto") == model / "hash_function"
    assert find_hash_function(model, str(model / "hash_function")) == model / "hash_function"
    with pytest.raises(ConfigError, match="there is none there"):
        find_hash_function(model, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("damage", ["spec", "weights", "embedding"])
def test_damage_is_named(model_folder: Path, function: HashFunction, tmp_path: Path, damage: str) -> None:
    save_hash_function(function, tmp_path)
    if damage == "spec":
        (tmp_path / SPEC_FILE).write_text("{}")
    elif damage == "weights":
        (tmp_path / WEIGHTS_FILE).write_bytes(b"short")
    else:
        spec = json.loads((tmp_path / SPEC_FILE).read_text())
        (tmp_path / SPEC_FILE).write_text(json.dumps({**spec, "embedding_key": "nothing.weight"}))
    with pytest.raises(CheckpointError):
        load_hash_function(tmp_path, model_folder)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v2", "gpt_oss", "ernie4_5_moe"])
def test_finds_the_embeddings_of_other_families(family: str, tmp_path: Path) -> None:
    assert find_embedding_key(make_checkpoint(family, tmp_path)) == "model.embed_tokens.weight"


@pytest.fixture(params=["paper", "filters"])
def bidirectional(model_folder: Path, request: pytest.FixtureRequest) -> HashFunction:
    return make_function(model_folder, network=request.param, bidirectional=True)


def test_a_bidirectional_function_sees_what_follows_but_no_padding(bidirectional: HashFunction) -> None:
    tokens = prompt(20)
    changed = [*tokens[:12], (tokens[12] + 1) % VOCAB_SIZE, *tokens[13:]]
    before, after = (bidirectional(torch.tensor([ids])) for ids in (tokens, changed))
    assert not torch.allclose(before[:, 11], after[:, 11], atol=1e-3)
    prompts = [prompt(length, seed) for seed, length in enumerate((5, 17, 18, 20))]
    predictor = HashFunctionPredictor(bidirectional)
    for table, each in zip(predictor.predict(prompts), prompts, strict=True):
        assert_same(table, HashFunctionState(bidirectional).prefill(each))


@pytest.mark.parametrize("length", [1, 5, 130, 300])
def test_averages_in_chunks_are_those_of_the_recurrence(length: int) -> None:
    filters = CausalFilters(8, num_taps=3, half_lives=(2.0, 50.0)).requires_grad_(False)
    values = torch.randn(2, length, 8)
    filtered, (last, averages) = filters(values, None)
    state, gains = torch.zeros(2, 2, 2), (1 - filters.decays**2).sqrt()
    for token in range(length):
        state = filters.decays[:, None] * state + gains[:, None] * values[:, token, 4:].unflatten(-1, (2, 2))
        torch.testing.assert_close(filtered[:, token, 4:], state.flatten(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(averages, state, atol=1e-5, rtol=1e-4)
    padded = torch.cat([torch.zeros(2, 2, 4), values[..., :4]], dim=1)
    assert torch.equal(last, padded[:, -2:])
    weights = filters.short.weight[:, 0]  # [channels, taps]
    expected = sum(padded[:, tap : tap + length] * weights[:, tap] for tap in range(3)) + filters.short.bias
    torch.testing.assert_close(filtered[..., :4], expected, atol=1e-5, rtol=1e-4)
