"""Switch Transformers (Fedus et al., arXiv 2101.03961): text to text, and classification of texts by the encoder.

Routing is *dropless* on every version of the library: each token goes to its first expert, whatever `expert_capacity`
says (dynamic gating: Huang et al., arXiv 2303.06182, section 4). transformers up to 5.17 does the same by mistake,
later ones drop a sequence's tokens past the capacity. `dropout_rate` acts outside of experts only.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    SwitchTransformersEncoderModel,
    SwitchTransformersForConditionalGeneration,
)
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)

from common.own_experts.model import OwnExperts, OwnExpertsModel


@use_experts_implementation(has_gate=False)
class SwitchExperts(OwnExperts):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.up_proj = nn.Parameter(torch.empty(config.num_experts, config.d_ff, config.d_model))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.d_model, config.d_ff))
        self.act_fn = ACT2FN[config.dense_act_fn]


class DroplessRouter(SwitchTransformersTop1Router):  # type: ignore[misc]  # untyped
    """A subclass of the library's, so that its recorder of router logits (output 2) finds it."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            hidden_states: [batch, tokens, d_model].
        Returns:
            [batch, tokens, 1] int64 expert ids; their probabilities in the dtype of hidden_states, of the same shape;
            [batch, tokens, experts] logits in the router's dtype.
        """
        inputs = hidden_states.to(self.dtype)
        if self.training and self.jitter_noise > 0:
            inputs = inputs * torch.empty_like(inputs).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        weight, bias = self.classifier.weight, self.classifier.bias
        logits = nn.functional.linear(
            inputs, weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        )
        probabilities = logits.softmax(-1).to(hidden_states.dtype)
        expert_ids = probabilities.argmax(-1, keepdim=True)
        return expert_ids, probabilities.gather(-1, expert_ids), logits


class SwitchBlock(nn.Module):
    """The library's `SwitchTransformersSparseMLP` with experts of ours."""

    def __init__(self, block: SwitchTransformersSparseMLP, config: PretrainedConfig) -> None:
        super().__init__()
        self.router = DroplessRouter(config)
        self.router.classifier = block.router.classifier
        self.experts = SwitchExperts(config)
        experts = list(block.experts.values())
        self.experts.take(
            up_proj=torch.stack([expert.wi.weight for expert in experts]),
            down_proj=torch.stack([expert.wo.weight for expert in experts]),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, tokens, d_model] in and out."""
        expert_ids, weights, _ = self.router(hidden_states)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        output: Tensor = self.experts(flat, expert_ids.reshape(-1, 1), weights.reshape(-1, 1))
        return output.view_as(hidden_states)


class _SwitchModel(OwnExpertsModel):
    library_block = SwitchTransformersSparseMLP
    router_output = (DroplessRouter, 2)
    fixed_top_k = 1
    usual_context_tokens = 512

    @classmethod
    def own_block(cls, block: Any, config: PretrainedConfig) -> nn.Module:
        return SwitchBlock(block, config)


class OwnSwitchTransformersForConditionalGeneration(
    _SwitchModel,
    SwitchTransformersForConditionalGeneration,  # type: ignore[misc]  # untyped
):
    """Text to text; for training too, where `output_router_logits=True` adds the router losses on every version."""

    library_name = "SwitchTransformersForConditionalGeneration"

    def _unpack_router_logits(self, router_outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """As in 5.23; earlier versions expect other outputs of the router."""
        logits = torch.cat(router_outputs, dim=1)  # [batch, layers * tokens, experts]
        return logits, logits.argmax(-1)


class SwitchTransformersForSequenceClassification(
    _SwitchModel,
    SwitchTransformersEncoderModel,  # type: ignore[misc]  # untyped
):
    """The encoder, the mean of its last hidden states over the tokens of a text, and one linear layer.

    The library has no such class; checkpoints are its encoder's, with `classifier` beside.
    """

    library_name = "SwitchTransformersForSequenceClassification"
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^decoder\.", r"^lm_head\."]

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "classifier", None):
            nn.init.normal_(module.weight, std=self.config.initializer_factor * self.config.d_model**-0.5)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids: [batch, tokens] int64, or inputs_embeds: [batch, tokens, d_model].
            attention_mask: [batch, tokens], 0 for padding, which a text's mean leaves out; None: no padding.
            labels: [batch] int64; the loss is their cross entropy.
        """
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        ).last_hidden_state
        logits = self.classifier(mean_over_tokens(hidden, attention_mask))  # [batch, labels]
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def mean_over_tokens(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """
    Args:
        hidden: [batch, tokens, d_model]. attention_mask: [batch, tokens], 0 for padding.
    Returns:
        [batch, d_model], summed in float32.
    """
    if attention_mask is None:
        return hidden.float().mean(1).to(hidden.dtype)
    mask = attention_mask.unsqueeze(-1).float()
    return ((hidden.float() * mask).sum(1) / mask.sum(1)).to(hidden.dtype)


def model_class(config: PretrainedConfig) -> type[OwnExpertsModel]:
    classes: tuple[type[OwnExpertsModel], ...] = (
        SwitchTransformersForSequenceClassification,
        OwnSwitchTransformersForConditionalGeneration,
    )
    return next((own for own in classes if own.library_name in (config.architectures or ())), classes[-1])


def _expert_converters() -> list[WeightConverter]:
    """One tensor per expert in a checkpoint, one per layer here."""
    return [
        WeightConverter(
            f"mlp.experts.expert_*.{stored}.weight", f"mlp.experts.{name}", [MergeModulelist(dim=0)]
        )
        for stored, name in (("wi", "up_proj"), ("wo", "down_proj"))
    ]


for _class in (OwnSwitchTransformersForConditionalGeneration, SwitchTransformersForSequenceClassification):
    register_checkpoint_conversion_mapping(_class.__name__, _expert_converters())
