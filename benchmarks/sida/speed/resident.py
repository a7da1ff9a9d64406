"""Three ways to compute the experts of a layer that are all on the device; what slots are compared with.

`loop` visits every expert, as the published baseline does: an expert without tokens costs its kernel launches and its
synchronisation too. `skip-empty` visits those that have tokens, with one synchronisation per layer. `grouped` is the
library's grouped GEMM.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from actors.executor.passes import Routing
from common.architecture import find_experts_modules

RESIDENT_SYSTEMS = ("loop", "skip-empty", "grouped")
_ATTRIBUTE = "sida_layer"


@dataclass
class RoutingTable:
    """What replaces the routers' decisions in the coming forward, or where they are written to."""

    routing: Routing | None = None  # on the model's device
    recorded: list[tuple[Tensor, Tensor]] | None = None  # per layer, ids and weights [tokens, 1]

    def decide(self, layer: int, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if self.recorded is not None:
            self.recorded.append((ids, weights))
        return (ids, weights) if self.routing is None else self.routing.of_layer(layer, like=weights)


@contextmanager
def resident_system(model: PreTrainedModel, name: str, table: RoutingTable) -> Iterator[None]:
    """Within the context the model computes its experts in this way, by this table."""
    experts = find_experts_modules(model).values()
    for layer, module in enumerate(experts):
        setattr(module, _ATTRIBUTE, (layer, table))
    model.set_experts_implementation(_registered(name))
    try:
        yield
    finally:
        for module in experts:
            delattr(module, _ATTRIBUTE)


def _registered(name: str) -> str:
    compute = {"loop": _loop, "skip-empty": _skip_empty, "grouped": ALL_EXPERTS_FUNCTIONS["grouped_mm"]}[name]

    def forward(experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        layer, table = getattr(experts, _ATTRIBUTE)
        output: Tensor = compute(experts, hidden, *table.decide(layer, ids, weights))
        return output

    registered = f"sida_{name.replace('-', '_')}"
    ALL_EXPERTS_FUNCTIONS.register(registered, forward)
    return registered


def _loop(experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    output = torch.zeros_like(hidden)
    for expert_id in range(int(experts.num_experts)):  # type: ignore[arg-type]
        rows = (ids[:, 0] == expert_id).nonzero().squeeze(1)
        output[rows] = _expert(experts, expert_id, hidden[rows]) * weights[rows]
    return output


def _skip_empty(experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    order = ids[:, 0].argsort()
    counts = ids[:, 0].bincount(minlength=int(experts.num_experts)).tolist()  # type: ignore[arg-type]
    inputs, outputs, start = hidden[order], [], 0
    for expert_id, count in enumerate(counts):
        if count:
            outputs.append(_expert(experts, expert_id, inputs[start : start + count]))
            start += count
    output = torch.empty_like(hidden)
    output[order] = torch.cat(outputs)
    return output * weights


def _expert(experts: nn.Module, expert_id: int, rows: Tensor) -> Tensor:
    inner = functional.relu(functional.linear(rows, experts.up_proj[expert_id]))  # type: ignore[index]
    return functional.linear(inner, experts.down_proj[expert_id])  # type: ignore[index]
