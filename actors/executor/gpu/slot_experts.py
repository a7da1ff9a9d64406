"""The experts of one layer at decode, computed wave by wave from slots whose contents only the device knows.

Two ways: own kernels where the family's experts are gate, up, SiLU and down, or up, ReLU and down, without biases, and the
library's batched forward for every other family. Both compute each (row, choice) pair by itself and sum a row's pairs in their order, so
the output does not depend on slots or waves.
"""

from typing import Any, Protocol

import torch
import triton
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from actors.executor.gpu.chained_launch import chained
from actors.executor.gpu.expert_kernels import combine, down_kernel, up_kernel
from actors.executor.gpu.pager import DevicePager, Wave

_UP_TILE = {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
_DOWN_TILE = {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}


class PairOutputs(Protocol):
    """The outputs of a step's (row, choice) pairs, filled in as waves bring their experts."""

    def add(self, wave: Wave) -> None:
        """Compute the pairs whose experts the wave holds."""

    def combined(self, weights: Tensor) -> Tensor:
        """[rows, hidden], once every wave was added. Args: weights: [rows, top_k]."""


def run_slot_experts(
    pager: DevicePager,
    layer: int,
    experts: nn.Module,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_active: Tensor,
    next_scores: Tensor | None = None,
) -> Tensor:
    """Queue one layer's experts, paging included, without a host synchronisation.

    Args:
        experts: the library's module, with slots in the place of its expert tensors.
        hidden: [rows, hidden]. ids, weights: [rows, top_k]. num_active: int32 [1]; later rows are padding.
        next_scores: as `DevicePager.waves`.
    Returns:
        [rows, hidden]; undefined for padding rows.
    """
    kind = KernelPairOutputs if kernels_fit(experts) else LibraryPairOutputs
    outputs: PairOutputs = kind(experts, hidden, ids, num_active, pager.poisons)
    for wave in pager.waves(layer, ids, num_active, next_scores):
        outputs.add(wave)
    return outputs.combined(weights)


def kernels_fit(experts: Any) -> bool:
    """Whether the family's experts are what `expert_kernels` computes."""
    if experts.has_bias or experts.is_transposed or getattr(experts, "has_post_expert_norm", False):
        return False
    if getattr(experts, "transposed_tensors", ()):
        return False
    activation = type(experts.act_fn).__name__
    if not experts.has_gate:
        return activation == "ReLU"
    plain_gate = getattr(type(experts)._apply_gate, "__name__", "") == "_default_apply_gate"
    is_concatenated = bool(getattr(experts, "is_concatenated", True))
    return plain_gate and is_concatenated and activation in ("SiLU", "SiLUActivation")


def kernel_weights(experts: Any) -> tuple[Tensor, Tensor]:
    """Of experts that `kernels_fit`: [slots, intermediate or twice that, hidden] and [slots, hidden, intermediate], strided."""
    return experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj


class KernelPairOutputs:
    def __init__(self, experts: Any, hidden: Tensor, ids: Tensor, num_active: Tensor, poisons: bool) -> None:
        self._hidden, self._ids, self._num_active = hidden.contiguous(), ids, num_active
        self._up, self._down = kernel_weights(experts)
        num_pairs = ids.numel()
        self._activated = hidden.new_empty(num_pairs, self._down.shape[-1])
        self._outputs = hidden.new_empty(num_pairs, hidden.shape[-1])
        if poisons:  # a pair that no wave computed would show
            self._activated.fill_(float("nan"))
            self._outputs.fill_(float("nan"))

    def add(self, wave: Wave) -> None:
        hidden_size, intermediate = self._outputs.shape[-1], self._activated.shape[-1]
        entries = (self._ids, self._num_active, wave.slots, wave.experts, wave.num)
        sizes = {
            "HIDDEN": hidden_size,
            "INTERMEDIATE": intermediate,
            "TOP_K": self._ids.shape[1],
            "PAIRS_P": triton.next_power_of_2(self._ids.numel()),
            **chained(self._ids.device),
        }
        up_kernel[(triton.cdiv(intermediate, _UP_TILE["BLOCK_N"]), wave.max_experts)](
            self._hidden, *entries, self._up, self._activated,
            GATED=self._up.shape[1] == 2 * intermediate, SLOT_STRIDE=self._up.stride(0), **sizes, **_UP_TILE,
        )  # fmt: skip
        down_kernel[(triton.cdiv(hidden_size, _DOWN_TILE["BLOCK_N"]), wave.max_experts)](
            self._activated, *entries, self._down, self._outputs,
            SLOT_STRIDE=self._down.stride(0), **sizes, **_DOWN_TILE,
        )  # fmt: skip

    def combined(self, weights: Tensor) -> Tensor:
        return combine(self._outputs, weights.contiguous())


class LibraryPairOutputs:
    def __init__(
        self, experts: nn.Module, hidden: Tensor, ids: Tensor, num_active: Tensor, poisons: bool
    ) -> None:
        self._experts, self._ids = experts, ids.reshape(-1).long()  # [pairs]
        self._hidden = hidden.repeat_interleave(ids.shape[1], dim=0)  # [pairs, hidden]
        self._ones = hidden.new_ones(len(self._ids), 1)
        self._outputs = torch.full_like(self._hidden, float("nan") if poisons else 0.0)

    def add(self, wave: Wave) -> None:
        slots = wave.slot_map[self._ids]  # [pairs]
        forward = ALL_EXPERTS_FUNCTIONS["batched_mm"]
        computed = forward(self._experts, self._hidden, slots.clamp(min=0).long()[:, None], self._ones)
        self._outputs = torch.where((slots >= 0)[:, None], computed, self._outputs)

    def combined(self, weights: Tensor) -> Tensor:
        weighted = self._outputs * weights.reshape(-1, 1)
        return weighted.view(*weights.shape, -1).sum(dim=1).to(self._outputs.dtype)
