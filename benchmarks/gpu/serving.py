"""How much of the engine's speed reaches a client through Ray Serve and HTTP, and at what latency?

First the engine alone in a process of its own, then the application as a user starts it, `python -m deployments`, loaded
through the openai client by processes of their own: the same prompts, slots and closed loop of requests, all greedy. The
share is the client's tokens per second over the engine's, which is its ceiling; the share of decoding leaves out the time
to the first token. Checked along the way: every token
arrives, prompts are answered alike whenever they are sent, and as the engine alone answers them. Not measured: an open
loop of arrivals, a network, several executors. Where the model has a hash function, the server predicts and prefetches,
and the engine alone does not.

    python -m benchmarks.gpu.serving [--model /dev/shm/model --slots all --object-store-gb 26] [--out serving.json]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import conditions
from benchmarks.engine import read_prompts
from benchmarks.gpu.application import Application, exit_on_sigterm
from benchmarks.gpu.closed_loop import (
    Answer,
    Plan,
    expert_usage,
    figures,
    percentiles_ms,
    plan_streams,
    share,
    token_checks,
)
from benchmarks.gpu.engine_speed import WARM_UP_TOKENS, measure_engine
from benchmarks.gpu.load_client import LoadClients
from benchmarks.gpu.processes import cores_used
from common.config import REFERENCE_MODEL

MIN_PROMPTS = 8  # different ones, and no fewer than run at once: equal ones would share their experts
PREFILL_CHUNK_TOKENS = 512

Row = dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    exit_on_sigterm()
    prompts = read_prompts(arguments, max(MIN_PROMPTS, *arguments.concurrency))
    plans = {
        concurrency: plan_streams(concurrency, arguments.requests, max(MIN_PROMPTS, concurrency))
        for concurrency in arguments.concurrency
    }
    settings = serving_settings(arguments, max(arguments.concurrency))
    engine_answers = measure_engine(
        settings, prompts, list(plans.values()), arguments.new_tokens, arguments.engine_timeout_s
    )
    record: dict[str, Any] = {
        "benchmark": "gpu_serving",
        "conditions": conditions(**vars(arguments)),
        "results": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        log = arguments.log or Path(folder) / "application.log"
        with (
            Application(settings, arguments.object_store_gb, log) as application,
            LoadClients(f"{application.url}/v1", application.model, arguments.client_processes) as clients,
        ):
            record["application_ready_s"] = round(application.ready_s, 1)
            record["slots_per_layer"] = application.get("/v1/experts")["executors"][0]["slots_per_layer"]
            for plan, alone in zip(plans.values(), engine_answers, strict=True):
                row = measure_level(application, clients, plan, prompts, arguments.new_tokens, alone)
                record["results"].append(row)
                if arguments.out is not None:  # a run that ends early keeps what it has
                    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot is not None:
        plot(record["results"], arguments.plot)
    print(json.dumps(record))


def serving_settings(arguments: argparse.Namespace, max_batch_size: int) -> dict[str, str]:
    """The configuration of both sides. Prompts fit into chunks as a whole, so that each is always computed alike."""
    prompt_tokens = arguments.prompt_tokens
    return {
        "model": str(arguments.model),
        "device": arguments.device,
        "expert_slots": arguments.slots,
        "max_batch_size": str(max_batch_size),
        "max_context_tokens": str(prompt_tokens + arguments.new_tokens),
        "prefill_chunk_tokens": str(max(1, PREFILL_CHUNK_TOKENS // prompt_tokens) * prompt_tokens),
    }


def measure_level(
    application: Application,
    clients: LoadClients,
    plan: Plan,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    alone: Sequence[Answer],
) -> Row:
    """One concurrency, beside what the engine alone did under the same plan."""
    clients.run([stream[:1] for stream in plan], prompts, WARM_UP_TOKENS)
    before, started = application.processes(), time.perf_counter()
    answers = clients.run(plan, prompts, new_tokens)
    seconds = time.perf_counter() - started
    cores = cores_used(before, application.processes(), seconds)
    served, engine = figures(answers), figures(alone)
    row: Row = {
        "concurrency": len(plan),
        **shares(served, engine),
        "served": {**served, **token_checks(answers, new_tokens, alone), "experts": expert_usage(answers)},
        "engine": {**engine, **token_checks(alone, new_tokens), "experts": expert_usage(alone)},
        "added_ttft_ms": added_ttft_ms(answers, alone),
        "cores": cores,
        "errors": sorted({answer.error for answer in answers if answer.error is not None}),
    }
    for side in ("engine", "served"):
        print(f"{side} at {len(plan)}: {row[side]}", flush=True)
    print(f"share at {len(plan)}: {row['share']}, decoding {row['decode_share']}  cores: {cores}", flush=True)
    return row


def shares(served: Row, engine: Row) -> Row:
    """What reaches the client of the engine's speed, over the whole loop and between tokens; 0 if nothing does."""
    if "tokens_per_s" not in served:
        return {"share": 0.0, "decode_share": 0.0}
    between = engine["inter_token_ms"]["mean"], served["inter_token_ms"]["mean"]
    return {"share": share(served["tokens_per_s"], engine["tokens_per_s"]), "decode_share": share(*between)}


def added_ttft_ms(served: Sequence[Answer], alone: Sequence[Answer]) -> dict[str, float]:
    """How much later the first token comes, percentile by percentile."""
    ours, engines = (
        percentiles_ms(a.arrivals_s[0] - a.started_s for a in answers if a.arrivals_s)
        for answers in (served, alone)
    )
    return {rank: round(ours[rank] - engines[rank], 3) for rank in ours}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Tokens per second of the engine alone and at the client, by concurrency."""
    from matplotlib import pyplot as plt  # only who plots needs it

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for offset, side, label in (
        (-0.2, "engine", "engine alone"),
        (0.2, "served", "client, through Ray Serve"),
    ):
        places = [index + offset for index in range(len(rows))]
        axes.bar(places, [row[side].get("tokens_per_s", 0.0) for row in rows], 0.4, label=label)
    for index, row in enumerate(rows):
        height = row["served"].get("tokens_per_s", 0.0)
        axes.annotate(f"{row['share']:.0%}", (index + 0.2, height), ha="center", va="bottom")
    axes.set_xticks(range(len(rows)), [str(row["concurrency"]) for row in rows])
    axes.set_xlabel("concurrent requests")
    axes.set_ylabel("tokens per second")
    axes.legend()
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REFERENCE_MODEL)
    parser.add_argument("--text", type=Path, default=REFERENCE_MODEL / "heldout.txt", help="of the prompts")
    parser.add_argument("--slots", default="50%")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, default=16, help="per concurrency, and 3 per stream at least")
    parser.add_argument("--client-processes", type=int, default=4)
    parser.add_argument("--object-store-gb", type=float, default=0.5, help="experts may fill 80 %% of it")
    parser.add_argument("--engine-timeout-s", type=float, default=300.0)
    parser.add_argument("--log", type=Path, help="keep what the application prints")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
