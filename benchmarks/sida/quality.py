"""How often does a hash function name the expert that the router chooses, and what is lost when it chooses instead?

Trains, for each number of experts, a Switch Transformer from scratch on corrupted source text of this machine, and a
classifier of each task from it; then hash functions on the routing of training text: the paper's network and ours, as long
as each other. What the work folder has is not made again, whatever the options: give others a folder of their own. On the
test part, without padding:

- *hit rate*: the routers' first choice is the first, or among the first three, that are predicted; mean over layers. Beside
  it that of the experts which were most frequent for the token's id. Mind the routers' skew: collapsed routing is predicted
  by anybody.
- *fidelity*: the score with predicted routing over the score with the routers', every token computed by 1 or by 3 predicted
  experts, weights predicted too. *Agreement*: the same answer, right or wrong. A score means little where it is near that
  of always one answer (`majority`).
- *perplexity* of corrupted text, teacher-forced: the encoder routed by its hash function, or the decoder by one of its own
  too, which reads what the decoder reads.
- *exact*: the engine with a quarter of the experts in slots and its routers deciding, against all of them in slots.

The models are small and see some ten million tokens: scores are for comparing routings, not models. Not measured: time,
see `benchmarks.sida.speed`, for whose `--routing trained` the test part's routing is kept in the work folder.

    python -m benchmarks.sida.quality [--size full] [--experts 8 64 128] [--out quality.json] [--plot quality.png]

Several numbers of experts can be worked on at once, by a command for each of them with the same `--work`; the command for
all of them then only reads what those have found.
"""

import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.conditions import conditions
from benchmarks.sida.arguments import SidaArguments, parser
from benchmarks.sida.data.tasks import TASKS
from benchmarks.sida.models import RouterTraining
from benchmarks.sida.quality_plot import plot
from benchmarks.sida.quality_table import print_tables
from benchmarks.sida.task_quality import measure_exactness, measure_task
from benchmarks.sida.text_quality import measure_text
from benchmarks.sida.workshop import Workshop


class QualityArguments(SidaArguments):
    minutes: float | None
    router_scale: float
    router_speed: float
    aux_loss: float
    no_engine: bool


def parse_arguments() -> QualityArguments:
    made = parser(__doc__)
    made.add_argument("--experts", type=int, nargs="+", help="default: 8 and 32 (cpu), 8, 64 and 128 (full)")
    made.add_argument("--minutes", type=float, help="of training for each number of experts")
    routers = RouterTraining()
    made.add_argument("--router-scale", type=float, default=routers.scale, help="of routers' initial weights")
    made.add_argument("--router-speed", type=float, default=routers.speed, help="of routers' learning rate")
    made.add_argument("--aux-loss", type=float, default=routers.aux_loss, help="weight of balancing")
    made.add_argument("--no-engine", action="store_true", help="leave the exact mode out")
    return made.parse_args(namespace=QualityArguments())


def measure(arguments: QualityArguments) -> dict[str, Any]:
    started = time.perf_counter()
    size = arguments.numbers if arguments.minutes is None else arguments.numbers.within(arguments.minutes)
    routers = RouterTraining(arguments.router_scale, arguments.router_speed, arguments.aux_loss)
    workshop = Workshop.of(arguments, replace(size, routers=routers))
    record: dict[str, Any] = {"benchmark": "sida_quality", "text": [], "tasks": [], "exact": []}

    def add(kind: str, row: dict[str, Any]) -> None:
        record[kind].append(row)
        record["seconds"] = round(time.perf_counter() - started, 1)
        record["conditions"] = conditions(**vars(arguments), training_minutes=size.training_minutes)
        arguments.save(record)

    experts = arguments.experts or size.experts
    for num_experts in experts:
        add("text", measure_text(workshop, num_experts))
        for task in TASKS:
            add("tasks", measure_task(workshop, num_experts, task))
    for num_experts in () if arguments.no_engine else experts:
        for task in TASKS:
            add("exact", measure_exactness(workshop, num_experts, task))
    return record


def main() -> None:
    arguments = parse_arguments()
    torch.set_float32_matmul_precision("high")  # of hash functions on a GPU
    record = measure(arguments)
    print_tables(record)
    if arguments.plot:
        plot(record, arguments.plot)
    arguments.write(record)


if __name__ == "__main__":
    main()
