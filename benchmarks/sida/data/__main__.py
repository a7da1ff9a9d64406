"""Are the three tasks made of source code balanced, as long as those they mirror, and beyond a count of tokens?

Builds text and tasks in the work folder, and prints for each task its size, its lengths in tokens, and the scores on the
test part of always one answer and of a linear model over counts of tokens.

    python -m benchmarks.sida.data [--size full] [--out data.json]
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.conditions import conditions
from benchmarks.sida.arguments import SidaArguments, data_folder, parser, prepare_data
from benchmarks.sida.data.baselines import score_baselines
from benchmarks.sida.data.build import read_record, read_task
from benchmarks.sida.data.sources import PARTS
from benchmarks.sida.data.tasks import MIRRORED, QUESTIONS, TASKS, TaskName
from benchmarks.sida.data.tokens import Vocabulary


def describe_task(folder: Path, task: TaskName, seed: int) -> dict[str, Any]:
    vocabulary = Vocabulary()
    parts = {part: read_task(folder, task, part) for part in PARTS}
    lengths = np.concatenate([part.lengths for part in parts.values()])
    baselines = score_baselines(parts["train"], parts["test"], vocabulary.size, vocabulary.separator_id, seed)
    kinds, counts = np.unique(parts["test"].kinds, return_counts=True)
    return {
        "task": task,
        "mirrors": MIRRORED[task],
        "question": QUESTIONS[task],
        "examples": {name: len(part.labels) for name, part in parts.items()},
        "positive_share": {name: round(float(part.labels.mean()), 4) for name, part in parts.items()},
        "tokens_mean": round(float(lengths.mean()), 1),
        "tokens_p10_p90": [int(np.quantile(lengths, share)) for share in (0.1, 0.9)],
        "test_kinds": dict(zip(kinds.tolist(), counts.tolist(), strict=True)),
        "majority": round(baselines.majority, 4),
        "bag_of_tokens": round(baselines.bag_of_tokens, 4),
    }


def main() -> None:
    arguments = parser(__doc__).parse_args(namespace=SidaArguments())
    started = time.perf_counter()
    prepare_data(arguments)
    folder = data_folder(arguments)
    rows = [describe_task(folder, task, arguments.seed) for task in TASKS]
    for row in rows:
        print("  ".join(f"{name}={value}" for name, value in row.items()))
    record = {
        "benchmark": "sida_data",
        "text": read_record(folder),
        "tasks": rows,
        "seconds": round(time.perf_counter() - started, 1),
        "conditions": conditions(**vars(arguments)),
    }
    arguments.write(record)


if __name__ == "__main__":
    main()
