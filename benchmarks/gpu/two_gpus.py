"""What does a second GPU on the same host bring, and what does it cost in host memory?

The application runs with one executor, then with two, where all experts are in slots (bound by computing) and where few
are (bound by the links to the host's memory). Both executors read one copy of the experts: shown by what /proc says of
every process of the application, by the machine's shared memory and by Ray's own figures. Throughput is the client's,
in a closed loop of as many requests as one executor is given (--batch), and of twice as many. Not measured: the engine
without Ray (`benchmarks.gpu.serving`), more than one host.

    python -m benchmarks.gpu.two_gpus --model /dev/shm/model --object-store-gb 26 [--slots all 25%] [--out two_gpus.json]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import conditions
from benchmarks.engine import read_prompts
from benchmarks.gpu.application import Application, exit_on_sigterm
from benchmarks.gpu.closed_loop import (
    Answer,
    expert_usage,
    figures,
    plan_streams,
    share,
    token_checks,
)
from benchmarks.gpu.engine_speed import WARM_UP_TOKENS
from benchmarks.gpu.load_client import LoadClients
from benchmarks.gpu.processes import Memory, role, shared_memory_bytes
from benchmarks.gpu.serving import MIN_PROMPTS, serving_settings
from common.config import REFERENCE_MODEL

RAY_CLI = "from ray.scripts.scripts import cli; cli()"  # there may be no `ray` in the path

Row = dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    exit_on_sigterm()
    prompts = read_prompts(arguments, max(MIN_PROMPTS, 2 * arguments.batch))
    rows: list[Row] = []
    memory: dict[str, Row] = {}
    known: dict[str, list[Answer]] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = arguments.log or Path(folder) / "application.log"
        for slots in arguments.slots:
            for num_executors in (1, 2):
                settings = application_settings(arguments, slots, num_executors)
                before = shared_memory_bytes()
                with (
                    Application(settings, arguments.object_store_gb, log) as application,
                    LoadClients(
                        f"{application.url}/v1", application.model, arguments.client_processes
                    ) as clients,
                ):
                    for concurrency in concurrencies(arguments.batch, num_executors):
                        row, answers = measure(
                            application, clients, prompts, concurrency, arguments, known.get(slots, [])
                        )
                        known.setdefault(slots, answers)
                        rows.append({"slots": slots, "executors": num_executors, **row})
                        print(rows[-1], flush=True)
                    name = f"{slots} of the slots, {num_executors} executors"
                    memory[name] = measure_memory(application, before)
                    print(name, memory[name], flush=True)
    record = {
        "benchmark": "gpu_two_gpus",
        "conditions": conditions(**vars(arguments)),
        "results": rows,
        "speedup": {slots: speedup(rows, slots, arguments.batch) for slots in arguments.slots},
        "memory": memory,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def application_settings(arguments: argparse.Namespace, slots: str, num_executors: int) -> dict[str, str]:
    settings = serving_settings(
        argparse.Namespace(**{**vars(arguments), "slots": slots}), max_batch_size=2 * arguments.batch
    )
    return {**settings, "min_executors": str(num_executors), "max_executors": str(num_executors)}


def concurrencies(batch: int, num_executors: int) -> tuple[int, ...]:
    return (batch, 2 * batch) if num_executors == 1 else (2 * batch,)


def measure(
    application: Application,
    clients: LoadClients,
    prompts: Sequence[Sequence[int]],
    concurrency: int,
    arguments: argparse.Namespace,
    known: Sequence[Answer],
) -> tuple[Row, list[Answer]]:
    """Args: known: answers of the same slots from another run, which these must equal."""
    plan = plan_streams(concurrency, arguments.requests, len(prompts))
    clients.run([stream[:1] for stream in plan], prompts, WARM_UP_TOKENS)
    before = generated_tokens(application)
    answers = clients.run(plan, prompts, arguments.new_tokens)
    after = generated_tokens(application)
    row = {
        "concurrency": concurrency,
        **figures(answers),
        **token_checks(answers, arguments.new_tokens, known),
        "experts": expert_usage(answers),
        "tokens_by_executor": sorted(after[replica] - before.get(replica, 0) for replica in after),
    }
    return row, answers


def generated_tokens(application: Application) -> dict[str, int]:
    executors = application.get("/v1/experts")["executors"]
    return {executor["replica"]: executor["generated_tokens"] for executor in executors}


def speedup(rows: Sequence[Row], slots: str, batch: int) -> Row:
    """Two executors at twice the load against one at each of the loads; 2.0 against the smaller one is the ideal."""
    rates = {
        (row["executors"], row["concurrency"]): row.get("tokens_per_s", 0.0)
        for row in rows
        if row["slots"] == slots
    }
    two = rates[2, 2 * batch]
    return {
        f"over_one_executor_at_{concurrency}": share(two, rates[1, concurrency])
        for concurrency in (batch, 2 * batch)
        if rates[1, concurrency]
    }


def measure_memory(application: Application, shared_before: int) -> Row:
    """Where the experts lie. Proportional shares of the object store over all processes add up to the pages in use.

    Args:
        shared_before: shared memory of the machine before the application started.
    """
    report = application.get("/v1/experts")
    expert_bytes = report["store"]["total_bytes"]
    processes = [(process, Memory.read(process.pid)) for process in application.processes()]
    in_store = sum(memory.store_pss for _, memory in processes)
    grown = shared_memory_bytes() - shared_before
    return {
        "experts_gb": _gigabytes(expert_bytes),
        "store_generations": sorted({each["store_generation"] for each in report["executors"]}),
        "store_mapped_gb": _gigabytes(in_store),
        "copies_mapped": share(in_store, expert_bytes),
        "shared_memory_grown_gb": _gigabytes(grown),
        "copies_in_shared_memory": share(grown, expert_bytes),
        "executors": [
            {"pid": process.pid, **{f"{k}_gb": _gigabytes(v) for k, v in asdict(memory).items()}}
            for process, memory in processes
            if role(process) == "ExecutorDeployment"
        ],
        "all_processes": {
            "anonymous_gb": _gigabytes(sum(memory.anonymous for _, memory in processes)),
            "pss_gb": _gigabytes(sum(memory.pss for _, memory in processes)),
        },
        "ray": ray_memory(application),
    }


def ray_memory(application: Application) -> list[str]:
    """What `ray memory --stats-only` says of the object store: used, on disk, spilled."""
    raylet = next(process for process in application.processes() if role(process) == "raylet")
    address = re.search(r"--gcs-address=(\S+)", raylet.title)
    assert address is not None
    command = [sys.executable, "-c", RAY_CLI, "memory", "--stats-only", f"--address={address[1]}"]
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}  # Ray's default for a Ray that a driver started
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    if finished.returncode:
        return [f"not known: {finished.stderr.strip().splitlines()[-1:]}"]
    wanted = ("Plasma", "Spilled", "Restored")
    return [line for line in finished.stdout.splitlines() if line.startswith(wanted)]


def _gigabytes(num_bytes: int) -> float:
    return round(num_bytes / 1e9, 3)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REFERENCE_MODEL)
    parser.add_argument("--text", type=Path, default=REFERENCE_MODEL / "heldout.txt", help="of the prompts")
    parser.add_argument("--slots", nargs="+", default=["all", "25%"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8, help="requests at once for one executor")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=16, help="per run, and 3 per stream at least")
    parser.add_argument("--client-processes", type=int, default=4)
    parser.add_argument("--object-store-gb", type=float, default=0.5, help="experts may fill 80 %% of it")
    parser.add_argument("--log", type=Path, help="keep what the last application prints")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
