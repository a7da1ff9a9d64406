"""NLLB-MoE (Costa-jussà et al., arXiv 2207.04672): translation, two experts per token.

The experts follow the formula of the model's publication and of transformers 4: transformers 5.17 to 5.23 use experts 0
and 1 only, whatever the router says. Routing is dropless: with the published `moe_eval_capacity_token_fraction` of 1
nothing is dropped, and other capacities are not applied. For inference; `moe_token_dropout` scales in training, too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import NllbMoeForConditionalGeneration, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.integrations.moe import use_experts_implementation
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP, NllbMoeTop2Router

from common.errors import UnsupportedModelError
from common.own_experts.model import OwnExperts, OwnExpertsModel


@use_experts_implementation(has_gate=False, has_bias=True)
class NllbExperts(OwnExperts):
    def __init__(self, config: PretrainedConfig, ffn_dim: int) -> None:
        super().__init__()
        num_experts, hidden_size = config.num_experts, config.d_model
        self.num_experts = num_experts
        self.up_proj = nn.Parameter(torch.empty(num_experts, ffn_dim, hidden_size))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, ffn_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_dim))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.act_fn = ACT2FN[config.activation_function]


class TopTwoRouter(NllbMoeTop2Router):  # type: ignore[misc]  # untyped
    """A subclass of the library's, so that its recorder of router logits (output 2) finds it."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.output_scale = 1 - config.moe_token_dropout  # of experts, in evaluation

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            hidden_states: [tokens, hidden].
        Returns:
            [tokens, 2] int64 expert ids; their weights in the dtype of hidden_states; [tokens, experts] logits in the
            router's dtype.
        """
        weight, bias = self.classifier.weight, self.classifier.bias
        logits = nn.functional.linear(
            hidden_states.to(self.dtype), weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        )
        probabilities = logits.softmax(-1).to(hidden_states.dtype)
        first = probabilities.argmax(-1, keepdim=True)
        second = logits.scatter(-1, first, float("-inf")).argmax(-1, keepdim=True)
        expert_ids = torch.cat([first, second], dim=-1)
        chosen = probabilities.gather(-1, expert_ids)  # [tokens, 2]
        total = chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).eps)
        return expert_ids, chosen / total * self.output_scale, logits


class NllbBlock(nn.Module):
    """The library's `NllbMoeSparseMLP` with experts of ours."""

    def __init__(self, block: NllbMoeSparseMLP, config: PretrainedConfig) -> None:
        super().__init__()
        self.router = TopTwoRouter(config)
        self.router.classifier = block.router.classifier
        experts = [block.experts[f"expert_{expert_id}"] for expert_id in range(config.num_experts)]
        self.experts = NllbExperts(config, experts[0].fc1.out_features)
        self.experts.take(
            up_proj=torch.stack([expert.fc1.weight for expert in experts]),
            up_proj_bias=torch.stack([expert.fc1.bias for expert in experts]),
            down_proj=torch.stack([expert.fc2.weight for expert in experts]),
            down_proj_bias=torch.stack([expert.fc2.bias for expert in experts]),
        )

    def forward(self, hidden_states: Tensor, _padding_mask: Tensor | None = None) -> Tensor:
        """[batch, tokens, hidden] in and out. Padding is routed like any token: nothing is dropped in its favour, and
        nobody reads it.
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        expert_ids, weights, _ = self.router(flat)
        output: Tensor = self.experts(flat, expert_ids, weights)
        return output.view_as(hidden_states)


class OwnNllbMoeForConditionalGeneration(OwnExpertsModel, NllbMoeForConditionalGeneration):  # type: ignore[misc]
    library_name = "NllbMoeForConditionalGeneration"
    library_block = NllbMoeSparseMLP
    router_output = (TopTwoRouter, 2)
    fixed_top_k = 2

    def __init__(self, config: PretrainedConfig) -> None:
        if config.second_expert_policy != "all":
            raise UnsupportedModelError(
                config.name_or_path or self.library_name,
                f"second_expert_policy={config.second_expert_policy!r} draws experts at random; only 'all' is served",
            )
        super().__init__(config)

    @classmethod
    def own_block(cls, block: Any, config: PretrainedConfig) -> nn.Module:
        return NllbBlock(block, config)


def model_class(_config: PretrainedConfig) -> type[OwnExpertsModel]:
    return OwnNllbMoeForConditionalGeneration


def _expert_converters() -> list[WeightConverter]:
    """One tensor per expert in a checkpoint, one per layer here."""
    names = {
        "fc1.weight": "up_proj",
        "fc1.bias": "up_proj_bias",
        "fc2.weight": "down_proj",
        "fc2.bias": "down_proj_bias",
    }
    return [
        WeightConverter(f"ffn.experts.expert_*.{stored}", f"ffn.experts.{name}", [MergeModulelist(dim=0)])
        for stored, name in names.items()
    ]


register_checkpoint_conversion_mapping(OwnNllbMoeForConditionalGeneration.__name__, _expert_converters())
