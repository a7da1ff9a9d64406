"""How fast, and in how much memory, does Switch-base classify one sentence at a time with few experts on the device?

Shapes of Switch-base's encoder (12 layers, every other one sparse, d_model 768, d_ff 3072), random weights, a classifier
of two labels; sentences are real ones as long as those of SST-2, MRPC and MultiRC. Every system computes the same
routing of the same sentences, one after the other, and all logits are compared: with the first system's, and those of this
project's engine, which must not differ by a bit, with its first ones. The systems:

- *loop*: the library's model, every expert on the device and visited, with tokens or without, as the published baseline
  does. *skip-empty*: those with tokens are visited, one synchronisation a layer. *grouped*: by the library's grouped GEMM.
- *all-slots*: this project's engine with a slot for every expert; nothing moves.
- *on-demand*: the engine with few slots per layer, LRU, nothing prefetched.
- *sida*: the same engine with hash tables. A hash function of `--network` runs in a process of its own, a sentence or two
  ahead, and the clock starts before its first prediction. What it says is exchanged for the recorded routing.
- *sida-exact*: the routers decide, the tables only prefetch; `--hit-rate` of what they name is right.
- *oracle*: as sida, with tables that take no time.

Every run has sentences of its own, the first one warms up; medians are over the others. `latency` is from a sentence's
admission to its answer, without the prediction. `peak_gpu_gb` is the largest memory that tensors held, weights included.
`read_limit_ms` is the time to read each needed weight once, `link_limit_ms` that to bring what the system moved per sentence,
both at measured rates. Routing is that of the random routers (each token's expert follows mostly from the token) or, with
`--routing trained`, what the small encoders of `benchmarks.sida.quality` decided for test sentences of their tasks. Not
measured: HTTP, Ray, batches.

    python -m benchmarks.sida.speed [--size full --experts 256] [--out speed.json --plot speed.png]
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.conditions import conditions
from benchmarks.gpu.baselines import measured_bandwidths
from benchmarks.gpu.limits import device_read_gb_per_s
from benchmarks.sida.arguments import SidaArguments, parser
from benchmarks.sida.data.build import build, read_task
from benchmarks.sida.data.tasks import MIRRORED, TASKS, TaskName
from benchmarks.sida.hash_functions import NETWORKS
from benchmarks.sida.models import base_config
from benchmarks.sida.sizes import SIZES
from benchmarks.sida.speed.engine_runs import EngineRuns, Predict, hash_function_process, with_mistakes
from benchmarks.sida.speed.host_model import HostModel
from benchmarks.sida.speed.measure import Rates, Row, Runs, limits_ms, measure_engine, measure_resident
from benchmarks.sida.speed.resident import RESIDENT_SYSTEMS
from benchmarks.sida.speed.sentences import Recording, Sentence, draw, route_by_routers
from benchmarks.sida.speed.summary import plot, print_summary, summarise
from benchmarks.sida.task_quality import ROUTING_FILE
from benchmarks.sida.workshop import routing_folder
from common.hash_table import HashTable
from common.slot_budget import SlotBudget

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ON_DEMAND, ALL_SLOTS = "on-demand", "all-slots"
TABLE_SYSTEMS = ("sida", "sida-exact", "oracle")
SYSTEMS = (*RESIDENT_SYSTEMS, ALL_SLOTS, ON_DEMAND, *TABLE_SYSTEMS)
PADDED_SYSTEMS = ("skip-empty", ALL_SLOTS, ON_DEMAND, "sida")


class SpeedArguments(SidaArguments):
    dtype: list[str]
    task: list[TaskName]
    padding: list[str]
    system: list[str]
    slots: list[str] | None
    eviction: str
    network: str
    hit_rate: float
    sentences: int | None
    runs: int
    routing: str
    time_limit_s: float


def parse_arguments() -> SpeedArguments:
    made = parser(__doc__)
    made.add_argument(
        "--experts", type=int, nargs="+", help="default: 8 and 32 (cpu), 256, 128, 64 and 8 (full)"
    )
    made.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), help="default: float32, and full bfloat16 too"
    )
    made.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    made.add_argument("--padding", nargs="+", choices=["unpadded", "padded"], default=["unpadded", "padded"])
    made.add_argument("--system", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    made.add_argument(
        "--slots", nargs="+", help="per layer; default: 18%% and 55%% (cpu), 12%% to 55%% (full)"
    )
    made.add_argument("--eviction", default="lfu", help="of systems with tables")
    made.add_argument("--network", choices=list(NETWORKS), default="ours", help="of the hash function")
    made.add_argument("--hit-rate", type=float, default=0.98, help="of sida-exact's tables")
    made.add_argument("--sentences", type=int, help="of each run; default: 6 (cpu), 12 (full)")
    made.add_argument("--runs", type=int, default=5)
    made.add_argument(
        "--routing",
        choices=["random", "trained"],
        default="random",
        help="of whose routers; trained: recorded by benchmarks.sida.quality in the same folder",
    )
    made.add_argument("--time-limit-s", type=float, default=540, help="begin no further case after that")
    return made.parse_args(namespace=SpeedArguments())


@dataclass
class Case:
    """Sentences of one task, padded or not, and what has been found for them."""

    figures: Row
    runs: Runs
    reference: list[Tensor] | None = None  # logits of the first system
    of_engine: list[Tensor] | None = None  # of the first that is this project's engine

    @property
    def sentences(self) -> list[Sentence]:
        return [sentence for run in self.runs for sentence in run]

    def runs_system(self, system: str) -> bool:
        return self.figures["padding"] == "unpadded" or system in PADDED_SYSTEMS

    def differences(self, system: str, logits: list[Tensor]) -> Row:
        """The largest from the first system's, and from the engine's first ones; these are them if there are none."""
        self.reference = self.reference or logits
        found = {"logit_difference": _largest_difference(logits, self.reference)}
        if system not in RESIDENT_SYSTEMS:
            self.of_engine = self.of_engine or logits
            found["engine_difference"] = _largest_difference(logits, self.of_engine)
        return found


class Benchmark:
    def __init__(self, arguments: SpeedArguments) -> None:
        self._arguments, self._started = arguments, time.perf_counter()
        self._device = torch.device(arguments.device)
        self._size = arguments.numbers.speed
        self._rows: list[Row] = []
        self._data = arguments.work / "cpu" / "data"  # sentences are few: the small data will do
        if arguments.routing == "random":
            build(self._data, SIZES["cpu"].data, arguments.seed, processes=len(os.sched_getaffinity(0)))
        general = measured_bandwidths(self._device)
        link = general.get("host_pinned_to_device", general["host_pageable_to_device"])
        self._rates = Rates(link, round(device_read_gb_per_s(self._device), 1))
        print(self._rates, flush=True)

    def run(self) -> dict[str, Any]:
        for dtype in self._arguments.dtype or self._size.dtypes:
            for num_experts in self._arguments.experts or self._size.experts:
                if not self._is_over():
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
        config = base_config(self._size.shape, num_experts, DTYPES[dtype])
        host = HostModel(config, self._device, self._arguments.seed)
        try:
            with host.all_resident():
                cases = [
                    self._case(
                        host, {"experts": num_experts, "dtype": dtype, "task": task, "padding": padding}
                    )
                    for task in self._arguments.task
                    for padding in self._arguments.padding
                ]
                for system in RESIDENT_SYSTEMS:
                    for case in self._remaining(cases, system):
                        measured = measure_resident(host, case.runs, system)
                        self._add(host, case, system, host.num_experts, *measured)
            self._run_engines(host, cases)
        finally:
            host.close()

    def _case(self, host: HostModel, figures: Row) -> Case:
        count, num_runs = self._arguments.sentences or self._size.sentences, 1 + self._arguments.runs
        sentences = self._sentences(host, figures["task"], num_runs * count, figures["padding"] == "padded")
        runs = [sentences[start : start + count] for start in range(0, len(sentences), count)]
        figures |= {
            "mirrors": MIRRORED[figures["task"]],
            "routing": self._arguments.routing,
            "sentences": len(sentences),
            "tokens_mean": _mean(len(each.token_ids) for each in sentences),
            "distinct_experts_per_layer": _mean(float(each.distinct_experts().mean()) for each in sentences),
        }
        return Case(figures, runs)

    def _sentences(self, host: HostModel, task: TaskName, count: int, padded: bool) -> list[Sentence]:
        name, seed = f"{task}-{padded}", self._arguments.seed
        if self._arguments.routing == "trained":
            root = self._arguments.work / self._arguments.size
            file = routing_folder(root, host.num_experts, task) / ROUTING_FILE
            return Recording(file, host.num_experts).sentences(host, name, count, padded, seed)
        token_ids = draw(read_task(self._data, task, "test").ids, count, padded, seed)[1]
        return route_by_routers(host, name, token_ids)

    def _run_engines(self, host: HostModel, cases: list[Case]) -> None:
        """Each serves all cases."""
        asked = set(self._arguments.system)
        with hash_function_process(
            host, self._arguments.network, self._size.hash_function_hidden
        ) as hash_function:
            if ALL_SLOTS in asked:
                self._run_engine(host, cases, [ALL_SLOTS], host.num_experts, hash_function)
            for num_slots in self._slot_counts(host):
                for systems in ((ON_DEMAND,), TABLE_SYSTEMS):
                    if some := [system for system in systems if system in asked]:
                        self._run_engine(host, cases, some, num_slots, hash_function)

    def _run_engine(
        self,
        host: HostModel,
        cases: list[Case],
        systems: list[str],
        num_slots: int,
        hash_function: Callable[[Sentence], None],
    ) -> None:
        if self._is_over():
            return
        prefetch = systems[0] in TABLE_SYSTEMS
        eviction = self._arguments.eviction if prefetch else "lru"
        with host.slots(num_slots, eviction) as slot_model:
            engine = EngineRuns(slot_model, [each for case in cases for each in case.sentences], prefetch)
            try:
                for system in systems:
                    for case in self._remaining(cases, system):
                        predict = self._predict(host, system, case, hash_function)
                        self._add(
                            host, case, system, num_slots, *measure_engine(host, engine, case.runs, predict)
                        )
            finally:
                engine.stop()

    def _remaining(self, cases: list[Case], system: str) -> Iterator[Case]:
        """Those to be measured with the system, until the time is over."""
        for case in cases:
            if system in self._arguments.system and case.runs_system(system) and not self._is_over():
                yield case

    def _add(
        self, host: HostModel, case: Case, system: str, num_slots: int, found: Row, logits: list[Tensor]
    ) -> None:
        row = {
            **case.figures,
            "system": system,
            "slots": num_slots,
            **found,
            **limits_ms(host, case.sentences, found, self._rates),
            **case.differences(system, logits),
        }
        self._rows.append(row)
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        self._arguments.save(self.record())

    def _predict(
        self, host: HostModel, system: str, case: Case, hash_function: Callable[[Sentence], None]
    ) -> Predict:
        named = {each.request_id: each.table for each in case.sentences}
        if system == "sida-exact":
            hit_rate = self._arguments.hit_rate
            named = {
                name: with_mistakes(table, hit_rate, host.num_experts, seed)
                for seed, (name, table) in enumerate(named.items())
            }

        def predict(sentence: Sentence) -> HashTable | None:
            if system in ("sida", "sida-exact"):
                hash_function(sentence)
            return named[sentence.request_id] if system in TABLE_SYSTEMS else None

        return predict

    def _slot_counts(self, host: HostModel) -> list[int]:
        budgets = map(SlotBudget.parse, self._arguments.slots or self._size.slots)
        counts = (
            budget.slots_per_layer(host.num_layers, host.num_experts, host.layout.slab_bytes, top_k=0)
            for budget in budgets
        )
        return sorted({max(1, count) for count in counts})

    def _is_over(self) -> bool:
        return time.perf_counter() - self._started > self._arguments.time_limit_s


def _largest_difference(logits: list[Tensor], others: list[Tensor]) -> float:
    pairs = zip(logits, others, strict=True)
    return round(max(float((one - other).abs().max()) for one, other in pairs), 6)


def _mean(values: Iterable[float]) -> float:
    return round(statistics.mean(values), 2)


def main() -> None:
    arguments = parse_arguments()
    record = Benchmark(arguments).run()
    if record["summary"]:
        print_summary(record["results"])
    if arguments.plot and record["results"]:
        plot(record["results"], arguments.plot)
    arguments.write(record)


if __name__ == "__main__":
    main()
