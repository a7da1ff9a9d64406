"""Loads a library model without its experts: dense tensors from the checkpoint, slots where the experts were.

The library's loader runs unchanged; only the experts modules are emptied while they are built, so their tensors in
the checkpoint have no target and are never read.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as library_logging

from actors.executor.experts_hook import EXPERTS_IMPLEMENTATION, SlotExperts
from actors.executor.families import check_supported
from actors.executor.pager import Pager
from actors.executor.passes import PassClock
from actors.executor.slots import SlotPool
from common.architecture import (
    count_encoder_layers,
    find_experts_modules,
    load_config,
    meta_model,
    model_class,
    per_expert_shapes,
)
from common.errors import CheckpointError
from common.expert_layout import ExpertLayout


@dataclass(frozen=True)
class SlotModel:
    """A library model in evaluation mode whose experts are paged through `pager`."""

    model: PreTrainedModel
    pager: Pager
    clock: PassClock


def load_dense_model(folder: str | Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model without its experts' tensors.

    Raises:
        UnsupportedModelError: the executor cannot drive this architecture.
        CheckpointError: a dense tensor is missing or does not fit.
    """
    return _load_dense(folder, dtype).to(device).eval()


def attach_slots(
    model: PreTrainedModel,
    layout: ExpertLayout,
    num_slots: int,
    new_pager: Callable[[Sequence[SlotPool], int], Pager],
) -> SlotModel:
    """Give a model without expert tensors slots in their place.

    Args:
        layout: of an expert in its slot.
        new_pager: makes the pager of one pool per MoE layer and of a number of experts per layer.
    """
    experts = find_experts_modules(model)
    pools = [SlotPool(layout, num_slots, model.device) for _ in experts]
    num_experts = next(iter(experts.values())).num_experts
    assert isinstance(num_experts, int)
    pager = new_pager(pools, num_experts)
    clock = PassClock(len(experts), count_encoder_layers(experts))
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    for layer, (module, pool) in enumerate(zip(experts.values(), pools, strict=True)):
        _give_slots(module, pool)
        SlotExperts(layer, pager, clock).attach(module)
    return SlotModel(model, pager, clock)


def _load_dense(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    config = load_config(folder)
    check_supported(config, folder)
    classes = {type(module) for module in find_experts_modules(meta_model(config, folder)).values()}
    with _without_expert_tensors(classes), _quiet_library():
        model, info = model_class(config).from_pretrained(
            folder, dtype=dtype, experts_implementation=EXPERTS_IMPLEMENTATION, output_loading_info=True
        )
    problems = {kind: sorted(info[kind]) for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if problems:
        raise CheckpointError(str(folder), f"dense tensors do not load: {problems}")
    assert isinstance(model, PreTrainedModel)
    return model


@contextmanager
def _without_expert_tensors(classes: Iterable[type[nn.Module]]) -> Iterator[None]:
    originals = {experts_class: experts_class.__init__ for experts_class in classes}
    for experts_class, original in originals.items():
        experts_class.__init__ = _init_without_tensors(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for experts_class, original in originals.items():
            experts_class.__init__ = original  # type: ignore[method-assign]


def _init_without_tensors(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            original(self, *args, **kwargs)
        for name in per_expert_shapes(self):
            delattr(self, name)
        self._is_hf_initialized = True  # type: ignore[assignment]  # or the library would fill what is not there

    return init


def _give_slots(experts: nn.Module, pool: SlotPool) -> None:
    for name, view in pool.views.items():
        setattr(experts, name, view)  # plain tensors: nothing may save, move or initialise them
    experts.num_experts = pool.num_slots  # type: ignore[assignment]


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Every expert in the checkpoint is "unexpected" to the emptied model; thousands of lines would say so."""
    verbosity = library_logging.get_verbosity()
    library_logging.set_verbosity_error()
    try:
        yield
    finally:
        library_logging.set_verbosity(verbosity)
