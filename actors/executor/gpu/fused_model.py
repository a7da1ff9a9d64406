"""Decode steps and prompts in fused kernels, for families whose layers are plain pre-norm attention and routed experts.

The library's modules keep the weights. Every other family decodes through `LibraryStep` and reads prompts through its own
modules.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.executor.families import window_of_layer
from actors.executor.gpu.attention_kernels import decode_attention, rotate_and_store
from actors.executor.gpu.captured_pass import CapturedPass
from actors.executor.gpu.dense_kernels import linear, rms_norm, route
from actors.executor.gpu.prompt_kernels import prompt_attention, prompt_linear
from actors.executor.gpu.prompt_pass import PackedPrompts, PromptPass
from actors.executor.kv_cache import RowCache
from actors.executor.passes import PassClock
from common.architecture import is_experts_module

_FAMILIES = ("qwen3_moe", "mixtral")


def fuses(model: PreTrainedModel) -> bool:
    """Whether `FusedModel` computes what the model's own modules do."""
    return model.config.model_type in _FAMILIES


@dataclass(frozen=True)
class _Layer:
    """The weights of one decoder layer as the kernels take them."""

    input_norm: Tensor
    qkv: Tensor  # [q + k + v outputs, hidden]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    output: nn.Linear
    post_norm: Tensor
    mlp: Any
    moe_layer: int | None  # its number among the MoE layers; None for a dense one
    window: int | None
    scaling: float


