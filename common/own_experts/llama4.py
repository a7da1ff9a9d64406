"""Llama 4, its text model: of a multimodal checkpoint too, whose images are not served.

The router's score multiplies what goes into an expert, not what comes out, and the experts' sum joins a shared expert's
output. Layers without rotary embeddings scale their queries by position ("temperature tuning"); here by every row's own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Llama4ForCausalLM, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextDecoderLayer, Llama4TextMoe

from common.own_experts.model import OwnExperts, OwnExpertsModel


@use_experts_implementation(is_transposed=True)
class Llama4Experts(OwnExperts):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        num_experts, hidden, intermediate = (
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
        )
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, hidden, 2 * intermediate))
        self.down_proj = nn.Parameter(torch.empty(num_experts, intermediate, hidden))
        self.act_fn = ACT2FN[config.hidden_act]


class Llama4Block(nn.Module):
    """The library's `Llama4TextMoe`, which runs every expert on every token, with experts of ours."""

    def __init__(self, block: Llama4TextMoe, config: PretrainedConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router, self.shared_expert = block.router, block.shared_expert
        self.experts = Llama4Experts(config)
        self.experts.take(gate_up_proj=block.experts.gate_up_proj, down_proj=block.experts.down_proj)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            hidden_states: [batch, tokens, hidden].
        Returns:
            [batch * tokens, hidden]; [batch * tokens, experts] router logits.
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, logits = self.router(flat)
        top_logits, expert_ids = logits.topk(self.top_k, dim=-1)
        scores = top_logits.float().sigmoid().to(flat.dtype)  # [batch * tokens, top_k]
        # A token's choices differ in their input, so each is a row of its own, and weighs 1.
        inputs = (flat.unsqueeze(1) * scores.unsqueeze(-1)).flatten(0, 1)  # [batch * tokens * top_k, hidden]
        routed: Tensor = self.experts(
            inputs, expert_ids.reshape(-1, 1), torch.ones_like(scores).reshape(-1, 1)
        )
        return self.shared_expert(flat) + routed.unflatten(0, (-1, self.top_k)).sum(1), logits


class _QueryTemperature:
    """Scales the queries of one layer without rotary embeddings by position (arXiv 2501.19399).

    The library takes positions from the cache, one number for all rows; this takes the layer's `position_ids`.
    """

    def __init__(self, layer: Llama4TextDecoderLayer, config: PretrainedConfig) -> None:
        self._floor_scale, self._attn_scale = config.floor_scale, config.attn_scale
        self._positions = torch.empty(0)
        layer.self_attn.attn_temperature_tuning = False
        layer.register_forward_pre_hook(self._keep_positions, with_kwargs=True)
        layer.self_attn.q_proj.register_forward_hook(self._scale)

    def _keep_positions(self, _layer: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self._positions = kwargs["position_ids"]  # [rows or 1, queries]

    def _scale(self, _q_proj: nn.Module, _args: Any, queries: Tensor) -> Tensor:
        """[rows, queries, heads * head_dim] in and out."""
        steps = torch.floor((self._positions.float() + 1.0) / self._floor_scale)
        scales = torch.log1p(steps) * self._attn_scale + 1.0
        scaled: Tensor = queries * scales.unsqueeze(-1)
        return scaled.to(queries.dtype)


class OwnLlama4ForCausalLM(OwnExpertsModel, Llama4ForCausalLM):  # type: ignore[misc]  # untyped
    library_name = "Llama4ForCausalLM"
    library_block = Llama4TextMoe
    router_output = (Llama4Router, 1)
    scores_scale_inputs = True

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config.get_text_config())
        if self.config.attn_temperature_tuning:
            for layer in self.model.layers:
                if not layer.self_attn.use_rope:
                    _QueryTemperature(layer, self.config)

    @classmethod
    def own_block(cls, block: Any, config: PretrainedConfig) -> nn.Module:
        return Llama4Block(block, config)


def model_class(_config: PretrainedConfig) -> type[OwnExpertsModel]:
    return OwnLlama4ForCausalLM
