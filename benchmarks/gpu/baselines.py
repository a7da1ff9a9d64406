"""How long does one decode step of the library take, with every expert on the GPU and with experts that accelerate offloads?

Random weights in the shape of Qwen3-30B-A3B: fair for time and memory, and routing is near uniform. Beside each time
stands what reading the weights that the step needs must take at this GPU's measured rate. Not measured: prefill,
sampling, tokenizing. The offloaded model holds its experts in host memory: 58 GB at full size.

    python -m benchmarks.gpu.baselines [--layers 48] [--batch 1 4 16 32] [--offload] [--out results.json]
"""

import argparse
import gc
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from actors.predictor.library_routing import recorded_router_logits
from benchmarks.conditions import conditions
from benchmarks.gpu.shapes import (
    TINY,
    meta_causal_model,
    qwen3_30b,
    random_model,
    random_model_with_cpu_experts,
)
from common.architecture import find_experts_modules

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
MIN_OFFLOADED_RUNS = 3
COPY_BYTES = 1 << 30

Row = dict[str, Any]


def time_ms(
    call: Callable[[], object], runs: int, device: torch.device, limit_s: float = 60.0
) -> list[float]:
    """Wall time of each run, device included, ascending.

    Args:
        limit_s: stop after the run that passes it, but not before MIN_OFFLOADED_RUNS.
    """
    times: list[float] = []
    while len(times) < runs and (sum(times) < 1e3 * limit_s or len(times) < MIN_OFFLOADED_RUNS):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return sorted(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(times_ms: list[float]) -> Row:
    return {
        "step_ms": round(statistics.median(times_ms), 3),
        "step_ms_min_max": [round(times_ms[0], 3), round(times_ms[-1], 3)],
        "runs": len(times_ms),
    }


class DecodeStep:
    """One new token for each of `batch` rows over a cache of `context` random positions; each call adds one."""

    def __init__(self, model: PreTrainedModel, batch: int, context: int, device: torch.device) -> None:
        self._model, config = model, model.config
        generator = torch.Generator(device).manual_seed(0)
        self.token_ids = torch.randint(config.vocab_size, (batch, 1), generator=generator, device=device)
        self._cache = DynamicCache(config=config)
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        for layer in range(config.num_hidden_layers):
            keys, values = (
                torch.randn(shape, generator=generator, device=device, dtype=model.dtype) for _ in range(2)
            )
            self._cache.update(keys, values, layer)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """[batch, vocabulary] logits."""
        output = self._model(input_ids=self.token_ids, past_key_values=self._cache, use_cache=True)
        logits: Tensor = output.logits[:, -1]
        return logits

    def distinct_experts(self) -> float:
        """Experts per layer that the step needs, averaged over the layers."""
        with recorded_router_logits(self._model) as recorded:
            self()
        top_k = self._model.config.num_experts_per_tok
        return statistics.fmean(logits.topk(top_k, -1).indices.unique().numel() for logits in recorded)


def measure_resident(
    model: PreTrainedModel, implementation: str, batch: int, context: int, runs: int, device: torch.device
) -> Row:
    """The library with every expert on the device."""
    model.set_experts_implementation(implementation)
    step = DecodeStep(model, batch, context, device)
    return {
        "what": "library, all resident",
        "implementation": implementation,
        "batch": batch,
        "distinct_experts": round(step.distinct_experts(), 1),  # warms up too
        **_measure(step, runs, device),
    }


def measure_offloaded(
    model: PreTrainedModel, context: int, runs: int, device: torch.device, limit_s: float
) -> Row:
    """The library with experts that accelerate copies to the device for each call, batch 1.

    Args:
        model: experts on the CPU, everything else on the device; left with accelerate's hooks.
    """
    experts = find_experts_modules(model).values()
    moved_bytes = sum(parameter.nbytes for module in experts for parameter in module.parameters())
    offload_experts(model, device)
    model.set_experts_implementation("grouped_mm")
    step = DecodeStep(model, 1, context, device)
    row = {
        "what": "library, experts offloaded by accelerate",
        "implementation": "grouped_mm",
        "batch": 1,
        "distinct_experts": round(step.distinct_experts(), 1),
        "moved_gb": round(moved_bytes / 1e9, 2),  # per step: all experts, wanted or not
        **_measure(step, runs, device, limit_s),
    }
    check_offloaded(model)
    return row


def offload_experts(model: PreTrainedModel, device: torch.device) -> None:
    """What `device_map` does with modules that it maps to the CPU."""
    accelerate = importlib.import_module("accelerate")  # no dependency of the project: nothing else needs it
    for module in find_experts_modules(model).values():
        accelerate.cpu_offload(module, execution_device=device)
    check_offloaded(model)


def check_offloaded(model: PreTrainedModel) -> None:
    """
    Raises:
        RuntimeError: an expert tensor lies on a device between calls.
    """
    for name, module in find_experts_modules(model).items():
        for tensor_name, tensor in module.named_parameters():
            if tensor.device.type != "meta":
                raise RuntimeError(f"{name}.{tensor_name} is on {tensor.device}; accelerate left it there")


def _measure(step: DecodeStep, runs: int, device: torch.device, limit_s: float = 60.0) -> Row:
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    row = summary(time_ms(step, runs, device, limit_s))
    if device.type == "cuda":
        row["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    return row


def weight_read_limit_ms(
    config: PretrainedConfig, batch: int, distinct_experts_per_layer: float, bandwidth: float
) -> float:
    """What a decode step takes if it reads each weight it needs once, and nothing else.

    Args:
        bandwidth: GB/s of reads.
    """
    model = meta_causal_model(config)
    experts = list(find_experts_modules(model).values())
    expert_bytes = sum(each.nbytes for each in experts[0].parameters()) / config.num_experts
    all_bytes = sum(each.nbytes for each in model.parameters())
    embedding = model.get_input_embeddings().weight
    dense_bytes = all_bytes - expert_bytes * config.num_experts * len(experts) - embedding.nbytes
    needed = (
        dense_bytes + batch * embedding[0].nbytes + distinct_experts_per_layer * expert_bytes * len(experts)
    )
    return float(needed / bandwidth / 1e6)


def measured_bandwidths(device: torch.device) -> dict[str, float]:
    """GB/s of plain copies: on the device (bytes read plus bytes written), and from the host to the device."""
    num_bytes = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 16
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    pageable = torch.zeros(num_bytes, dtype=torch.uint8)
    rates = {
        "device_copy": 2 * _gb_per_s(lambda: target.copy_(source), num_bytes, device),
        "host_pageable_to_device": _gb_per_s(lambda: target.copy_(pageable), num_bytes, device),
    }
    if device.type == "cuda":
        pinned = pageable.pin_memory()
        copy = lambda: target.copy_(pinned, non_blocking=True)  # noqa: E731
        rates["host_pinned_to_device"] = _gb_per_s(copy, num_bytes, device)
    return {name: round(rate, 1) for name, rate in rates.items()}


def _gb_per_s(copy: Callable[[], object], num_bytes: int, device: torch.device) -> float:
    time_ms(copy, 2, device)
    return num_bytes / statistics.median(time_ms(copy, 9, device)) / 1e6


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = qwen3_30b(arguments.layers, dtype, **(TINY if arguments.tiny else {}))
    bandwidths = measured_bandwidths(device)
    print("GB/s", bandwidths, flush=True)
    rows = []
    for row in measure_all(config, arguments, device):
        limit = weight_read_limit_ms(config, row["batch"], row["distinct_experts"], bandwidths["device_copy"])
        rows.append({**row, "weight_read_limit_ms": round(limit, 3)})
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    record = {
        "benchmark": "gpu_baselines",
        "conditions": conditions(**vars(arguments)),
        "gb_per_s": bandwidths,
        "results": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--implementations", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    parser.add_argument("--resident", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--offload", action=argparse.BooleanOptionalAction, default=True, help="needs accelerate"
    )
    parser.add_argument("--offload-limit-s", type=float, default=60.0, help="for the timed offloaded steps")
    parser.add_argument("--context", type=int, default=128, help="positions in the cache")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy of the same architecture")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def measure_all(
    config: PretrainedConfig, arguments: argparse.Namespace, device: torch.device
) -> Iterator[Row]:
    context, runs = arguments.context, arguments.runs
    if arguments.resident:
        model = random_model(config, device, seed=0)
        for implementation in arguments.implementations:
            for batch in arguments.batch:
                yield measure_resident(model, implementation, batch, context, runs, device)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if arguments.offload:
        model = random_model_with_cpu_experts(config, device, seed=0)
        yield measure_offloaded(model, context, runs, device, arguments.offload_limit_s)


if __name__ == "__main__":
    main()
