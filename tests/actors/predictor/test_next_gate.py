"""The next layer's router, asked a layer early: by every family whose router can be, and what it then says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from actors.predictor.next_gate import EarlyRouters, NextGatePredictor
from common.architecture import MoeArchitecture, architecture_of, meta_model
from common.errors import UnsupportedModelError
from tests.tiny_models import (
    ENCODER_DECODER_FAMILIES,
    FAMILIES,
    NUM_EXPERTS,
    TOP_K,
    make_model,
)

NEED_MORE = ("afmoe", "hy_v3", "minimax_m2")  # their routers take a bias that their blocks hold


def described(model: PreTrainedModel) -> MoeArchitecture:
    return architecture_of(model, Path("tiny"))


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    return meta_model(config, Path("tiny"))


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODER_DECODER_FAMILIES])
def test_routers_of_every_family_can_be_asked_or_are_refused(family: str) -> None:
    model = on_meta(make_model(family).config)
    if family in NEED_MORE:
        with pytest.raises(UnsupportedModelError, match="cannot be asked by hidden states alone"):
            EarlyRouters(model, described(model))
    else:
        assert len(EarlyRouters(model, described(model)).modules) == described(model).num_layers


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_router_guesses_what_it_chooses(family: str) -> None:
    """Of its own hidden states; deepseek_v3's choose by groups of experts, not by the logits alone."""
    model = make_model(family)
    routers = EarlyRouters(model, described(model))
    routers.listen()
    chosen: list[torch.Tensor] = []
    for router in routers.modules:
        router.register_forward_hook(
            lambda _m, _i, output: chosen.append(next(each for each in output if each.dtype == torch.int64))
        )
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 9, 12]]))
    for layer, ids in enumerate(chosen[: len(routers.modules)]):
        hidden = routers.last_read(layer)
        shares = routers.guess(layer, hidden)
        assert ids.shape == (len(hidden), TOP_K)
        for expert_ids, of_token in zip(ids, shares, strict=True):
            assert sorted(of_token.nonzero()[0].tolist()) == sorted(expert_ids.tolist())
            assert np.isclose(of_token.sum(), 1)


def test_to_guess_is_not_what_the_model_reads() -> None:
    model = make_model("qwen3_moe")
    routers = EarlyRouters(model, described(model))
    routers.listen()
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 9, 12]]))
    read = routers.last_read(1)
    routers.guess(1, routers.last_read(0))
    assert routers.last_read(1) is read


def predictor_of(model: PreTrainedModel) -> tuple[NextGatePredictor, EarlyRouters]:
    architecture = described(model)
    routers = EarlyRouters(model, architecture)
    return NextGatePredictor(routers, NUM_EXPERTS, architecture.num_encoder_layers), routers


def test_names_experts_of_the_next_layer_only() -> None:
    model = make_model("qwen3_moe")
    predictor, routers = predictor_of(model)
    hidden = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    predictor.begin_pass(["a", "b"])
    assert not predictor.predict(0).any()
    predictor.observe(0, [], hidden)
    named = predictor.predict(1)
    assert named.shape == (2, NUM_EXPERTS)
    assert np.array_equal(named[0], routers.guess(1, hidden).mean(axis=0))
    assert not named[1].any()
    predictor.observe(1, [], hidden)
    assert np.array_equal(predictor.predict(2)[0], routers.guess(2, hidden).mean(axis=0))
    predictor.observe(2, [], hidden)
    predictor.begin_pass(["a", "b"])
    assert not predictor.predict(0).any(), "the pass before says nothing"


def test_an_encoder_says_nothing_of_the_decoder() -> None:
    model = on_meta(make_model("switch_transformers").config)
    assert described(model).num_encoder_layers == 1
    predictor, _ = predictor_of(model)
    predictor.begin_pass(["a"])
    predictor.observe(0, [], torch.zeros(1, 64))
    assert not predictor.predict(1).any()
