"""Tiny random checkpoints of the library's decoder families, in the Hugging Face layout. No tokenizer, no training.

Weights are random but none is trivial: routing is spread, biases and sinks are not zero, and sliding windows are
shorter than the prompts of the tests.
"""

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from common.own_experts.switch_transformers import SwitchTransformersForSequenceClassification

NUM_EXPERTS = 8
TOP_K = 2
VOCAB_SIZE = 128
SLIDING_WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": NUM_EXPERTS,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
}
_GROUPED: dict[str, Any] = {**_ROUTED, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5}
_LOCAL: dict[str, Any] = {"num_local_experts": NUM_EXPERTS}
_NUMBERED: dict[str, Any] = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 32}
_ALTERNATING = ("sliding_attention", "full_attention")  # repeated over the layers

# What each family needs beyond the common sizes.
_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**_LOCAL, "sliding_window": SLIDING_WINDOW},
    "qwen2_moe": {**_NUMBERED, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
    "qwen3_moe": {**_NUMBERED, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": NUM_EXPERTS},
    "flex_olmo": {"num_experts": NUM_EXPERTS},
    "deepseek_v2": {
        **_LATENT_ATTENTION,
        **_GROUPED,
        "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 1,
    },
    "deepseek_v3": {**_LATENT_ATTENTION, **_GROUPED, "first_k_dense_replace": 1, "num_mtp_layers": 0},
    "gpt_oss": {
        **_LOCAL,
        "head_dim": 16,
        "sliding_window": SLIDING_WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "glm4_moe": {
        **_ROUTED,
        "head_dim": 16,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "num_mtp_layers": 0,
    },
    "glm4_moe_lite": {**_LATENT_ATTENTION, **_ROUTED},
    "granitemoe": _LOCAL,
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 32},
    "granitemoehybrid": {
        **_LOCAL,
        "shared_intermediate_size": 32,
        "position_embedding_type": "rope",
        "layer_types": ("full_attention",),
    },
    "phimoe": {**_LOCAL, "attention_bias": True, "lm_head_bias": True},
    "ernie4_5_moe": {
        "moe_num_experts": NUM_EXPERTS,
        "moe_k": TOP_K,
        "moe_intermediate_size": 32,
        "tie_word_embeddings": True,
    },
    "hunyuan_v1_moe": {"num_experts": NUM_EXPERTS, "moe_topk": TOP_K, "head_dim": 16},
    "dots1": {
        **_ROUTED,
        "first_k_dense_replace": 1,
        "sliding_window": SLIDING_WINDOW,
        "max_window_layers": 1,
    },
    "minimax_m2": {**_LOCAL, "head_dim": 16},
    "exaone_moe": {
        **_NUMBERED,
        "head_dim": 16,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": _ALTERNATING,
    },
    "afmoe": {**_NUMBERED, "head_dim": 16, "sliding_window": SLIDING_WINDOW, "global_attn_every_n_layers": 2},
    "solar_open": {**_ROUTED, "head_dim": 16},
    "mellum": {**_NUMBERED, "head_dim": 16, "sliding_window": SLIDING_WINDOW, "layer_types": _ALTERNATING},
    "laguna": {
        **_NUMBERED,
        "head_dim": 16,
        "shared_expert_intermediate_size": 32,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": _ALTERNATING,
    },
    "hy_v3": {**_NUMBERED, "head_dim": 16},
    "granitemoe_swa": {**_LOCAL, "sliding_window": SLIDING_WINDOW},
    "cohere2_moe": {
        "num_experts": NUM_EXPERTS,
        "head_dim": 16,
        "sliding_window": SLIDING_WINDOW,
        "sliding_window_pattern": 2,
    },
    "mimo_v2_flash": {
        "n_routed_experts": NUM_EXPERTS,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "v_head_dim": 16,
        "sliding_window": SLIDING_WINDOW,
    },
    "axk1": {**_LATENT_ATTENTION, **_GROUPED},
    "llama4_text": {
        **_LOCAL,
        "intermediate_size_mlp": 32,
        "head_dim": 16,
        "attention_chunk_size": SLIDING_WINDOW,
        "no_rope_layer_interval": 2,
        "floor_scale": 4,
        "attn_scale": 1.0,
    },
    "dbrx": {
        "d_model": 64,  # the name that the feed-forward sizes are taken from
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": NUM_EXPERTS, "moe_top_k": TOP_K},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
}
_UNSUPPORTED_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **_NUMBERED,
        "shared_expert_intermediate_size": 32,
        "head_dim": 16,
        "layer_types": ("linear_attention", "full_attention"),
    },
    "jamba": {"num_experts": NUM_EXPERTS},
    "lfm2_moe": {**_NUMBERED, "num_dense_layers": 1, "layer_types": ("conv", "full_attention")},
    "nemotron_h": _ROUTED,
    "minimax": {**_LOCAL, "head_dim": 16},
    "qwen3_5_moe_text": {
        **_NUMBERED,
        "shared_expert_intermediate_size": 32,
        "head_dim": 16,
        "layer_types": ("linear_attention", "full_attention"),
    },
}


