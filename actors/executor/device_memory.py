"""How much of a GPU's memory is left for expert slots, beside dense weights, KV cache, passes and decode graphs.

A dry run of the dense model measures it, with one cache row for all and zeros from the experts, so nothing here knows a
family's attention. What experts, logits, sampling and fused kernels take beyond that is computed. Keeps no memory.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from actors.executor.drivers import cache_bytes, new_encoder_runner
from actors.executor.encoder_decoder import EncoderDecoderRunner
from actors.executor.engine import EngineLimits
from actors.executor.model_loader import SlotModel
from actors.executor.packed_encoder import SourcePass, has_encoder
from actors.executor.pager import Pager
from actors.executor.passes import Pass, PassClock
from actors.executor.runner import ModelRunner, RowInput
from common.architecture import MoeArchitecture, find_experts_modules
from common.errors import ConfigError, SlotsTooFewError
from common.expert_layout import ExpertLayout
from common.slot_budget import SlotBudget

# For what is not measured: page tables, kernels that load later, the mapping of host memory, fragmentation.
_RESERVE_BYTES = 2**30
_RESERVE_SHARE = 0.05  # of the device

_FLOAT_BYTES = 4
# Float-sized values per logit of a step: those of the smaller graphs, the sampler's candidates and their ids, the log
# probabilities and what sorts them.
_VALUES_PER_LOGIT = 6
# Float-sized values per (token, choice) that the library's grouped forward holds at once: its inputs, outputs, their
# weighted copy and its reordering; gate, up and their product.
_HIDDEN_PER_PAIR, _INTERMEDIATE_PER_PAIR = 4, 3

_NO_EXPERTS = "no_experts"


class Meter(Protocol):
    """What a device tells about its memory."""

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """How much more than before is allocated at once while `run` runs."""

    def free_and_total_bytes(self) -> tuple[int, int]:
        """What a new allocation could have, and the size of the device."""


class CudaMeter:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def peak_bytes(self, run: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        run()
        return torch.cuda.max_memory_allocated(self._device) - before

    def free_and_total_bytes(self) -> tuple[int, int]:
        torch.cuda.empty_cache()  # what the allocator keeps for reuse counts as taken
        return torch.cuda.mem_get_info(self._device)


@dataclass(frozen=True)
class DeviceMemory:
    """Who gets what of a device; `str` shows the arithmetic."""

    total_bytes: int
    free_bytes: int  # with the dense weights in place
    cache_bytes: int  # all rows of the KV cache
    passes_bytes: int  # a prompt chunk and the decode graphs at their widest

    @property
    def reserve_bytes(self) -> int:
        return _RESERVE_BYTES + int(self.total_bytes * _RESERVE_SHARE)

    @property
    def available_bytes(self) -> int:
        """For slots; below zero where the rest does not fit."""
        return self.free_bytes - self.cache_bytes - self.passes_bytes - self.reserve_bytes

    def __str__(self) -> str:
        return (
            f"{self.free_bytes / 1e9:.2f} GB free beside the dense weights - {self.cache_bytes / 1e9:.2f} GB KV cache "
            f"- {self.passes_bytes / 1e9:.2f} GB prompts and decode graphs - {self.reserve_bytes / 1e9:.2f} GB reserve "
            f"= {self.available_bytes / 1e9:.2f} GB for expert slots"
        )


def slots_that_fit(
    budget: SlotBudget, architecture: MoeArchitecture, slot_bytes: int, memory: DeviceMemory
) -> int:
    """The slots per layer of the budget "auto".

    Raises:
        ConfigError: fewer fit than one token needs.
    """
    num_layers, top_k = architecture.num_layers, architecture.top_k
    try:
        return budget.slots_per_layer(
            num_layers, architecture.num_experts, slot_bytes, top_k, memory.available_bytes
        )
    except SlotsTooFewError as error:
        needed = num_layers * top_k * slot_bytes / 1e9
        problem = (
            f"{error.slots} slots per layer fit, one token needs {top_k} ({needed:.2f} GB): {memory}; lower "
            "max_context_tokens, max_batch_size or prefill_chunk_tokens, or serve a smaller model"
        )
        raise ConfigError("expert_slots", budget.text, problem) from error


@torch.inference_mode()
def measure_memory(
    model: PreTrainedModel,
    architecture: MoeArchitecture,
    layout: ExpertLayout,
    limits: EngineLimits,
    max_tokens: int,
    on_device: bool,
    meter: Meter,
) -> DeviceMemory:
    """
    Args:
        model: without slots; afterwards it has no experts implementation until `attach_slots` gives it one.
        layout: of an expert in its slot.
        on_device: steps page and decode on the device, in graphs; otherwise the host drives them. Never with an encoder.
    Raises:
        ConfigError: the device cannot hold a single sequence.
    """
    reads_whole = has_encoder(model)
    chunk = (max if reads_whole else min)(limits.prefill_chunk_tokens, max_tokens)
    rows = limits.max_batch_size if not on_device else _widest_graph(limits.max_batch_size)
    model.set_experts_implementation(_NO_EXPERTS)
    try:
        row_bytes, dense_bytes = _run_dry(
            model, architecture.num_layers, max_tokens, chunk, rows, on_device, meter
        )
    except torch.OutOfMemoryError as error:
        problem = (
            f"one sequence of {max_tokens} tokens does not fit on the device beside the dense weights; lower "
            "max_context_tokens or prefill_chunk_tokens, or serve a smaller model"
        )
        raise ConfigError("expert_slots", "auto", problem) from error
    experts = next(iter(find_experts_modules(model).values()))
    passes_bytes = (
        dense_bytes
        + _grouped_bytes(architecture, chunk)
        + _step_experts_bytes(architecture, layout, experts, rows, on_device)
        + _VALUES_PER_LOGIT * _FLOAT_BYTES * rows * architecture.vocab_size
    )
    free_bytes, total_bytes = meter.free_and_total_bytes()
    num_cache_rows = limits.max_batch_size + (0 if reads_whole else 1)
    return DeviceMemory(total_bytes, free_bytes, num_cache_rows * row_bytes, passes_bytes)


def _run_dry(
    model: PreTrainedModel,
    num_layers: int,
    max_tokens: int,
    chunk: int,
    rows: int,
    on_device: bool,
    meter: Meter,
) -> tuple[int, int]:
    """Returns: the bytes of a cache row, and of a prompt chunk and a step together: steps interrupt prompts, and graphs
    keep their memory.
    """
    slot_model = SlotModel(model, cast(Pager, _NoPager()), PassClock(num_layers))
    run = (_EncoderDryRun if has_encoder(model) else _DryRun)(slot_model, max_tokens)
    run.prompt(1)  # allocates the row, and loads what the first pass loads
    prompt_bytes = meter.peak_bytes(lambda: run.prompt(chunk))
    step_bytes = meter.peak_bytes(lambda: run.device_step(rows) if on_device else run.step(rows))
    return run.row_bytes, prompt_bytes + step_bytes


class _DryRun:
    """Passes at the end of a full context. All sequences share one cache row; what they compute is worth nothing."""

    def __init__(self, slot_model: SlotModel, max_tokens: int) -> None:
        self._model, self._max_tokens = slot_model.model, max_tokens
        self._runner = ModelRunner(slot_model, 1, max_tokens)

    @property
    def row_bytes(self) -> int:
        return self._runner.cache.num_bytes()

    def prompt(self, num_tokens: int) -> Tensor:
        return self._runner.run([RowInput(0, self._max_tokens - num_tokens, (0,) * num_tokens)], Pass(1))

    def step(self, num_rows: int) -> Tensor:
        return self._runner.run([RowInput(0, self._max_tokens - 1, (0,))] * num_rows, Pass(num_rows))

    def device_step(self, num_rows: int) -> Tensor:
        # Here, because Triton is installed with CUDA builds of torch only.
        from actors.executor.gpu.library_step import LibraryStep

        zeros = torch.zeros(num_rows, dtype=torch.int64, device=self._model.device)
        # The library's, which every family has; fused ones hold less.
        return LibraryStep(self._model, self._runner.cache)(zeros, zeros + (self._max_tokens - 1), zeros)


class _EncoderDryRun:
    """The same of a model with an encoder, which reads as many sources as make up the tokens of a pass."""

    def __init__(self, slot_model: SlotModel, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._runner = new_encoder_runner(slot_model, 1, max_tokens)

    @property
    def row_bytes(self) -> int:
        return cache_bytes(self._runner)

    def prompt(self, num_tokens: int) -> Tensor:
        starts = range(0, num_tokens, self._max_tokens)
        lengths = [min(self._max_tokens, num_tokens - start) for start in starts]
        return self._runner.read(
            [0] * len(lengths), [(0,) * length for length in lengths], SourcePass(lengths)
        )

    def step(self, num_rows: int) -> Tensor | None:
        if not isinstance(self._runner, EncoderDecoderRunner):
            return None
        last = RowInput(0, 2 * self._max_tokens - 1, (0,))
        return self._runner.run([last] * num_rows, Pass(num_rows))

    def device_step(self, num_rows: int) -> Tensor:
        raise NotImplementedError("the host drives models with an encoder")


class _NoPager:
    """All of a pager that a pass without experts asks for."""

    def host_pass(self) -> AbstractContextManager[None]:
        return nullcontext()


def _no_experts(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    return torch.zeros_like(hidden_states)


def _widest_graph(max_batch_size: int) -> int:
    from actors.executor.gpu.graph_decoder import bucket_sizes

    return bucket_sizes(max_batch_size)[-1]


def _grouped_bytes(architecture: MoeArchitecture, num_tokens: int) -> int:
    """Activations of one layer's experts in the library's grouped forward."""
    hidden = architecture.hidden_size
    intermediate = prod(architecture.expert_shapes["down_proj"]) // hidden
    per_pair = _HIDDEN_PER_PAIR * hidden + _INTERMEDIATE_PER_PAIR * intermediate
    return num_tokens * architecture.top_k * per_pair * _FLOAT_BYTES


def _step_experts_bytes(
    architecture: MoeArchitecture, layout: ExpertLayout, experts: nn.Module, rows: int, on_device: bool
) -> int:
    if on_device:
        from actors.executor.gpu.slot_experts import kernels_fit

        if not kernels_fit(experts):  # the library's batched forward copies an expert per pair
            return rows * architecture.top_k * layout.slab_bytes
    return _grouped_bytes(architecture, rows)


ALL_EXPERTS_FUNCTIONS.register(_NO_EXPERTS, _no_experts)
