"""How long is a decode step with a share of the experts on the GPU, and how near is that to its limits?

Decode steps as the engine runs them (CUDA graphs that page by themselves, one step launched ahead) at
several numbers of slots, batch sizes and routings; reading one prompt at each number of slots; peak memory;
and whether tokens and logits are those of the most slots measured, bit for bit. Beside each time stand the
same step with every expert in a slot (compute), the missed experts' bytes at the best rate of copies from the host (link),
the ratio to the larger of the two, and the needed weights' bytes at the GPU's own rate (weights). Every
routing but `natural` is a table drawn beforehand, the same for all numbers of slots; what the model guesses
of its next layer is no guess of a table, so prefetching has one only with --foresight. Random weights by
default: fair for time, bytes and memory; natural routing then has the locality of noise. Not measured:
HTTP, Ray, the scheduler, the hash function.

    python -m benchmarks.gpu.decode [--layers 48] [--slots 12.5% 25% 50% 100%] [--batch 1 4 16 32]
        [--routing natural zipf1.5 zipf1.0 uniform] [--time-limit-s 500]
        [--out results.json] [--plot results.png]
    python -m benchmarks.gpu.decode --model FOLDER --temperature 1   # a checkpoint of benchmarks.gpu.learned
"""

import argparse
import gc
import json
import time
from collections import defaultdict
from typing import Any

import torch

from benchmarks.conditions import conditions
from benchmarks.gpu.decode_arguments import (
    Setup,
    draw_prompts,
    list_setups,
    load_host,
    parse_arguments,
    read_merged,
)
from benchmarks.gpu.decode_cases import Outputs, Plan, measure_decode, measure_prefill
from benchmarks.gpu.decode_report import (
    Key,
    Row,
    complete,
    is_exact,
    judge,
    key_of,
    print_row,
    print_table,
)
from benchmarks.gpu.library_baselines import baselines_s, measure_baselines
from benchmarks.gpu.limits import measure_rates
from benchmarks.gpu.paged_model import Case, PagedDecoding, table_rows
from benchmarks.gpu.plot_decode import baselines_of, plot, title_of
from benchmarks.gpu.routings import NATURAL, TableShape, new_table
from common.generation import SamplingParams

TABLE_STEPS = 256
LAST_S = 6.0  # nothing begins with less time left
LATER_SETUP_S = 30.0  # what a setup takes before its first case, once most kernels are compiled


