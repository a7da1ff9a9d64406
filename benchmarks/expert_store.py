"""How fast does the expert store load a checkpoint, hand itself over, and give access to an expert?

Writes a random qwen3_moe checkpoint, which leaves it in the page cache; so this measures copying, not the disk.
Experts are those of Qwen3-30B-A3B (9.4 MB) unless told otherwise. Beside the rate of loading stands its limit: a
plain read of the same bytes into memory of one process, by one thread and by as many as load tasks run at once. The
first load starts worker processes and touches the object store's pages for the first time; the others are given
apart. Not measured: several nodes, a cold disk, a GPU.

    python -m benchmarks.expert_store [--layers 3] [--experts 16] [--hidden-size 2048] [--intermediate-size 768]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from actors.expert_store.directory import ExpertDirectory
from actors.expert_store.store import TASKS_PER_NODE, ExpertStore
from benchmarks.conditions import conditions
from common.checkpoint import Checkpoint

SEED = 0
LOAD_TIMEOUT_S = 300


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name), arguments)
        checkpoint = Checkpoint.open(folder)
        with cluster(checkpoint.expert_bytes):
            results = measure(checkpoint, folder, arguments.runs)
    print(json.dumps(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=16, help="per layer")
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--intermediate-size", type=int, default=768, help="of one expert")
    parser.add_argument("--runs", type=int, default=5)
    arguments: argparse.Namespace = parser.parse_args()
    return arguments


def write_checkpoint(folder: Path, arguments: argparse.Namespace) -> Path:
    """A qwen3_moe in bfloat16 with random weights, in shards."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=arguments.hidden_size,
        moe_intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_experts=arguments.experts,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=1024,
    )
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="200MB"
    )
    return folder


@contextmanager
def cluster(expert_bytes: int) -> Iterator[None]:
    """A Ray of its own, with room for two loads: the next begins before the last one's memory is free again."""
    ray.init(
        address="local", object_store_memory=3 * expert_bytes, include_dashboard=False, log_to_driver=False
    )
    yield
    ray.shutdown()


def measure(checkpoint: Checkpoint, folder: Path, runs: int) -> dict[str, Any]:
    first_s, directory = load(folder)
    seconds = []
    for _ in range(runs):
        del directory  # or the loads would pile up
        load_s, directory = load(folder)
        seconds.append(load_s)
    receiver = ray.remote(Receiver).options(num_cpus=0).remote(directory)
    ray.get(receiver.ready.remote())
    return {
        "benchmark": "expert_store",
        "experts": len(directory.refs),
        "expert_mb": checkpoint.stored_layout.slab_bytes / 1e6,
        "total_gb": checkpoint.expert_bytes / 1e9,
        "index_s": timed(partial(Checkpoint.open, folder), runs),
        "first_load_gb_per_s": round(checkpoint.expert_bytes / 1e9 / first_s, 4),
        "load_gb_per_s": summary([checkpoint.expert_bytes / 1e9 / load_s for load_s in seconds]),
        "limit_read_1_thread_gb_per_s": read_rate(checkpoint, 1, runs),
        f"limit_read_{TASKS_PER_NODE}_threads_gb_per_s": read_rate(checkpoint, TASKS_PER_NODE, runs),
        "hand_out_directory_ms": summary(hand_outs(receiver, runs)),
        "first_view_us": summary(ray.get(receiver.view_times_us.remote())),
        "repeated_view_us": summary(ray.get(receiver.view_times_us.remote())),
        "repeated_view_in_batches_of_8_us": summary(ray.get(receiver.view_times_us.remote(8))),
        "runs": runs,
        "seed": SEED,
        "ray": ray.__version__,
        "conditions": conditions(),
    }


def load(folder: Path) -> tuple[float, ExpertDirectory]:
    """Seconds from the first task to the last expert, without the index; the store before it is gone by then."""
    store = ExpertStore(folder)
    store.start()
    directory = store.directory(LOAD_TIMEOUT_S)
    return float(store.describe()["seconds"]), directory


def read_rate(checkpoint: Checkpoint, threads: int, runs: int) -> dict[str, float]:
    """GB/s of reading every expert into memory of this process, without Ray."""
    slabs = [np.empty(checkpoint.stored_layout.slab_bytes, np.uint8) for _ in range(threads)]

    def read_share(thread: int) -> None:
        for layer, expert_id in list(checkpoint.expert_ranges)[thread::threads]:
            checkpoint.read_expert(layer, expert_id, slabs[thread])

    with ThreadPoolExecutor(threads) as pool:
        seconds = [elapsed(lambda: list(pool.map(read_share, range(threads)))) for _ in range(runs)]
    return summary([checkpoint.expert_bytes / 1e9 / value for value in seconds])


class Receiver:
    """In the place of an executor: another process on the same node."""

    def __init__(self, directory: ExpertDirectory) -> None:
        self._directory = directory

    def ready(self) -> bool:
        return bool(self._directory.refs)

    def give_back(self) -> ExpertDirectory:
        return self._directory

    def view_times_us(self, batch: int = 1) -> list[float]:
        """Microseconds for each expert, got `batch` at a time; the views are kept while it runs."""
        refs, views, times = list(self._directory.refs.values()), list[NDArray[np.uint8]](), []
        for start in range(0, len(refs), batch):
            got: list[NDArray[np.uint8]] = []
            seconds = elapsed(lambda: got.extend(ray.get(refs[start : start + batch])))  # noqa: B023
            views += got
            times.append(seconds / batch * 1e6)
        return times


def hand_outs(receiver: Any, runs: int) -> list[float]:
    """Milliseconds until another process has answered with the whole directory: one way a call, one way the refs."""
    return [elapsed(lambda: ray.get(receiver.give_back.remote())) * 1e3 for _ in range(runs + 1)][1:]


def elapsed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def timed(action: Callable[[], object], runs: int) -> dict[str, float]:
    return summary([elapsed(action) for _ in range(runs)])


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 4),
        "min": round(ordered[0], 4),
        "max": round(ordered[-1], 4),
    }


if __name__ == "__main__":
    main()