def _switch_transformers(num_layers: int) -> dict[str, Any]:
    """Every second layer is sparse, beginning with the second; of three, the second alone."""
    return {
        "vocab_size": VOCAB_SIZE,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": num_layers,
        "num_decoder_layers": num_layers,
        "num_sparse_encoder_layers": num_layers // 2,
        "num_sparse_decoder_layers": num_layers // 2,
        "num_heads": 4,
        "num_experts": NUM_EXPERTS,
        "expert_capacity": 512,  # the library drops nothing: what is served never does
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }


def _nllb_moe(num_layers: int) -> dict[str, Any]:
    """Every second layer is sparse, beginning with the second; of three, the second alone."""
    return {
        "vocab_size": VOCAB_SIZE,
        "d_model": 64,
        "max_position_embeddings": 512,
        "num_experts": NUM_EXPERTS,
        "pad_token_id": 0,
        "bos_token_id": None,
        "decoder_start_token_id": 2,
        **{
            f"{half}_{field}": value
            for half in ("encoder", "decoder")
            for field, value in (
                ("layers", num_layers),
                ("ffn_dim", 48),
                ("attention_heads", 4),
                ("sparse_step", 2),
            )
        },
    }


_ENCODER_DECODER_FAMILIES = {"switch_transformers": _switch_transformers, "nllb-moe": _nllb_moe}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
ENCODER_DECODER_FAMILIES: tuple[str, ...] = tuple(_ENCODER_DECODER_FAMILIES)
# In the experts registry, but with recurrent, convolutional or otherwise foreign caches.
UNSUPPORTED_FAMILIES: tuple[str, ...] = tuple(_UNSUPPORTED_FAMILIES)


def make_checkpoint(
    family: str,
    folder: Path,
    *,
    num_layers: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """Write a tiny random checkpoint of `family` into `folder` and return the folder.

    Args:
        num_layers: decoder layers, 2 or more; in many families the first one is dense. Encoder layers as well.
        config: changes to the family's config: sizes, `eos_token_id` (none by default, so nothing ends early).
    """
    model = make_model(family, num_layers=num_layers, dtype=dtype, seed=seed, **config)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def make_classifier_checkpoint(folder: Path, labels: Sequence[str], **config: Any) -> Path:
    """Write a tiny classifier into `folder` and return it: the encoder of a Switch model under a random head."""
    with TemporaryDirectory() as whole:
        make_checkpoint("switch_transformers", Path(whole), num_layers=4, **config)
        id2label = dict(enumerate(labels))
        label2id = {label: number for number, label in id2label.items()}
        torch.manual_seed(0)
        model = SwitchTransformersForSequenceClassification.from_pretrained(
            whole, id2label=id2label, label2id=label2id
        )
        model.save_pretrained(folder)
    return folder


def make_model(
    family: str, *, num_layers: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """The model whose weights `make_checkpoint` saves: the library's own."""
    if family in _ENCODER_DECODER_FAMILIES:
        fields = _ENCODER_DECODER_FAMILIES[family](num_layers)
        loader = AutoModelForSeq2SeqLM
    else:
        fields = _decoder_fields(family, num_layers)
        loader = AutoModelForCausalLM
    model = loader.from_config(
        AutoConfig.for_model(family, **{**fields, "eos_token_id": None, **config}), dtype=dtype
    )
    assert isinstance(model, PreTrainedModel)
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _decoder_fields(family: str, num_layers: int) -> dict[str, Any]:
    fields = {**_COMMON, **{**_FAMILIES, **_UNSUPPORTED_FAMILIES}[family], "num_hidden_layers": num_layers}
    if pattern := fields.get("layer_types"):
        fields["layer_types"] = [pattern[layer % len(pattern)] for layer in range(num_layers)]
    return fields


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            centre = 1.0 if tensor.ndim < 2 and bool((tensor == 1).all()) else 0.0  # norms multiply
            tensor.copy_(centre + _scale(name, tensor) * noise)


def _scale(name: str, tensor: Tensor) -> float:
    """Standard deviation: small on vectors (norms, biases, sinks), wide on routers and the output layer."""
    if tensor.ndim < 2:
        return 0.2
    gain = 3.0 if "lm_head" in name or "router" in name or name.endswith("gate.weight") else 1.5
    return gain / sqrt(tensor.shape[-1])
