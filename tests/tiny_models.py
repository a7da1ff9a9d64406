"""Tiny random checkpoints of the library's decoder families, in the Hugging Face layout. No tokenizer, no training.

Weights are random but none is trivial: routing is spread, biases and sinks are not zero, and sliding windows are
shorter than the prompts of the tests.
"""

from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
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
        num_layers: decoder layers, 2 or more; in many families the first one is dense.
        config: changes to the family's config: sizes, `eos_token_id` (none by default, so nothing ends early).
    """
    model = make_model(family, num_layers=num_layers, dtype=dtype, seed=seed, **config)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def make_model(
    family: str, *, num_layers: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """The model whose weights `make_checkpoint` saves."""
    fields = {**_COMMON, **{**_FAMILIES, **_UNSUPPORTED_FAMILIES}[family], "num_hidden_layers": num_layers}
    if pattern := fields.get("layer_types"):
        fields["layer_types"] = [pattern[layer % len(pattern)] for layer in range(num_layers)]
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**fields, "eos_token_id": None, **config}), dtype=dtype
    )
    assert isinstance(model, PreTrainedModel)
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


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
