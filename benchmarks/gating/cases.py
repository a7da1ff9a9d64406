"""What is measured: every gating on the same experts, tokens and routing, or why one is left out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gating.layers import (
    Experts,
    Routing,
    Shape,
    capacity_of,
    dense,
    dropped_share,
    dynamic,
    static_by_indices,
    static_by_masks,
)

STATIC = {"masks": static_by_masks, "indices": static_by_indices}
CAPACITY_FACTORS = (1.0, 1.25, 2.0, None)  # None: whatever could come, so nothing is dropped

Row = dict[str, Any]


@dataclass(frozen=True)
class Gating:
    """One way to run the layer, and what it costs by calculation."""

    kind: str  # of STATIC, "dynamic" or "dense"
    capacity_factor: float | None
    capacity: int | None
    gflop: float  # of the experts and the masks
    peak_bytes: int  # of activations, small index tensors aside
    run: Callable[[], Tensor]

    @property
    def is_static(self) -> bool:
        return self.kind in STATIC

    @property
    def name(self) -> str:
        if not self.is_static:
            return self.kind
        return f"{self.kind}, {'no drops' if self.capacity_factor is None else self.capacity_factor}"


def gatings(shape: Shape, experts: Experts, hidden: Tensor, routing: Routing) -> list[Gating]:
    pairs, num_experts = routing.topk_ids.numel(), experts.num_experts
    inner = (4 if shape.gated else 2) * shape.intermediate  # live at once: before and after the activation
    row_bytes = (shape.hidden + inner) * hidden.itemsize
    row_gflop = 2e-9 * shape.expert_parameters
    unpadded = pairs * row_gflop, pairs * row_bytes
    found = [
        Gating("dynamic", None, None, *unpadded, partial(dynamic, experts, hidden, routing)),
        Gating("dense", None, None, *unpadded, partial(dense, experts, hidden, shape.top_k)),
    ]
    for factor in CAPACITY_FACTORS:
        capacity = capacity_of(len(hidden), shape.top_k, num_experts, factor)
        rows = num_experts * capacity
        mask_bytes, mask_gflop = (
            len(hidden) * rows * hidden.itemsize,
            4e-9 * len(hidden) * rows * shape.hidden,
        )
        with_masks = mask_bytes + max(rows * row_bytes, mask_bytes + rows * shape.hidden * hidden.itemsize)
        for kind, function in STATIC.items():
            masked = kind == "masks"
            gflop = rows * row_gflop + (mask_gflop if masked else 0.0)
            run = partial(function, experts, hidden, routing, capacity)
            found.append(
                Gating(kind, factor, capacity, gflop, with_masks if masked else rows * row_bytes, run)
            )
    return found


def describe(gating: Gating, routing: Routing, num_experts: int) -> Row:
    """The columns that need no clock."""
    dropped = dropped_share(routing, num_experts, gating.capacity) if gating.capacity is not None else 0.0
    return {
        "gating": gating.name,
        "capacity": gating.capacity,
        "dropped_percent": round(100 * dropped, 2),
        "gflop": round(gating.gflop, 3),
    }


def reason_to_skip(gating: Gating, limit_gflop: float, limit_bytes: int) -> str | None:
    if gating.peak_bytes > limit_bytes:
        return f"needs {gating.peak_bytes / 1e9:.1f} GB of activations, {limit_bytes / 1e9:.1f} GB are free"
    if gating.gflop > limit_gflop:
        return f"{gating.gflop:.0f} GFLOP, more than --limit-gflop"
    return None


def touched_bytes(experts: Experts, routing: Routing) -> int:
    """Weights of the experts that got a token."""
    per_expert: int = sum(parameter.nbytes for parameter in experts.parameters()) // experts.num_experts
    return per_expert * len(torch.unique(routing.topk_ids))
