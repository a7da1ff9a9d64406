"""DBRX. Its checkpoints hold the tensors of a layer's experts one below the other, as matrices of all experts' rows."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DbrxForCausalLM, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, Transpose, WeightConverter
from transformers.integrations.moe import use_experts_implementation
from transformers.models.dbrx.modeling_dbrx import DbrxFFN, DbrxRouter

from common.own_experts.model import OwnExperts, OwnExpertsModel


@use_experts_implementation
class OwnDbrxExperts(OwnExperts):
    transposed_tensors = ("down_proj",)

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        ffn = config.ffn_config
        num_experts, hidden, intermediate = ffn.moe_num_experts, config.d_model, ffn.ffn_hidden_size
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, intermediate))
        self.act_fn = ACT2FN[ffn.ffn_act_fn["name"]]


class OwnDbrxBlock(nn.Module):
    """The library's `DbrxFFN` with experts of ours."""

    def __init__(self, block: DbrxFFN, config: PretrainedConfig) -> None:
        super().__init__()
        ffn = config.ffn_config
        self.router = block.router
        self.top_k, self.norm_order = ffn.moe_top_k, ffn.moe_normalize_expert_weights
        self.experts = OwnDbrxExperts(config)
        gate, up, down = (
            matrix.unflatten(0, (ffn.moe_num_experts, ffn.ffn_hidden_size))
            for matrix in (block.experts.mlp.w1, block.experts.mlp.v1, block.experts.mlp.w2)
        )
        self.experts.take(gate_up_proj=torch.cat([gate, up], dim=1), down_proj=down.transpose(1, 2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, tokens, hidden] in and out."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, expert_ids = self.router(flat).softmax(-1).topk(self.top_k, dim=-1)
        if self.norm_order is not None:
            weights = weights / weights.norm(p=self.norm_order, dim=-1, keepdim=True)
        output: Tensor = self.experts(flat, expert_ids, weights)
        return output.view_as(hidden_states)


class OwnDbrxForCausalLM(OwnExpertsModel, DbrxForCausalLM):  # type: ignore[misc]  # untyped
    library_name = "DbrxForCausalLM"
    library_block = DbrxFFN
    router_output = (DbrxRouter, 0)

    @classmethod
    def own_block(cls, block: Any, config: PretrainedConfig) -> nn.Module:
        return OwnDbrxBlock(block, config)


def model_class(_config: PretrainedConfig) -> type[OwnExpertsModel]:
    return OwnDbrxForCausalLM


class UnflattenExperts(ConversionOps):  # type: ignore[misc]  # untyped
    """[experts * rows, columns] -> [experts, rows, columns], of every source."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], config: PretrainedConfig, **_: Any) -> dict[str, Tensor]:
        num_experts = config.ffn_config.moe_num_experts
        return {key: _only(value).unflatten(0, (num_experts, -1)) for key, value in input_dict.items()}

    @property
    def reverse_op(self) -> "FlattenExperts":
        return FlattenExperts()


class FlattenExperts(ConversionOps):  # type: ignore[misc]  # untyped
    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Tensor]:
        return {key: _only(value).flatten(0, 1) for key, value in input_dict.items()}

    @property
    def reverse_op(self) -> UnflattenExperts:
        return UnflattenExperts()


def _only(tensors: Tensor | list[Tensor]) -> Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors


register_checkpoint_conversion_mapping(
    OwnDbrxForCausalLM.__name__,
    [
        WeightConverter(
            ["experts.mlp.w1", "experts.mlp.v1"],
            "experts.gate_up_proj",
            [UnflattenExperts(), Concatenate(dim=1)],
        ),
        WeightConverter("experts.mlp.w2", "experts.down_proj", [UnflattenExperts(), Transpose(1, 2)]),
    ],
)
