"""How many needed experts are missing from the slots, for every eviction policy and predictor, at 1 to all slots?

Replays a trace (`actors.predictor.trace`) through the engine's pager and policies. Every window of the trace is a request
of its own; they run one after the other, token by token from their first, batch 1. What the figures mean:

- *miss*: an expert that a token needs in a layer and that is in no slot when the layer begins, whoever evicted it. The
  miss rate is misses over needed experts, per token and layer.
- *prefetch*: a copy ahead of need. While one layer is computed, at most `--copies-ahead` are made, of what the predictor
  names for the rest of the pass (before a pass begins, for all of it), by its shares and the layer's nearness. A copy is
  complete when the next layer begins; time is not simulated, so prefetches are never late.
- *in vain*: a prefetched expert that was evicted before it was needed, as a share of prefetches.
- *moved*: copies per token, on demand and ahead: what the link pays.
- The first half of the requests warms the slots up; it is all that `frequency` has seen, and the first that
  `activation-trace` learns from. Only the second half is counted, during which `activation-trace` learns on.
- *belady* knows the future and fetches on demand. Over all requests, from top-k slots on, no policy misses less on
  demand, and with no predictor less is moved. Prefetching can miss less.

With `--model`, the engine then generates from the first tokens of some requests, and its hit rates stand beside those of a
simulation of the same tokens. Not measured: time, batches of several requests, prompts read at once (but by the engine).

    python -m actors.predictor.trace model=models/reference text=models/reference/heldout.txt out=trace \\
        window_tokens=128
    python -m benchmarks.cache_policies --trace trace [--model models/reference] [--out results.json] [--plot plot.png]
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from actors.executor.eviction import EVICTION_POLICIES
from actors.predictor.traces import TraceFiles
from benchmarks.cache_policies.cells import BELADY, PREDICTORS, Cell, Workload
from benchmarks.cache_policies.engine_check import compare_with_engine
from benchmarks.cache_policies.plot import plot
from benchmarks.conditions import conditions
from common.errors import ServingError

Row = dict[str, Any]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True, help="folder of actors.predictor.trace")
    parser.add_argument("--requests", type=int, default=32, help="windows, evenly spaced over the trace")
    parser.add_argument("--slots", type=int, nargs="+", help="per layer; default: about 16 counts, 1 to all")
    parser.add_argument(
        "--policy", nargs="+", default=list(EVICTION_POLICIES), choices=list(EVICTION_POLICIES)
    )
    parser.add_argument("--predictor", nargs="+", default=list(PREDICTORS), choices=list(PREDICTORS))
    parser.add_argument("--copies-ahead", type=int, default=1, help="per layer")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--model", type=Path, help="the traced one: run the engine, too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG")
    parsed = parser.parse_args(arguments)
    if parsed.requests < 2:
        parser.error("--requests: one half warms up, so give 2 or more")
    return parsed


def list_cells(arguments: argparse.Namespace, num_experts: int) -> list[Cell]:
    every = sorted({1, *range(2, num_experts, max(1, num_experts // 16)), num_experts})
    slots = arguments.slots or every
    named = [
        Cell(policy, predictor, count, arguments.copies_ahead if predictor != "none" else 0)
        for predictor in arguments.predictor
        for policy in arguments.policy
        for count in slots
    ]
    return [*named, *(Cell(BELADY, "none", count, 0) for count in slots)]


def run_cells(workload: Workload, cells: list[Cell], processes: int) -> list[Row]:
    if processes == 1:
        return [workload.run(cell) for cell in cells]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return list(pool.map(workload.run, cells))


def print_table(rows: list[Row]) -> None:
    slots = sorted({row["slots"] for row in rows})
    print(f"{'miss rate, %':<32}" + "".join(f"{count:>6}" for count in slots))
    for policy, predictor in dict.fromkeys((row["policy"], row["predictor"]) for row in rows):
        of_slots = {
            row["slots"]: row["miss_rate"]
            for row in rows
            if (row["policy"], row["predictor"]) == (policy, predictor)
        }
        print(
            f"{policy + ', ' + predictor:<32}" + "".join(f"{100 * of_slots[count]:>6.1f}" for count in slots)
        )


def main() -> None:
    arguments, started = parse_arguments(), time.perf_counter()
    try:
        workload = Workload.load(TraceFiles(arguments.trace), arguments.requests)
        rows = run_cells(workload, list_cells(arguments, workload.num_experts), arguments.processes)
        engine = compare_with_engine(workload, arguments.model) if arguments.model else []
    except ServingError as error:
        raise SystemExit(f"error: {error}") from error
    print_table(rows)
    for row in engine:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    record = {
        "benchmark": "cache_policies",
        "model_fingerprint": workload.model_fingerprint,
        "layers_experts_top_k": [workload.num_layers, workload.num_experts, workload.top_k],
        "requests_tokens": [len(workload.requests), sum(map(len, workload.requests))],
        "results": rows,
        "engine": engine,
        "seconds": round(time.perf_counter() - started, 1),
        "conditions": conditions(**vars(arguments)),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        name = arguments.model.name if arguments.model else workload.model_fingerprint[:12]
        plot(rows, f"{name}: {workload.num_layers} layers, top {workload.top_k}", arguments.plot)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
