"""The expert in one slot, computed by itself, operation by operation as the library's grouped_mm forward does."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

_RowWise = Callable[[Tensor], Tensor]


class SlotExpert:
    """
    Args:
        experts: the library's module, with slots in the place of its expert tensors.
    """

    def __init__(self, experts: nn.Module, slot: int) -> None:
        self._first, self._first_bias = _linear(
            experts, "gate_up_proj" if experts.has_gate else "up_proj", slot
        )
        self._last, self._last_bias = _linear(experts, "down_proj", slot)
        self._activate: _RowWise = getattr(experts, "_apply_gate" if experts.has_gate else "act_fn")
        self._norm: _RowWise | None = getattr(experts, "post_expert_norm", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] of the expert's output before weighting."""
        inner = torch.mm(hidden, self._first)
        if self._first_bias is not None:
            inner += self._first_bias
        output = torch.mm(self._activate(inner), self._last)
        if self._last_bias is not None:
            output += self._last_bias
        return output if self._norm is None else self._norm(output)


def _linear(experts: nn.Module, name: str, slot: int) -> tuple[Tensor, Tensor | None]:
    """[in, out] weight and [out] bias: views of the slot."""
    weight: Tensor = getattr(experts, name)[slot]
    bias = getattr(experts, f"{name}_bias")[slot] if experts.has_bias else None
    return weight if experts.is_transposed else weight.t(), bias
