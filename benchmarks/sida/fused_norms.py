"""Makes a Switch Transformer quicker to train: each of its norms is one kernel, where the library runs five."""

from torch import Tensor, nn
from torch.nn import functional
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersLayerNorm


class _FusedNorm(SwitchTransformersLayerNorm):  # type: ignore[misc]  # untyped
    def forward(self, hidden_states: Tensor) -> Tensor:
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def fuse_norms(model: nn.Module) -> None:
    """In place; what is saved stays the same."""
    for module in model.modules():
        if type(module) is SwitchTransformersLayerNorm:
            module.__class__ = _FusedNorm
