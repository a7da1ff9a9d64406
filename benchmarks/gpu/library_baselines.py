"""The library's decode step, measured in the process of the paged one once that has freed its memory."""

import argparse
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PretrainedConfig

from benchmarks.gpu.baselines import (
    IMPLEMENTATIONS,
    measure_offloaded,
    measure_resident,
    weight_read_limit_ms,
)
from benchmarks.gpu.shapes import random_model, random_model_with_cpu_experts

Row = dict[str, Any]

BASELINES = ("library", "offload")
RUNS = 5
OFFLOAD_LIMIT_S = 20.0
# To draw the full model once more and measure it: nothing begins with less time left.
MODEL_S = {"library": 30.0, "offload": 90.0}
BATCH_S = 5.0


def baselines_s(arguments: argparse.Namespace) -> float:
    """What should be left for all of them."""
    per_batch = BATCH_S * len(IMPLEMENTATIONS) if "library" in arguments.baseline else 0.0
    return sum(MODEL_S[name] for name in arguments.baseline) + per_batch * len(arguments.batch)


def measure_baselines(
    arguments: argparse.Namespace,
    config: PretrainedConfig,
    device: torch.device,
    memory_gb_per_s: float,
    left_s: Callable[[], float],
) -> Iterator[Row]:
    """Rows as of `benchmarks.gpu.baselines`, of random weights; what was skipped has one that says why."""
    for name in arguments.baseline:
        if left_s() < MODEL_S[name]:
            yield {"what": "skipped", "baseline": name, "reason": "no time was left"}
            continue
        try:
            rows = (
                _resident(arguments, config, device, left_s)
                if name == "library"
                else _offloaded(arguments, config, device)
            )
            for row in rows:
                limit = weight_read_limit_ms(config, row["batch"], row["distinct_experts"], memory_gb_per_s)
                yield {**row, "weight_read_ms": round(limit, 3)}
        except (torch.OutOfMemoryError, ImportError) as error:
            yield {"what": "skipped", "baseline": name, "reason": str(error).splitlines()[0]}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _resident(
    arguments: argparse.Namespace, config: PretrainedConfig, device: torch.device, left_s: Callable[[], float]
) -> Iterator[Row]:
    model = random_model(config, device, arguments.seed)
    for batch in arguments.batch:
        for implementation in IMPLEMENTATIONS:
            if left_s() > BATCH_S:
                yield measure_resident(model, implementation, batch, arguments.prompt_tokens, RUNS, device)


def _offloaded(
    arguments: argparse.Namespace, config: PretrainedConfig, device: torch.device
) -> Iterator[Row]:
    model = random_model_with_cpu_experts(config, device, arguments.seed)
    yield measure_offloaded(model, arguments.prompt_tokens, RUNS, device, OFFLOAD_LIMIT_S)
