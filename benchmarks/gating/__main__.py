"""What does dynamic gating bring over static capacity, in tokens per second, activation memory and dropped tokens?

One MoE layer with random weights and drawn routing, after Huang et al. (arXiv 2303.06182, section V), on the experts
modules that the executor runs. All gatings get the same hidden states, expert ids and weights:

- *masks*: static capacity as in GShard and Switch: dispatch and combine masks [tokens, experts, capacity] and products
  with them. With capacity factor 1.0, 1.25 and 2.0 an expert takes factor * tokens * top_k / experts of what it is sent
  and the rest is dropped; *no drops* has the capacity that loses nothing whatever comes: all tokens, for every expert.
- *indices*: the same queues, filled and emptied by indexing; no mask, but every queue is computed in full.
- *dynamic*: sort by expert, grouped GEMM (the library's registry, `grouped_mm`). No capacity, nothing dropped.
- *dense*: the same number of (token, choice) pairs through one expert; what the products alone must take.

Outputs are equal where nothing is dropped; tests hold them to that. The floor is the larger of *dense* and reading once
the weights of the experts that got tokens, at the measured rate of copies (bytes read plus written). Peaks are of the
layer's activations, its output included, inputs and weights not. Gatings take turns run by run. On a CPU one thread
computes, and time is its processor time, which other processes lengthen less than wall time. Routing: *uniform*, or
*skewed* by Zipf popularity 1 / rank. Not measured: the router, attention, several devices and their all-to-all (where the
paper has its larger gains), training.

    python -m benchmarks.gating [--device cuda] [--out gating.json] [--plot gating.png]
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.conditions import conditions
from benchmarks.gating.activation_memory import peak_bytes
from benchmarks.gating.cases import Gating, Row, describe, gatings, reason_to_skip, touched_bytes
from benchmarks.gating.layers import SHAPES, Experts, Shape, draw_routing, make_experts
from benchmarks.gating.plot import plot
from benchmarks.gpu.baselines import measured_bandwidths, synchronize

SEED = 0
REFERENCE_EXPERTS = 32
ZIPF = {"uniform": 0.0, "skewed": 1.0}
# What is measured unless told otherwise: for a CPU in a few minutes, and for a GPU.
SIZES = {
    "cpu": {"experts": [8, 32], "tokens": [256, 1024], "reference_tokens": [256, 1024, 4096]},
    "cuda": {"experts": [8, 32, 64, 128, 256], "tokens": [256, 1024, 4096, 16384]},
}
LIMIT_GFLOP = {"cpu": 120.0, "cuda": 1e5}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default=None, help="default: cuda if there is one"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default=None, help="default: bfloat16 on cuda"
    )
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--experts", type=int, nargs="+", help="of the shape of Switch-base")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--limit-gflop", type=float, help="leave out what takes more a run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG")
    parsed = parser.parse_args(arguments)
    parsed.device = parsed.device or ("cuda" if torch.cuda.is_available() else "cpu")
    parsed.dtype = parsed.dtype or ("bfloat16" if parsed.device == "cuda" else "float32")
    parsed.limit_gflop = parsed.limit_gflop or LIMIT_GFLOP[parsed.device]
    return parsed


def cases(arguments: argparse.Namespace) -> Iterator[tuple[Shape, int, list[int]]]:
    """Shape, number of experts, and the numbers of tokens."""
    sizes = SIZES[arguments.device]
    for name in arguments.shape:
        counts = [REFERENCE_EXPERTS] if name == "reference" else arguments.experts or sizes["experts"]
        tokens = arguments.tokens or sizes.get(f"{name}_tokens", sizes["tokens"])
        for num_experts in counts:
            yield SHAPES[name], num_experts, tokens


def free_bytes(device: torch.device) -> int:
    """Half of what is free: the estimates leave out small tensors, and others use a CPU's memory, too."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0] // 2
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@torch.inference_mode()
def measure(
    shape: Shape, experts: Experts, num_tokens: int, routing_name: str, arguments: argparse.Namespace
) -> list[Row]:
    """A row for each gating: figures, or why it was left out."""
    device = torch.device(arguments.device)
    generator = torch.Generator(device).manual_seed(SEED)
    dtype = getattr(torch, arguments.dtype)
    hidden = torch.randn(num_tokens, shape.hidden, generator=generator, device=device, dtype=dtype)
    routing = draw_routing(shape, experts.num_experts, num_tokens, ZIPF[routing_name], hidden, SEED)
    every = gatings(shape, experts, hidden, routing)
    limit_bytes = free_bytes(device)
    skipped = {each.name: reason_to_skip(each, arguments.limit_gflop, limit_bytes) for each in every}
    measured = [each for each in every if skipped[each.name] is None]
    peaks = {each.name: peak_bytes(each.run, device) for each in measured}  # warms up as well
    times = time_in_turns(measured, arguments.runs, device)
    case = {
        "shape": shape.name,
        "experts": experts.num_experts,
        "tokens": num_tokens,
        "routing": routing_name,
    }
    rows = [
        {
            **case,
            **describe(each, routing, experts.num_experts),
            **(
                _figures(times[each.name], peaks[each.name], num_tokens)
                if each.name in times
                else {"skipped": skipped[each.name]}
            ),
        }
        for each in every
    ]
    return add_floor(rows, touched_bytes(experts, routing), arguments.copy_gb_per_s)


