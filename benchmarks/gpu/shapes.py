"""Models of a published shape with random weights, and their experts in host memory, without a checkpoint.

Random weights are fair for bytes, latency and memory only: routing is near uniform, and the text is noise.
"""

import mmap
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.architecture import find_experts_modules, per_expert_shapes
from common.expert_layout import ExpertLayout
from common.own_experts import own_model_class

STD = 0.02  # of every weight; norms are 1

# Changes to a config that make it a toy, to try a benchmark on a laptop's CPU.
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 4,
}


def qwen3_30b(num_layers: int = 48, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PretrainedConfig:
    """Qwen3-30B-A3B as published: 30.5 B parameters, of which 3.3 B compute a token.

    Args:
        changes: to other fields of the config, for tests at a small size.
    """
    fields: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,  # of dense layers, of which there are none
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": dtype,
    }
    config = AutoConfig.for_model("qwen3_moe", **{**fields, **changes})
    assert isinstance(config, PretrainedConfig)
    return config


def meta_causal_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model in the config's dtype, without storage: the library's, or ours where it has one without our experts."""
    own_class = own_model_class(config)
    with torch.device("meta"):
        if own_class is None:
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        else:
            model = own_class(config).to(config.dtype)
    assert isinstance(model, PreTrainedModel)
    return model.eval().requires_grad_(False)


def random_model(config: PretrainedConfig, device: torch.device, seed: int) -> PreTrainedModel:
    """The whole model on the device, experts included."""
    return _materialised(meta_causal_model(config), device, seed)


def random_dense_model(config: PretrainedConfig, device: torch.device, seed: int) -> PreTrainedModel:
    """The model on the device with experts modules that have no tensors, as the executor gives slots to."""
    model = meta_causal_model(config)
    for module in find_experts_modules(model).values():
        for name in per_expert_shapes(module):
            delattr(module, name)
    return _materialised(model, device, seed)


def random_model_with_cpu_experts(
    config: PretrainedConfig, device: torch.device, seed: int
) -> PreTrainedModel:
    """`random_model` with its experts in ordinary host memory; the device never holds more than one of their tensors."""
    model = random_dense_model(config, device, seed)
    generator = torch.Generator(device).manual_seed(seed)
    whole = find_experts_modules(meta_causal_model(config))
    for path, module in find_experts_modules(model).items():
        for name, parameter in whole[path].named_parameters(recurse=False):
            drawn = torch.empty_like(parameter, device=device).normal_(std=STD, generator=generator)
            module.register_parameter(name, nn.Parameter(drawn.cpu(), requires_grad=False))
    return model


def _materialised(model: PreTrainedModel, device: torch.device, seed: int) -> PreTrainedModel:
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=STD, generator=generator)
        else:
            parameter.fill_(1.0)
    _rebuild_rotary_embedding(model, device)
    return model


def _rebuild_rotary_embedding(model: PreTrainedModel, device: torch.device) -> None:
    """Its frequencies are buffers that no checkpoint holds; only its constructor computes them."""
    rotary: nn.Module = model.base_model.get_submodule("rotary_emb")
    model.base_model.rotary_emb = type(rotary)(config=model.config).to(device)
    others = [name for name, buffer in model.named_buffers() if "rotary_emb" not in name and buffer.numel()]
    assert not others, f"buffers without a value: {others}"


class RandomExpertSource:
    """An `ExpertSource` of random experts, all in one private buffer of this process, each from a page boundary on.

    Args:
        config: whose experts.
        device: draws the weights; seconds for 60 GB on a GPU.
    """

    def __init__(self, config: PretrainedConfig, seed: int, device: torch.device) -> None:
        modules = list(find_experts_modules(meta_causal_model(config)).values())
        self.layout = ExpertLayout.from_shapes(per_expert_shapes(modules[0]), config.dtype)
        self.model_fingerprint = f"random{seed:010d}"
        self.num_experts: int = modules[0].get_parameter("down_proj").shape[0]
        slab_bytes = self.layout.slab_bytes
        stride = -(-slab_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        buffer = _anonymous_memory(len(modules) * self.num_experts * stride)
        padded = buffer.view(len(modules), self.num_experts, stride)
        _fill(padded.view(self.layout.dtype), seed, device)
        self._slabs = {
            (layer, expert_id): padded[layer, expert_id, :slab_bytes]
            for layer in range(len(modules))
            for expert_id in range(self.num_experts)
        }
        self._layers = padded[..., :slab_bytes]

    def fetch(self, layer: int, expert_id: int) -> Tensor:
        return self._slabs[layer, expert_id]

    def local_slabs(self) -> Mapping[tuple[int, int], Tensor]:
        return self._slabs

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Views of all experts of a layer by tensor name: [experts, *shape], strided."""
        return self.layout.views(self._layers[layer])


def load_experts_into(model: PreTrainedModel, source: RandomExpertSource) -> None:
    """Overwrite an all-resident model's experts with the source's, so that both compute the same."""
    for layer, module in enumerate(find_experts_modules(model).values()):
        for name, weights in source.layer(layer).items():
            _copy_each(module.get_parameter(name), weights)


def _copy_each(target: Tensor, source: Tensor) -> None:
    """Expert by expert, each contiguous: a strided whole would be gathered in host memory first."""
    for expert, weights in zip(target.unbind(), source.unbind(), strict=True):
        expert.copy_(weights, non_blocking=True)


def _anonymous_memory(num_bytes: int) -> Tensor:
    """[num_bytes] uint8 from a page boundary on, in huge pages where the kernel has them."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(memory, np.uint8))


def _fill(layers: Tensor, seed: int, device: torch.device) -> None:
    """Args: layers: [layers, experts, elements] in host memory."""
    if device.type == "cuda":
        _fill_by_gpu(layers.unbind(), seed, device)
        return
    with ThreadPoolExecutor() as threads:
        generators = [torch.Generator().manual_seed(seed + layer) for layer in range(len(layers))]
        list(threads.map(lambda layer, drawn: layer.normal_(std=STD, generator=drawn), layers, generators))


def _fill_by_gpu(layers: Iterable[Tensor], seed: int, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(seed)
    drawn, staged = None, None
    for layer in layers:
        if drawn is None or staged is None:
            drawn = torch.empty_like(layer, device=device)
            staged = torch.empty_like(layer, pin_memory=True)
        staged.copy_(drawn.normal_(std=STD, generator=generator))
        layer.copy_(staged)  # on all cores, which also takes the page faults of new memory
