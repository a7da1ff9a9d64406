"""Times one system on one set of sentences, warm-up apart, and says what it moved and held."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.baselines import synchronize
from benchmarks.sida.speed.engine_runs import EngineRuns, Predict, Timed
from benchmarks.sida.speed.host_model import HostModel
from benchmarks.sida.speed.resident import RoutingTable, resident_system
from benchmarks.sida.speed.sentences import Sentence


@dataclass(frozen=True)
class Rates:
    """GB/s that bound a sentence."""

    link: float  # host to device
    device_read: float


Row = dict[str, Any]


Runs = Sequence[Sequence[Sentence]]  # the first one warms up; each has sentences of its own


@torch.inference_mode()
def measure_resident(host: HostModel, runs: Runs, system: str) -> tuple[Row, list[Tensor]]:
    """Call it within `host.all_resident()`. Returns: figures, and the logits of each sentence that was timed."""
    table = RoutingTable()

    def run(sentences: Sequence[Sentence]) -> Timed:
        inputs = [
            (torch.tensor([sentence.token_ids], device=host.device), sentence.routing(host.device))
            for sentence in sentences
        ]
        latencies, logits = [], []
        started = time.perf_counter()
        for token_ids, table.routing in inputs:
            began = time.perf_counter()
            logits.append(tuple(host.model(input_ids=token_ids).logits[0].tolist()))
            latencies.append(time.perf_counter() - began)
        return Timed(time.perf_counter() - started, latencies, [], logits)

    with resident_system(host.model, system, table):
        return _measure(host, run, runs, dict)


def measure_engine(
    host: HostModel, engine: EngineRuns, runs: Runs, predict: Predict
) -> tuple[Row, list[Tensor]]:
    """As `measure_resident`."""
    return _measure(
        host, lambda sentences: engine.run(sentences, predict), runs, lambda: _counters(host, engine)
    )


def _measure(
    host: HostModel,
    run: Callable[[Sequence[Sentence]], Timed],
    runs: Runs,
    counters: Callable[[], dict[str, int]],
) -> tuple[Row, list[Tensor]]:
    run(runs[0])  # compiles, allocates, fills slots
    if host.device.type == "cuda":
        synchronize(host.device)
        torch.cuda.reset_peak_memory_stats(host.device)
    before = counters()
    timed = [run(sentences) for sentences in runs[1:]]
    counted = {name: count - before[name] for name, count in counters().items()}
    rates = sorted(len(each.latencies_s) / each.seconds for each in timed)
    latencies_ms = [1e3 * latency for each in timed for latency in each.latencies_s]
    predictions_ms = [1e3 * prediction for each in timed for prediction in each.predictions_s]
    row: Row = {
        "sentences_per_s": round(statistics.median(rates), 3),
        "min_max": [round(rates[0], 3), round(rates[-1], 3)],
        "latency_ms_p50": round(float(np.quantile(latencies_ms, 0.5)), 3),
        "latency_ms_p90": round(float(np.quantile(latencies_ms, 0.9)), 3),
    }
    if predictions_ms:
        row["predict_ms_p50"] = round(float(np.quantile(predictions_ms, 0.5)), 3)
    if host.device.type == "cuda":
        row["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated(host.device) / 1e9, 3)
    if counted:
        needed = counted["hits"] + counted["misses"]
        row["hit_rate"] = round(counted["hits"] / needed, 4)
        row["moved_gb_per_sentence"] = round(counted["moved_bytes"] / len(latencies_ms) / 1e9, 5)
    return row, [torch.tensor(logits) for each in timed for logits in each.logits]


def _counters(host: HostModel, engine: EngineRuns) -> dict[str, int]:
    layers = [engine.pager.counters(layer) for layer in range(host.num_layers)]
    return {name: sum(getattr(each, name) for each in layers) for name in ("hits", "misses", "moved_bytes")}


def limits_ms(host: HostModel, sentences: Sequence[Sentence], row: Row, rates: Rates) -> dict[str, float]:
    """What a sentence takes at least: to read the weights that it needs, and to bring what was moved for it."""
    distinct = float(np.mean([sentence.distinct_experts().sum() for sentence in sentences]))
    read_bytes = host.dense_bytes + distinct * host.layout.slab_bytes
    return {
        "read_limit_ms": round(read_bytes / rates.device_read / 1e6, 4),
        "link_limit_ms": round(row.get("moved_gb_per_sentence", 0.0) / rates.link * 1e3, 4),
    }