class FusedModel:
    """
    Args:
        cache: whose rows are read and written; its layers are allocated.
        clock: names the running pass.
    """

    def __init__(self, model: PreTrainedModel, cache: RowCache, clock: PassClock) -> None:
        self._cache, self._clock = cache, clock
        self._decoder: Any = model.base_model
        self._head: Tensor = model.get_output_embeddings().weight
        config = model.config
        self._eps, self._top_k = config.rms_norm_eps, config.num_experts_per_tok
        self._renormalize = bool(getattr(config, "norm_topk_prob", True))
        self._weights_dtype = torch.float32 if config.model_type == "mixtral" else model.dtype
        self._layers: list[_Layer] = []
        routers: list[nn.Parameter] = []
        num_moe = 0
        for layer in self._decoder.layers:
            is_moe = any(is_experts_module(module) for module in layer.mlp.children())
            self._layers.append(_fused(layer, num_moe if is_moe else None))
            num_moe += is_moe
            if is_moe:
                routers.append(layer.mlp.gate.weight)
        self._num_experts = len(routers[0])
        self._routers = _joined(routers)  # [layers * experts, hidden]: two layers' routers are one matrix

    def decode(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Queue one token of each of several rows, without a host synchronisation.

        Args:
            token_ids, positions, rows: [batch] int64, on the device.
        Returns:
            [batch, vocab] float32 logits.
        """
        rotation, x, delta = self._rotation(positions), self._decoder.embed_tokens(token_ids), None
        for index, layer in enumerate(self._layers):
            normed, x = rms_norm(x, layer.input_norm, self._eps, delta)
            delta = self._attend(layer, index, normed, rotation, positions, rows)
            normed, x = rms_norm(x, layer.post_norm, self._eps, delta)
            delta = layer.mlp(normed) if layer.moe_layer is None else self._route(layer, normed)
        return self._logits(x, delta)

    def prefill(self, prompts: PackedPrompts) -> Tensor:
        """Queue the next tokens of several rows, in a `PromptPass`, without a host synchronisation.

        Returns:
            [chunks, vocab] float32 logits of each chunk's last token.
        """
        positions, rows = prompts.positions, prompts.rows
        rotation, x, delta = self._rotation(positions), self._decoder.embed_tokens(prompts.token_ids), None
        for index, layer in enumerate(self._layers):
            normed, x = rms_norm(x, layer.input_norm, self._eps, delta)
            keys, values = self._cache.of_layer(index)
            qkv = prompt_linear(normed, layer.qkv, layer.qkv_bias)
            q = self._rotate(layer, qkv, rotation, positions, rows, keys, values)
            attended = prompt_attention(
                q, keys, values, rows, positions, prompts.blocks, layer.scaling, layer.window
            )
            delta = prompt_linear(attended.flatten(1), layer.output.weight, layer.output.bias)
            normed, x = rms_norm(x, layer.post_norm, self._eps, delta)
            delta = layer.mlp(normed) if layer.moe_layer is None else self._route_prompt(layer, normed)
        assert delta is not None, "a model has layers"
        return self._logits(x[prompts.last], delta[prompts.last])

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every token's position, [tokens, rotary_dim] each."""
        like = self._decoder.embed_tokens.weight[:1].unsqueeze(1)  # of the model's dtype and device
        cos, sin = self._decoder.rotary_emb(like, positions.unsqueeze(0))
        return cos.squeeze(0).contiguous(), sin.squeeze(0).contiguous()

    def _logits(self, x: Tensor, delta: Tensor | None) -> Tensor:
        normed, _ = rms_norm(x, self._decoder.norm.weight, self._eps, delta)
        return linear(normed, self._head, out_dtype=torch.float32)

    def _rotate(
        self,
        layer: _Layer,
        qkv: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        rows: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        return rotate_and_store(
            qkv, *rotation, positions, rows, keys, values, layer.q_norm, layer.k_norm, self._eps
        )

    def _attend(
        self,
        layer: _Layer,
        index: int,
        normed: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        rows: Tensor,
    ) -> Tensor:
        keys, values = self._cache.of_layer(index)
        qkv = linear(normed, layer.qkv, layer.qkv_bias)
        q = self._rotate(layer, qkv, rotation, positions, rows, keys, values)
        attended = decode_attention(q, keys, values, rows, positions, layer.scaling, layer.window)
        return linear(attended.flatten(1), layer.output.weight, layer.output.bias)

    def _route(self, layer: _Layer, normed: Tensor) -> Tensor:
        running, mlp = self._clock.running, layer.mlp
        assert isinstance(running, CapturedPass) and layer.moe_layer is not None
        foresees = running.prefetches and layer.moe_layer + 1 < running.num_layers
        logits = linear(normed, self._routers_from(layer.moe_layer, foresees))
        ids, weights = self._chosen(logits)
        next_scores = logits[:, self._num_experts :] if foresees else None
        return running.run_experts(layer.moe_layer, mlp.experts, normed, ids, weights, next_scores)

    def _route_prompt(self, layer: _Layer, normed: Tensor) -> Tensor:
        running, mlp = self._clock.running, layer.mlp
        assert isinstance(running, PromptPass) and layer.moe_layer is not None
        foresees = running.guesses and layer.moe_layer + 1 < running.num_layers
        logits = prompt_linear(normed, self._routers_from(layer.moe_layer, foresees))
        ids, weights = self._chosen(logits)
        next_ids = self._chosen(logits[:, self._num_experts :].contiguous())[0] if foresees else None
        return running.run_experts(layer.moe_layer, mlp.experts, normed, ids, weights, next_ids)

    def _routers_from(self, moe_layer: int, foresees: bool) -> Tensor:
        """[experts, hidden] the layer's router, or [2 * experts, hidden] with the next one's, which then guesses."""
        start = moe_layer * self._num_experts
        return self._routers[start : start + (2 if foresees else 1) * self._num_experts]

    def _chosen(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return route(logits, self._num_experts, self._top_k, self._renormalize, self._weights_dtype)


def _fused(layer: Any, moe_layer: int | None) -> _Layer:
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=_joined([projection.weight for projection in projections]),
        qkv_bias=None if projections[0].bias is None else _joined([p.bias for p in projections]),
        q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        output=attention.o_proj,
        post_norm=layer.post_attention_layernorm.weight,
        mlp=layer.mlp,
        moe_layer=moe_layer,
        window=window_of_layer(attention.config, attention.layer_idx),
        scaling=attention.scaling,
    )


def _joined(parameters: list[nn.Parameter]) -> Tensor:
    """One tensor whose parts the parameters become, so that nothing is held twice."""
    joined = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joined
