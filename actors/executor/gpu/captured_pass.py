"""A decode pass that is queued as a whole: the experts hook runs its layers on the device, without asking the host."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from actors.executor.gpu.pager import DevicePager
from actors.executor.gpu.slot_experts import run_slot_experts

# (layer, topk_ids, topk_weights) -> those to use instead, on the device: for measurements with a given routing.
Reroute = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
# MoE layer -> [rows, experts] scores in the place of its router's logits, before its turn: for measurements.
Foresee = Callable[[int], Tensor]


class NotCapturableError(RuntimeError):
    """A step cannot become a graph: something in it waits for the device, or its rows are not what the host knows."""


@dataclass(frozen=True)
class CapturedPass:
    """What a layer's experts need to know of the pass they are part of."""

    pager: DevicePager
    num_layers: int
    num_rows: int  # one token each
    num_active: Tensor  # int32 [1]; rows from there on are padding
    prefetches: bool = False  # whether next_scores are of use
    reroute: Reroute | None = None
    foresee: Foresee | None = None

    def run_experts(
        self,
        layer: int,
        experts: nn.Module,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        next_scores: Tensor | None = None,
    ) -> Tensor:
        """`slot_experts.run_slot_experts` of this pass.

        Raises:
            NotCapturableError: a token is several rows to the experts (Llama 4 with several experts per token).
        """
        if len(hidden) != self.num_rows:
            raise NotCapturableError(f"its experts take {len(hidden)} rows for {self.num_rows} tokens")
        if self.reroute is not None:
            ids, weights = self.reroute(layer, ids, weights)
        if self.foresee is not None and layer + 1 < self.num_layers:
            next_scores = self.foresee(layer + 1)
        if not self.prefetches:
            next_scores = None
        return run_slot_experts(
            self.pager, layer, experts, hidden, ids, weights, self.num_active, next_scores
        )