class Benchmark:
    """What all setups share, and the rows so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments, self._started = arguments, time.perf_counter()
        self.device = torch.device(arguments.device)
        self._plan = Plan(arguments.warmup, arguments.steps, arguments.runs)
        self._outputs: defaultdict[Key, list[tuple[Row, Outputs]]] = defaultdict(list)
        self._host = host = load_host(arguments, self.device)
        self._log("model and experts are in place")
        self.config = host.model.config
        self.rates = measure_rates(host)
        self.memory_gb_per_s = max(self.rates["device_read"], self.rates["device_copy"])
        self._log(f"GB/s {self.rates}")
        rows = table_rows(arguments.batch)
        self._shape = TableShape(host.num_layers, TABLE_STEPS, rows, host.top_k, host.num_experts)
        self._tables = {
            name: new_table(name, self._shape, arguments.seed, self.device, arguments.foresight)
            for name in arguments.routing
        }
        self._prompts, self._long_prompts = draw_prompts(arguments, host, rows)
        self._setups, self.rows = list_setups(arguments, host)
        for row in self.rows:
            print_row(row)
        self._setup_s = LATER_SETUP_S

    def run(self) -> None:
        for index, setup in enumerate(self._setups):
            if self._for_cases_s() < LAST_S:
                self._skip(setup, "no time was left")
                continue
            try:
                self._measure_setup(setup, num_later=len(self._setups) - index - 1)
            except torch.OutOfMemoryError as error:
                self._skip(setup, str(error).splitlines()[0])
            self._host.detach()

    def judge(self) -> None:
        """Compare what was computed with the most slots that computed the same."""
        for rows in self._outputs.values():
            _, of_most_slots = max(rows, key=lambda each: float(each[0]["share"]))
            for row, outputs in rows:
                if outputs is not of_most_slots:
                    judge(row, outputs, of_most_slots)

    def close(self) -> None:
        """Free all that is large."""
        self._host.close()
        del self._host, self._tables
        gc.collect()  # the source and who listens to it name each other

    def left_s(self) -> float:
        return float(self._arguments.time_limit_s - (time.perf_counter() - self._started))

    def _for_cases_s(self) -> float:
        return self.left_s() - baselines_s(self._arguments)

    def _measure_setup(self, setup: Setup, num_later: int) -> None:
        started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        decoding = self._decoding(setup)
        if self._long_prompts:
            row, outputs = measure_prefill(decoding, self._long_prompts)
            labels = {**setup.labels("prefill"), "batch": 1, "routing": NATURAL}
            self._add({**labels, **row, **self._limits(row)}, outputs)
        decoding.read_prompts()
        cases = self._cases(decoding)
        decoding.capture(cases, self._tables)
        self._setup_s = time.perf_counter() - started
        self._log(f"{setup.slots} slots, {setup.eviction}: ready in {self._setup_s:.1f} s")
        self._measure_cases(decoding, setup, cases, num_later)
        self._add({**setup.labels("memory"), **self._memory(setup)})

    def _decoding(self, setup: Setup) -> PagedDecoding:
        arguments = self._arguments
        longest = max(map(len, self._prompts)) + self._plan.most_steps
        return PagedDecoding(
            self._host,
            setup.num_slots,
            setup.eviction,
            self._prompts,
            max(arguments.prefill_tokens, longest),
            self._shape,
            arguments.foresight is not None,
            SamplingParams(temperature=arguments.temperature, seed=arguments.seed),
        )

    def _cases(self, decoding: PagedDecoding) -> list[Case]:
        """Batch by batch, and only once where prefetching makes no difference."""
        first, *_ = every = [value == "on" for value in self._arguments.prefetch]
        return [
            Case(batch, routing, prefetch)
            for batch in self._arguments.batch
            for routing in self._arguments.routing
            for prefetch in (every if decoding.can_prefetch(batch) else [first])
        ]

    def _measure_cases(
        self, decoding: PagedDecoding, setup: Setup, cases: list[Case], num_later: int
    ) -> None:
        for index, case in enumerate(cases):
            batch, routing = case.batch, case.routing
            if self._for_cases_s() < LAST_S:
                self._skip(setup, f"no time was left from batch {batch}, {routing} on")
                return
            free_s = self._for_cases_s() - LAST_S - num_later * min(self._setup_s, LATER_SETUP_S)
            limit_s = max(1.0, free_s / (len(cases) * (1 + num_later) - index))
            row, outputs = measure_decode(decoding, case, self._tables[routing], self._plan, limit_s)
            limits = self._limits(row)
            read_bytes = self._host.bytes_read(batch, row["distinct_experts"])
            limits["weight_read_ms"] = round(read_bytes / self.memory_gb_per_s / 1e6, 3)
            prefetch = "on" if case.prefetch and decoding.can_prefetch(batch) else "off"
            labels = {**setup.labels("decode"), "batch": batch, "routing": routing, "prefetch": prefetch}
            self._add({**labels, **row, **limits}, outputs)

    def _limits(self, row: Row) -> Row:
        """Wasted prefetches take time of the link that nothing demands: they are not part of its limit."""
        slab_bytes = self._host.source.layout.slab_bytes
        fetched_bytes = row["fetched_per_step"] * slab_bytes
        demanded_bytes = fetched_bytes - row["in_vain_per_step"] * slab_bytes
        return {
            "fetched_mb_per_step": round(fetched_bytes / 1e6, 2),
            "fetched_gb_per_s": round(fetched_bytes / row["step_ms"] / 1e6, 2),
            "link_ms": round(demanded_bytes / self.rates["link"] / 1e6, 3),
        }

    def _memory(self, setup: Setup) -> Row:
        slot_bytes = setup.num_slots * self._host.num_layers * self._host.layout.slab_bytes
        row: Row = {"slots_gb": round(slot_bytes / 1e9, 3), "setup_s": round(self._setup_s, 1)}
        if self.device.type == "cuda":
            row["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)
            row["peak_reserved_gb"] = round(torch.cuda.max_memory_reserved(self.device) / 1e9, 3)
        return row

    def _skip(self, setup: Setup, reason: str) -> None:
        self._add({**setup.labels("skipped"), "reason": reason})

    def _add(self, row: Row, outputs: Outputs | None = None) -> None:
        self.rows.append(row)
        if outputs is not None:
            self._outputs[key_of(row)].append((row, outputs))
        print_row(row)

    def _log(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._started:.1f} s] {text}", flush=True)


def main(command: list[str] | None = None) -> None:
    arguments = parse_arguments(command, __doc__)
    merged = read_merged(arguments)
    baselines = [row for record in merged for row in baselines_of(record)]
    benchmark = Benchmark(arguments)
    try:
        benchmark.run()
        benchmark.close()
        for row in measure_baselines(
            arguments, benchmark.config, benchmark.device, benchmark.memory_gb_per_s, benchmark.left_s
        ):
            baselines.append(row)
            print_row(row)
    finally:  # also with an error: what was measured is worth keeping
        benchmark.judge()
        earlier = [
            row for record in merged if record["benchmark"] == "gpu_decode" for row in record["results"]
        ]
        finish(arguments, benchmark, earlier, baselines)


def finish(
    arguments: argparse.Namespace, benchmark: Benchmark, earlier: list[Row], baselines: list[Row]
) -> None:
    rows = [*benchmark.rows, *earlier]
    complete(rows)
    print_table(rows)
    settings = {**vars(arguments), "merge": [path.name for path in arguments.merge]}
    record: dict[str, Any] = {
        "benchmark": "gpu_decode",
        "conditions": conditions(**settings),
        "gb_per_s": benchmark.rates,
        "exact": is_exact(rows),
        "results": rows,
        "baselines": baselines,
    }
    if arguments.plot is not None:
        plot(rows, baselines, title_of(record), arguments.plot)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        record = {**record, "results": len(rows), "baselines": len(baselines)}  # the file has them
    print(json.dumps(record))


if __name__ == "__main__":
    main()
