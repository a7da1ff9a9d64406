"""How many needed experts are missing from the slots, for every eviction policy and predictor, at 1 to all slots?

Replays a trace (`actors.predictor.trace`) through the engine's pager and policies. Every window of the trace is a request
of its own; they run one after the other, token by token from their first, batch 1. What the figures mean:

- *miss*: an expert that a token needs in a layer and that is in no slot when the layer begins, whoever evicted it. The
  miss rate is misses over needed experts, per token and layer.
- *prefetch*: a copy ahead of need. While one layer is computed, at most `--copies-ahead` are made, of what the predictor
  names for the rest of the pass (before its first layer, for all of it), by its shares and the layer's nearness. A copy is
  complete when the next layer begins; time is not simulated, so prefetches are never late.
- *in vain*: a prefetched expert that was evicted before it was needed, as a share of prefetches.
- *moved*: copies per token, on demand and ahead: what the link pays.
- The first half of the requests warms the slots up; it is all that `frequency` has seen, and the first that
  `activation-trace` learns from. Only the second half is counted, during which `activation-trace` learns on.
- *belady* knows the future and fetches on demand. Over all requests, from top-k slots on, no policy misses less on
  demand, and with no predictor less is moved. Prefetching can miss less.

An encoder's trace is run sentence by sentence: all tokens of one are a pass, and an expert that several of them need is
needed once. There Belady's order is a floor only where each pass' experts fit.

With `--model`, two more predictors guess: the next layer's router, asked a layer early (`next-gate`), and the model's hash
function, which names the experts of all layers from the tokens alone (`hash-function`). Then the engine on the CPU
generates from the first tokens of some requests, or reads them with its encoder, with a quarter of the slots: on demand,
and with the five best combinations of policy and a predictor that it has. Its hit rates stand beside those of a simulation
of the same tokens. Not measured: time, batches of several requests, prompts that a decoder reads at once (but by the
engine).

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

import torch

from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.lookahead import COPIES_AHEAD
from actors.predictor.traces import TraceFiles
from benchmarks.cache_policies.cells import BELADY, NEED_A_MODEL, PREDICTORS, Cell, Workload
from benchmarks.cache_policies.engine_check import (
    ON_DEMAND,
    REQUESTS,
    SLOTS_SHARE,
    best_combinations,
    compare_with_engine,
)
from benchmarks.cache_policies.plot import plot
from benchmarks.conditions import conditions
from common.errors import ConfigError, ServingError

Row = dict[str, Any]
CELLS_AT_ONCE = 4  # that a process is sent with one copy of the workload


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
    parser.add_argument("--predictor", nargs="+", choices=list(PREDICTORS), help="default: all that can be")
    parser.add_argument(
        "--copies-ahead", type=int, default=COPIES_AHEAD, help="per layer; default: as the engine"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--model", type=Path, help="the traced one: has it guess, and runs the engine, too")
    parser.add_argument("--hash-function", default="auto", help="folder; auto: the model's own, if any")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the model guesses")
    parser.add_argument("--no-engine", action="store_true", help="only simulate")
    parser.add_argument("--engine-requests", type=int, default=REQUESTS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG")
    parsed = parser.parse_args(arguments)
    needy = [name for name in parsed.predictor or () if name in NEED_A_MODEL]
    if needy and not parsed.model:
        parser.error(f"--predictor {needy[0]}: give the traced model, too, which has to guess")
    if parsed.requests < 2:
        parser.error("--requests: one half warms up, so give 2 or more")
    return parsed


def load_workload(arguments: argparse.Namespace) -> Workload:
    workload = Workload.load(TraceFiles(arguments.trace), arguments.requests)
    if arguments.model and (not arguments.predictor or set(arguments.predictor) & set(NEED_A_MODEL)):
        device = torch.device(arguments.device)
        workload = workload.with_guesses(arguments.model, arguments.hash_function, device)
    for name in arguments.predictor or ():
        if name not in workload.predictors:
            raise ConfigError("predictor", name, f"for this model one of {', '.join(workload.predictors)}")
    return workload


def list_cells(arguments: argparse.Namespace, workload: Workload) -> list[Cell]:
    num_experts = workload.num_experts
    steps = range(2, num_experts, max(1, num_experts // 16))
    every = sorted({1, *steps, num_experts // SLOTS_SHARE, num_experts // 2, num_experts})
    slots = arguments.slots or every
    named = [
        Cell(policy, predictor, count, arguments.copies_ahead if predictor != "none" else 0)
        for predictor in arguments.predictor or workload.predictors
        for policy in arguments.policy
        for count in slots
    ]
    return [*named, *(Cell(BELADY, "none", count, 0) for count in slots)]


def run_cells(workload: Workload, cells: list[Cell], processes: int) -> list[Row]:
    if processes == 1:
        return [workload.run(cell) for cell in cells]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return list(pool.map(workload.run, cells, chunksize=CELLS_AT_ONCE))


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
        workload = load_workload(arguments)
        rows = run_cells(workload, list_cells(arguments, workload), arguments.processes)
        engine = []
        if arguments.model and not arguments.no_engine:
            best = dict.fromkeys([*ON_DEMAND, *best_combinations(workload, rows)])
            engine = compare_with_engine(workload, arguments.model, best, arguments.engine_requests)
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