def time_in_turns(measured: list[Gating], runs: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each run, by gating; one more run before, to warm up."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: dict[str, list[float]] = {each.name: [] for each in measured}
    for number in range(runs + 1):
        for each in measured:
            synchronize(device)
            began = clock()
            each.run()
            synchronize(device)
            if number > 0:
                times[each.name].append(1e3 * (clock() - began))
    return times


def _figures(times_ms: list[float], peak: int, num_tokens: int) -> Row:
    median_ms = statistics.median(times_ms)
    return {
        "ms": round(median_ms, 3),
        "ms_min_max": [round(min(times_ms), 3), round(max(times_ms), 3)],
        "tokens_per_s": round(1e3 * num_tokens / median_ms),
        "peak_mb": round(peak / 1e6, 2),
    }


def add_floor(rows: list[Row], weight_bytes: int, gb_per_s: float) -> list[Row]:
    """The rows of one case with the time in ms that no gating can beat, beside those that were measured."""
    dense_ms = next((row["ms"] for row in rows if row["gating"] == "dense" and "ms" in row), 0.0)
    floor_ms = round(max(dense_ms, weight_bytes / gb_per_s / 1e6), 3)
    return [row if "skipped" in row else {**row, "floor_ms": floor_ms} for row in rows]


def print_row(row: Row) -> None:
    case = f"{row['shape']:<9} {row['experts']:>3} experts {row['tokens']:>5} tokens {row['routing']:<7}"
    if "skipped" in row:
        print(f"{case} {row['gating']:<18} left out: {row['skipped']}")
        return
    low, high = row["ms_min_max"]
    print(
        f"{case} {row['gating']:<18} {row['ms']:>9.2f} ms ({low:.2f} to {high:.2f}; floor {row['floor_ms']:.2f}) "
        f"{row['tokens_per_s']:>8} tokens/s {row['peak_mb']:>9.2f} MB {row['dropped_percent']:>6.2f} % dropped"
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    device = torch.device(arguments.device)
    rows: list[Row] = []
    for shape, num_experts, token_counts in cases(arguments):
        experts = make_experts(shape, num_experts, device, getattr(torch, arguments.dtype), SEED)
        for num_tokens in token_counts:
            for routing_name in ZIPF:
                found = measure(shape, experts, num_tokens, routing_name, arguments)
                for row in found:
                    print_row(row)
                rows += found
    return rows


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    arguments.copy_gb_per_s = measured_bandwidths(torch.device(arguments.device))["device_copy"]
    rows = run(arguments)
    settings = {**vars(arguments), "seed": SEED}
    record = {"benchmark": "gating", "results": rows, "conditions": conditions(**settings)}
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(rows, arguments.plot)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
