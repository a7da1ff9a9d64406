"""One MoE layer with three gatings over the same experts: static capacity by dispatch masks, static capacity by indices,
and dynamic. Routing is given; no router, no attention, no communication.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from common.own_experts.switch_transformers import SwitchExperts

Experts: TypeAlias = (
    Any  # a module with what the library's `use_experts_implementation` adds, which has no types
)


@dataclass(frozen=True)
class Shape:
    """Of the experts of one layer."""

    name: str
    hidden: int
    intermediate: int
    top_k: int
    gated: bool

    @property
    def expert_parameters(self) -> int:
        return (3 if self.gated else 2) * self.hidden * self.intermediate


SHAPES = {
    "switch": Shape("switch", hidden=768, intermediate=3072, top_k=1, gated=False),  # Switch-base
    "reference": Shape("reference", hidden=192, intermediate=96, top_k=4, gated=True),
}


@dataclass(frozen=True)
class Routing:
    """What the router of one layer decided."""

    topk_ids: Tensor  # [tokens, top_k] int64, distinct in each row
    topk_weights: Tensor  # [tokens, top_k], in the dtype of the hidden states

    @property
    def num_tokens(self) -> int:
        return len(self.topk_ids)


def make_experts(
    shape: Shape, num_experts: int, device: torch.device, dtype: torch.dtype, seed: int
) -> Experts:
    """The experts module that the executor runs for such a model, with random weights."""
    config, module = _config(shape, num_experts)
    with torch.device("meta"):
        experts = module(config)
    experts = experts.to(dtype).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in experts.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return experts


def _config(shape: Shape, num_experts: int) -> tuple[Any, Any]:
    if shape.gated:
        names = {
            "hidden_size": shape.hidden,
            "moe_intermediate_size": shape.intermediate,
            "hidden_act": "silu",
        }
        return AutoConfig.for_model("qwen3_moe", num_experts=num_experts, **names), Qwen3MoeExperts
    names = {"d_model": shape.hidden, "d_ff": shape.intermediate, "dense_act_fn": "relu"}
    return AutoConfig.for_model("switch_transformers", num_experts=num_experts, **names), SwitchExperts


def draw_routing(
    shape: Shape, num_experts: int, num_tokens: int, zipf: float, hidden: Tensor, seed: int
) -> Routing:
    """Experts drawn without replacement, with popularity 1 / rank^`zipf` in a drawn order; 0 is uniform."""
    random = torch.Generator().manual_seed(seed)
    ranks = torch.randperm(num_experts, generator=random) + 1
    uniform = torch.rand(num_tokens, num_experts, generator=random).clamp_min(1e-20)
    keys = -zipf * ranks.log() - (-uniform.log()).log()  # the largest k draw without replacement (Gumbel)
    weights = torch.rand(num_tokens, shape.top_k, generator=random) + 0.1
    weights = weights / weights.sum(-1, keepdim=True) if shape.top_k > 1 else weights
    return Routing(keys.topk(shape.top_k).indices.to(hidden.device), weights.to(hidden))


def capacity_of(num_tokens: int, top_k: int, num_experts: int, factor: float | None) -> int:
    """Tokens that an expert takes (Switch Transformers, arXiv 2101.03961, section 2.2); None: all that could come."""
    if factor is None:
        return num_tokens
    return min(num_tokens, max(1, round(factor * num_tokens * top_k / num_experts)))


def positions(topk_ids: Tensor, num_experts: int) -> Tensor:
    """[tokens, top_k] int32: the place of each choice in its expert's queue, all first choices before all second ones
    (GShard, arXiv 2006.16668, algorithm 1).
    """
    num_tokens, top_k = topk_ids.shape
    ids = topk_ids.t().reshape(-1, 1)  # [top_k * tokens, 1]
    chosen = torch.zeros(len(ids), num_experts, dtype=torch.int32, device=ids.device).scatter_(1, ids, 1)
    return (chosen.cumsum(0, dtype=torch.int32).gather(1, ids) - 1).view(top_k, num_tokens).t()


def dropped_share(routing: Routing, num_experts: int, capacity: int) -> float:
    """Of the (token, choice) pairs."""
    return float((positions(routing.topk_ids, num_experts) >= capacity).float().mean())


def static_by_masks(experts: Experts, hidden: Tensor, routing: Routing, capacity: int) -> Tensor:
    """GShard's and Switch's: tokens reach the experts' queues, and come back, by products with a mask
    [tokens, experts, capacity]. What is past the capacity contributes nothing.

    Args:
        hidden: [tokens, hidden].
    Returns:
        [tokens, hidden].
    """
    queues, kept_weights = _queues(routing, experts, capacity)
    combine = hidden.new_zeros(routing.num_tokens, experts.num_experts * capacity)
    combine.scatter_(1, queues, kept_weights)  # of one token, every choice has another expert
    dispatch = (combine != 0).to(hidden.dtype)
    inputs = dispatch.t() @ hidden  # [experts * capacity, hidden]
    del dispatch
    return combine @ _run_all(experts, inputs, capacity)


def static_by_indices(experts: Experts, hidden: Tensor, routing: Routing, capacity: int) -> Tensor:
    """The same queues, filled and emptied by indexing: no mask, but padding up to the capacity."""
    queues, kept_weights = _queues(routing, experts, capacity)
    inputs = hidden.new_zeros(experts.num_experts * capacity, hidden.shape[-1])
    for queue, weights in zip(queues.unbind(1), kept_weights.unbind(1), strict=True):
        inputs.index_add_(0, queue, hidden * (weights != 0).unsqueeze(1))  # zeros for what is dropped
    outputs = _run_all(experts, inputs, capacity)
    del inputs
    combined = torch.zeros_like(hidden)
    for queue, weights in zip(queues.unbind(1), kept_weights.unbind(1), strict=True):
        combined.addcmul_(outputs[queue], weights.unsqueeze(1))
    return combined


def _queues(routing: Routing, experts: Experts, capacity: int) -> tuple[Tensor, Tensor]:
    """[tokens, top_k] int64, the place of each choice in [experts * capacity], and its weight, 0 if it is dropped."""
    place = positions(routing.topk_ids, experts.num_experts)
    kept_weights = routing.topk_weights.masked_fill(place >= capacity, 0.0)
    return routing.topk_ids * capacity + place.clamp(max=capacity - 1), kept_weights


def _run_all(experts: Experts, inputs: Tensor, capacity: int) -> Tensor:
    """[experts * capacity, hidden] in and out: every expert computes a full queue."""
    inputs = inputs.view(experts.num_experts, capacity, -1)
    if experts.has_gate:
        inner = experts._apply_gate(inputs @ experts.gate_up_proj.transpose(1, 2))
    else:
        inner = experts.act_fn(inputs @ experts.up_proj.transpose(1, 2))
    outputs: Tensor = inner @ experts.down_proj.transpose(1, 2)
    return outputs.view(-1, outputs.shape[-1])


def dynamic(experts: Experts, hidden: Tensor, routing: Routing) -> Tensor:
    """The executor's: sort by expert, grouped GEMM over what each expert got; no capacity, nothing dropped."""
    output: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](
        experts, hidden, routing.topk_ids, routing.topk_weights
    )
    return output


def dense(experts: Experts, hidden: Tensor, top_k: int) -> Tensor:
    """What a layer without experts does with as many operations: all (token, choice) pairs through the first expert."""
    inputs = hidden if top_k == 1 else hidden.repeat(top_k, 1)
    if experts.has_gate:
        inner = experts._apply_gate(inputs @ experts.gate_up_proj[0].t())
    else:
        inner = experts.act_fn(inputs @ experts.up_proj[0].t())
    output: Tensor = inner @ experts.down_proj[0].t()
    return output
