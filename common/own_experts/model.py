"""What the model classes of this package have in common: the exchange of MoE blocks, and saving under the library's name."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


class OwnExperts(nn.Module):
    """Base of experts modules: parameters with a leading experts dimension, run by the registry's implementations.

    A subclass is decorated with the library's `use_experts_implementation` and makes its parameters in `__init__`.
    """

    # Parameters whose two dimensions are exchanged against how a checkpoint holds them.
    transposed_tensors: ClassVar[tuple[str, ...]] = ()

    num_experts: int

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The implementation "eager".

        Args:
            hidden_states: [tokens, hidden]. top_k_index: [tokens, top_k] int64. top_k_weights: [tokens, top_k].
        Returns:
            [tokens, hidden]
        """
        output: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
        return output

    @torch.no_grad()
    def take(self, **values: Tensor) -> None:
        """Copy the library's initial values; parameters that are not there (slots will be) or on meta take nothing."""
        for name, parameter in self.named_parameters(recurse=False):
            parameter.copy_(values[name])


class OwnExpertsModel(PreTrainedModel):  # type: ignore[misc]  # untyped
    """Mixin before one of the library's model classes: its MoE blocks are exchanged as soon as they are built.

    The library's initialisation is kept, because values of the exchanged blocks are taken over. Loading and saving
    convert expert tensors by the mapping that a subclass has registered under its name.
    """

    library_name: ClassVar[str]  # the architecture that a saved config names
    library_block: ClassVar[type[nn.Module]]
    # The routers' class, and which of their outputs are the logits.
    router_output: ClassVar[tuple[type[nn.Module], int]]
    # Experts per token of a router that knows no other number.
    fixed_top_k: ClassVar[int | None] = None
    # Whether the router's scores scale what goes into the experts, of which no hash table tells.
    scores_scale_inputs: ClassVar[bool] = False
    # Of a model with relative positions, which has no limit of its own: what its tokenizers and training are made for,
    # unless its config says `n_positions`.
    usual_context_tokens: ClassVar[int | None] = None

    @classmethod
    def own_block(cls, block: Any, config: PretrainedConfig) -> nn.Module:
        """The block that takes the place of the library's."""
        raise NotImplementedError

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # which the library would look for in the source of its own class

    def __init__(self, config: PretrainedConfig) -> None:
        implementation = config._experts_implementation or "grouped_mm"
        config._experts_implementation_internal = "eager"  # the library's sub-models know of no other
        super().__init__(config)
        blocks = [
            (name, block) for name, block in self.named_modules() if isinstance(block, self.library_block)
        ]
        for name, block in blocks:
            self.set_submodule(name, self.own_block(block, self.config))
        self.set_experts_implementation(implementation)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write what the unmodified library reads: its keys, its architecture."""
        super().save_pretrained(save_directory, **kwargs)
        self.config.architectures = [self.library_name]
        self.config.save_pretrained(save_directory)
