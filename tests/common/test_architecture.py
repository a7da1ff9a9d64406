"""describe_architecture: the facts come from the library's own modules, for every family, and errors are readable."""

import json
from pathlib import Path

import pytest

from common.architecture import describe_architecture, load_config, meta_model
from common.errors import CheckpointError, UnsupportedModelError
from tests.tiny_models import FAMILIES, NUM_EXPERTS, TOP_K, VOCAB_SIZE, make_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_describes_every_family(family: str, tmp_path: Path) -> None:
    architecture = describe_architecture(make_checkpoint(family, tmp_path))
    model = meta_model(load_config(tmp_path), tmp_path)
    assert architecture.model_type == family
    assert (architecture.num_experts, architecture.top_k) == (NUM_EXPERTS, TOP_K)
    assert (architecture.hidden_size, architecture.vocab_size) == (64, VOCAB_SIZE)
    assert architecture.max_context_tokens == 512
    assert 2 <= architecture.num_layers <= 3
    for module in architecture.experts_modules:
        for name, shape in architecture.expert_shapes.items():
            assert model.get_submodule(module).get_parameter(name).shape == (NUM_EXPERTS, *shape)


def test_layers_are_in_forward_order(tmp_path: Path) -> None:
    architecture = describe_architecture(make_checkpoint("qwen3_moe", tmp_path, num_layers=12))
    assert architecture.experts_modules == tuple(f"model.layers.{layer}.mlp.experts" for layer in range(12))


def write_config(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json there"):
        describe_architecture(tmp_path)


def test_a_garbled_config_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(CheckpointError, match="config.json"):
        describe_architecture(tmp_path)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="brand_new_moe"):
        describe_architecture(write_config(tmp_path, model_type="brand_new_moe"))


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    with pytest.raises(
        UnsupportedModelError, match="llama has no MoE layer in the library's experts registry"
    ):
        describe_architecture(write_config(tmp_path, model_type="llama", **config))


def test_a_model_without_a_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="vit is no causal language model"):
        describe_architecture(write_config(tmp_path, model_type="vit"))
