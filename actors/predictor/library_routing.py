"""Sees, and may replace, what the routers of an all-resident library model decide. For tracing and for evaluation;
serving has its own hook.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from common.architecture import find_experts_modules, load_config, model_class
from common.errors import UnsupportedModelError
from common.own_experts.model import OwnExpertsModel

_IMPLEMENTATION = "intercepted_routing"
_ATTRIBUTE = "intercepted_layer"

# (layer, expert ids [tokens, top_k] int64, weights [tokens, top_k]) -> the ids and weights to use
Intercept = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def load_resident_model(folder: str | Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The library's model with every expert in memory, run by its grouped GEMM.

    Raises:
        UnsupportedModelError: its experts do not go through the library's registry.
    """
    loader = model_class(load_config(folder))
    model = loader.from_pretrained(folder, dtype=dtype, experts_implementation="grouped_mm")
    if not find_experts_modules(model):
        raise UnsupportedModelError(str(folder), "no MoE layer goes through the library's experts registry")
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def intercepted_routing(model: PreTrainedModel, intercept: Intercept) -> Iterator[None]:
    """Within the context, every MoE layer passes its routing through `intercept`; layers count from 0."""
    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _run_intercepted)
    experts = find_experts_modules(model).values()
    for layer, module in enumerate(experts):
        setattr(module, _ATTRIBUTE, (layer, intercept))
    model.set_experts_implementation(_IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation("grouped_mm")
        for module in experts:
            delattr(module, _ATTRIBUTE)


@contextmanager
def recorded_router_logits(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within the context, every forward appends one [tokens, experts] tensor per MoE layer, in layer order.

    Which module makes them, and which of its outputs they are, is what the library itself declares for
    `output_router_logits`, or what our own model class says.

    Raises:
        UnsupportedModelError: it declares nothing for this family.
    """
    routers, index = find_routers(model)
    recorded: list[Tensor] = []

    def record(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        logits = output if isinstance(output, Tensor) else output[index]
        recorded.append(logits.reshape(-1, logits.shape[-1]))

    hooks = [router.register_forward_hook(record) for router in routers]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def find_routers(model: PreTrainedModel) -> tuple[list[nn.Module], int]:
    """The routers in layer order, and which of their outputs are the logits.

    Raises:
        UnsupportedModelError: the library declares nothing for this family.
    """
    target, index = _router_output(model)
    return [module for module in model.modules() if isinstance(module, target)], index


def _router_output(model: PreTrainedModel) -> tuple[type[nn.Module], int]:
    """The class of the routers, and which of their outputs are the logits."""
    if isinstance(model, OwnExpertsModel):
        return model.router_output
    recorder = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    recorder = recorder or (getattr(model.base_model, "_can_record_outputs", None) or {}).get("router_logits")
    if recorder is None:
        raise UnsupportedModelError(
            model.config.model_type,
            "the library does not expose its router logits, so there is nothing to learn from",
        )
    return getattr(recorder, "target_class", recorder), getattr(recorder, "index", 0)


def _run_intercepted(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    layer, intercept = getattr(experts, _ATTRIBUTE)
    ids, weights = intercept(layer, top_k_index, top_k_weights)
    output: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, ids, weights)
    return output
