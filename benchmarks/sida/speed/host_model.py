"""Switch-base's encoder with random weights: dense parts on the device, every expert in host memory that it reads."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.expert_source import ExpertSource
from actors.executor.experts_hook import _ATTRIBUTE
from actors.executor.gpu.host_experts import HostExperts
from actors.executor.host_pager import HostPager
from actors.executor.model_loader import SlotModel, attach_slots
from actors.executor.pager import Pager
from actors.executor.slots import SlotPool
from benchmarks.gpu.shapes import RandomExpertSource, meta_causal_model
from common.architecture import find_experts_modules, per_expert_shapes


class _SharedExperts(HostExperts):
    """Outlives the pagers that read through it, each of which closes it."""

    def close(self) -> None:
        pass

    def release(self) -> None:
        super().close()


class HostModel:
    """Given slots, or all experts, one after the other."""

    def __init__(self, config: PretrainedConfig, device: torch.device, seed: int) -> None:
        self.model = random_dense_model(config, device, seed)
        self._random_source = RandomExpertSource(config, seed, device)
        self.source = cast(ExpertSource, self._random_source)  # nothing is ever adopted
        self.experts = list(find_experts_modules(self.model).values())
        self.num_layers, self.num_experts = len(self.experts), int(config.num_experts)
        self.device, self.layout = device, self.source.layout
        self.host_experts = _SharedExperts(self.source, self.num_layers, self.num_experts, device)

    @property
    def dense_bytes(self) -> int:
        """Without the embeddings, of which a sentence reads a few rows."""
        embeddings: Tensor = self.model.get_input_embeddings().weight
        total: int = sum(parameter.nbytes for parameter in self.model.parameters())
        return total - embeddings.nbytes

    @contextmanager
    def all_resident(self) -> Iterator[PreTrainedModel]:
        """Within the context every expert is on the device."""
        self._release_memory()
        for layer, module in enumerate(self.experts):
            slabs = torch.empty(
                self.num_experts, self.layout.slab_bytes, dtype=torch.uint8, device=self.device
            )
            for expert_id, slab in enumerate(slabs.view(self.layout.dtype).unbind()):
                self.host_experts.copy(self.source.fetch(layer, expert_id), slab)
            for name, weights in self.layout.views(slabs).items():
                setattr(module, name, weights)
        try:
            yield self.model
        finally:
            self._detach()

    @contextmanager
    def slots(self, num_slots: int, eviction: str) -> Iterator[SlotModel]:
        """Within the context the model has that many slots per layer, empty at first but where every expert has one."""
        self._release_memory()
        slot_model = attach_slots(
            self.model, self.layout, num_slots, lambda pools, num_experts: self._pager(pools, eviction)
        )
        try:
            yield slot_model
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            del slot_model
            self._detach()

    def close(self) -> None:
        self.host_experts.release()

    def _pager(self, pools: Sequence[SlotPool], eviction: str) -> Pager:
        if self.device.type != "cuda":
            return HostPager(self.source, pools, self.num_experts, EVICTION_POLICIES[eviction], self.device)
        from actors.executor.gpu.pager import DevicePager  # needs Triton

        pager = DevicePager(self.source, pools, self.num_experts, self.host_experts, eviction)
        if pager.holds_all:
            pager.load_all()
        return pager

    def _detach(self) -> None:
        for module in self.experts:
            for name in (_ATTRIBUTE, *(tensor.name for tensor in self.layout.tensors)):
                vars(module).pop(name, None)
            module.num_experts = self.num_experts  # type: ignore[assignment]
        for module in self.model.modules():
            vars(module).pop("compute_bias", None)  # that of packed sentences

    def _release_memory(self) -> None:
        """Of the last user's slots, which hang together in cycles that its caller held until now."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def random_dense_model(config: PretrainedConfig, device: torch.device, seed: int) -> PreTrainedModel:
    """As the library initialises it, but for the experts modules, which have no tensors."""
    model = meta_causal_model(config)
    for module in find_experts_modules(model).values():
        for name in per_expert_shapes(module):
            delattr(module, name)
    model.to_empty(device=device)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        for module in model.modules():
            model._init_weights(module)
    for name, parameter in model.named_parameters():
        assert bool(parameter.isfinite().all()), f"{name} was not initialised"
    return model.eval().requires_grad_(False)
