"""How fast, and in how much memory, does Switch-base classify one sentence at a time with few experts on the device?

Shapes of Switch-base's encoder (12 layers, every other one sparse, d_model 768, d_ff 3072), random weights, a classifier
of two labels; sentences are real ones as long as those of SST-2, MRPC and MultiRC. Every system computes the same
routing of the same sentences, one after the other, and all logits are compared. The systems:

- *loop*: every expert on the device and visited, with tokens or without, as the published baseline does.
- *skip-empty*: every expert on the device, those with tokens are visited: one synchronisation a layer. *grouped*: the
  same by the library's grouped GEMM.
- *on-demand*: this project's engine with few slots per layer, LRU, nothing prefetched.
- *sida*: the same engine with hash tables. A hash function of the paper's size runs in a process of its own, a sentence
  or two ahead, and the clock starts before its first prediction. What it says is exchanged for the recorded routing.
- *sida-exact*: the routers decide, the tables only prefetch; `--hit-rate` of what they name is right.
- *oracle*: as sida, with tables that take no time.

A run is all sentences once. What is warm when it begins are slots, from the run before. `peak_gpu_gb` is the largest
memory that tensors held, weights included. `read_limit_ms` is the time to read each needed weight once, `link_limit_ms`
that to bring what the system moved per sentence, both at measured rates. Routing is that of the random routers (each
token's expert follows mostly from the token) or, with `--routing trained`, what the small encoders of
`benchmarks.sida.quality` decided for test sentences of their tasks. Not measured: HTTP, Ray, batches.

    python -m benchmarks.sida.speed [--size full --experts 256] [--out speed.json --plot speed.png]
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.conditions import conditions
from benchmarks.gpu.baselines import measured_bandwidths
from benchmarks.gpu.limits import device_read_gb_per_s
from benchmarks.sida.arguments import SidaArguments, parser
from benchmarks.sida.data.build import build, read_task
from benchmarks.sida.data.tasks import MIRRORED, TASKS, TaskName
from benchmarks.sida.models import base_config
from benchmarks.sida.sizes import SIZES
from benchmarks.sida.speed.engine_runs import hash_function_process, with_mistakes
from benchmarks.sida.speed.host_model import HostModel
from benchmarks.sida.speed.measure import Rates, Row, limits_ms, measure_resident, measure_slots
from benchmarks.sida.speed.resident import RESIDENT_SYSTEMS
from benchmarks.sida.speed.sentences import Recording, Sentence, draw, route_by_routers
from benchmarks.sida.speed.summary import plot, print_summary, summarise
from benchmarks.sida.task_quality import ROUTING_FILE
from benchmarks.sida.workshop import routing_folder
from common.hash_table import HashTable
from common.slot_budget import SlotBudget

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLOT_SYSTEMS = ("on-demand", "sida", "sida-exact", "oracle")


class SpeedArguments(SidaArguments):
    dtype: list[str]
    task: list[TaskName]
    padding: list[str]
    system: list[str]
    slots: list[str] | None
    eviction: str
    hit_rate: float
    sentences: int | None
    runs: int
    routing: str
    time_limit_s: float


def parse_arguments() -> SpeedArguments:
    made = parser(__doc__)
    made.add_argument(
        "--experts", type=int, nargs="+", help="default: 8 and 32 (cpu), 8, 64, 128 and 256 (full)"
    )
    made.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), help="default: float32, and full bfloat16 too"
    )
    made.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    made.add_argument("--padding", nargs="+", choices=["unpadded", "padded"], default=["unpadded", "padded"])
    systems = [*RESIDENT_SYSTEMS, *SLOT_SYSTEMS]
    made.add_argument("--system", nargs="+", choices=systems, default=systems)
    made.add_argument(
        "--slots", nargs="+", help="per layer; default: 18%% and 55%% (cpu), 6%% to 55%% (full)"
    )
    made.add_argument("--eviction", default="lfu", help="of sida and oracle")
    made.add_argument("--hit-rate", type=float, default=0.98, help="of sida-exact's tables")
    made.add_argument("--sentences", type=int, help="default: 6 (cpu), 24 (full)")
    made.add_argument("--runs", type=int, default=5)
    made.add_argument(
        "--routing",
        choices=["random", "trained"],
        default="random",
        help="of whose routers; trained: recorded by benchmarks.sida.quality in the same folder",
    )
    made.add_argument("--time-limit-s", type=float, default=540, help="begin no further case after that")
    return made.parse_args(namespace=SpeedArguments())


class Benchmark:
    def __init__(self, arguments: SpeedArguments) -> None:
        self._arguments, self._started = arguments, time.perf_counter()
        self._device = torch.device(arguments.device)
        self._size = arguments.numbers.speed
        self._rows: list[Row] = []
        # Sentences are few: the small data will do.
        self._data = arguments.work / "cpu" / "data"
        build(self._data, SIZES["cpu"].data, arguments.seed)
        general = measured_bandwidths(self._device)
        link = general.get("host_pinned_to_device", general["host_pageable_to_device"])
        self._rates = Rates(link, round(device_read_gb_per_s(self._device), 1))
        print(self._rates, flush=True)

    def run(self) -> dict[str, Any]:
        for num_experts in self._arguments.experts or self._size.experts:
            for dtype in self._arguments.dtype or self._size.dtypes:
                self._run_model(num_experts, dtype)
        return self.record()

    def record(self) -> dict[str, Any]:
        return {
            "benchmark": "sida_speed",
            "gb_per_s": vars(self._rates),
            "results": self._rows,
            "summary": summarise(self._rows),
            "seconds": round(time.perf_counter() - self._started, 1),
            "conditions": conditions(**vars(self._arguments)),
        }

    def _run_model(self, num_experts: int, dtype: str) -> None:
        if self._is_over():
            return
        config = base_config(self._size.shape, num_experts, DTYPES[dtype])
        host = HostModel(config, self._device, self._arguments.seed)
        try:
            for task in self._arguments.task:
                for padding in self._arguments.padding:
                    self._run_sentences(
                        host, {"experts": num_experts, "dtype": dtype, "task": task, "padding": padding}
                    )
        finally:
            host.close()

    def _run_sentences(self, host: HostModel, case: Row) -> None:
        if self._is_over():
            return
        sentences = self._sentences(host, case["task"], case["padding"] == "padded")
        case = {
            **case,
            "mirrors": MIRRORED[case["task"]],
            "routing": self._arguments.routing,
            "sentences": len(sentences),
            "tokens_mean": round(sum(len(each.token_ids) for each in sentences) / len(sentences), 1),
            "distinct_experts_per_layer": round(
                sum(float(each.distinct_experts().mean()) for each in sentences) / len(sentences), 2
            ),
        }
        reference = None
        for row, logits in self._measure_all(host, sentences):
            reference = logits if reference is None else reference
            difference = max(
                float((one - other).abs().max()) for one, other in zip(logits, reference, strict=True)
            )
            row = {
                **case,
                **row,
                **limits_ms(host, sentences, row, self._rates),
                "logit_difference": round(difference, 6),
            }
            self._rows.append(row)
            print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            self._arguments.save(self.record())

    def _sentences(self, host: HostModel, task: TaskName, padded: bool) -> list[Sentence]:
        count, seed = self._arguments.sentences or self._size.sentences, self._arguments.seed
        if self._arguments.routing == "trained":
            root = self._arguments.work / self._arguments.size
            file = routing_folder(root, host.num_experts, task) / ROUTING_FILE
            return Recording(file, host.num_experts).sentences(host, count, padded, seed)
        return route_by_routers(host, draw(read_task(self._data, task, "test").ids, count, padded, seed)[1])

    def _measure_all(
        self, host: HostModel, sentences: list[Sentence]
    ) -> Iterator[tuple[Row, list[torch.Tensor]]]:
        chosen, runs = self._arguments.system, self._arguments.runs
        with host.all_resident():
            for system in RESIDENT_SYSTEMS:
                if system in chosen and not self._is_over():
                    row, logits = measure_resident(host, sentences, system, runs)
                    yield {"system": system, "slots": host.num_experts, **row}, logits
        with hash_function_process(host, self._size.hash_function_hidden) as hash_function:
            for num_slots in self._slot_counts(host):
                for system in SLOT_SYSTEMS:
                    if system in chosen and not self._is_over():
                        yield self._measure_slots(host, sentences, system, num_slots, hash_function)

    def _slot_counts(self, host: HostModel) -> list[int]:
        budgets = map(SlotBudget.parse, self._arguments.slots or self._size.slots)
        counts = (
            budget.slots_per_layer(host.num_layers, host.num_experts, host.layout.slab_bytes, top_k=0)
            for budget in budgets
        )
        return sorted({max(1, count) for count in counts})

    def _measure_slots(
        self,
        host: HostModel,
        sentences: list[Sentence],
        system: str,
        num_slots: int,
        hash_function: Callable[[Sentence], None],
    ) -> tuple[Row, list[torch.Tensor]]:
        named = {each.request_id: each.table for each in sentences}
        if system == "sida-exact":
            hit_rate = self._arguments.hit_rate
            named = {
                name: with_mistakes(table, hit_rate, host.num_experts, seed)
                for seed, (name, table) in enumerate(named.items())
            }

        def predict(sentence: Sentence) -> HashTable | None:
            if system in ("sida", "sida-exact"):
                hash_function(sentence)
            return None if system == "on-demand" else named[sentence.request_id]

        eviction = "lru" if system == "on-demand" else self._arguments.eviction
        row, logits = measure_slots(
            host, sentences, num_slots, eviction, system != "on-demand", predict, self._arguments.runs
        )
        return {"system": system, "slots": num_slots, "eviction": eviction, **row}, logits

    def _is_over(self) -> bool:
        return time.perf_counter() - self._started > self._arguments.time_limit_s


def main() -> None:
    arguments = parse_arguments()
    record = Benchmark(arguments).run()
    print_summary(record["summary"])
    if arguments.plot and record["results"]:
        plot(record["results"], arguments.plot)
    arguments.write(record)


if __name__ == "__main__":
    main()
