"""What happens to hit rates and times per token when the kind of text changes, with and without request-level tracing?

The engine on the CPU serves requests one by one: first such that continue code, then such that continue docstrings and
comments, both cut from the same held-out files. In the first half of the code's text, every expert's use is counted; the
engine never generates from it. The subjects, each with every policy of `--policy`:

- *none*: on demand.
- *next-gate*, *activation-trace*, *frequency*: that `decode_predictor`. The activation trace begins empty and learns from
  every request that ends; the frequencies are the counted ones, of code, to the end.
- *pinned*: on demand, a quarter of the slots pinned to the experts that code used most.

All generate the same tokens (sampled, seeded by the request's number), turn by turn, so what else the machine does hits all
alike. Hit rates are over prompts and generated tokens, times are medians over requests of the time per generated token.
Printed is also how differently the two kinds route: the total variation distance between their shares of activations,
layer by layer, beside that of two halves of the same kind. Not measured: batches of several requests, gradual shifts.

    python -m benchmarks.workload_shift [--out results.json] [--plot plot.png]
"""

import argparse
import io
import json
import statistics
import time
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.executor.build import build_engine
from actors.executor.engine import Engine
from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.expert_source import CheckpointExpertSource
from actors.expert_store.loads import ExpertLoads
from actors.predictor.decoding import count_activations
from actors.predictor.library_routing import load_resident_model
from actors.predictor.tracing import RoutingTracer
from benchmarks.conditions import conditions
from benchmarks.engine import Collector
from common.checkpoint import Checkpoint
from common.config import REFERENCE_MODEL, ServingConfig
from common.generation import GenerationChunk, GenerationRequest, SamplingParams
from common.tokenizer import load_tokenizer

KINDS = ("code", "prose")  # before and after the shift
# Of the configuration, by subject.
SUBJECTS: dict[str, dict[str, Any]] = {
    "none": {},
    "next-gate": {"decode_predictor": "next-gate"},
    "activation-trace": {"decode_predictor": "activation-trace"},
    "frequency": {"decode_predictor": "frequency", "pinned_experts": 0},
    "pinned": {},
}
END_OF_DOCUMENT = "<|endoftext|>"
TRACED_WINDOW_TOKENS, TRACED_WINDOWS = 64, 64

Counts = NDArray[np.int64]  # [..., layers, experts]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REFERENCE_MODEL)
    parser.add_argument("--text", type=Path, default=REFERENCE_MODEL / "heldout.txt", help="Python sources")
    parser.add_argument("--slots", default="25%")
    parser.add_argument("--subject", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--policy", nargs="+", default=["lfu", "activation"], choices=list(EVICTION_POLICIES))
    parser.add_argument("--requests", type=int, default=24, help="of each kind")
    parser.add_argument("--window", type=int, default=6, help="requests that are reported together")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG")
    parsed = parser.parse_args(arguments)
    if parsed.requests % parsed.window:
        parser.error("--requests: give a multiple of --window, so that no window lies across the shift")
    return parsed


def split_kinds(text: str) -> dict[str, str]:
    """Python sources, parted by END_OF_DOCUMENT, as docstrings and comments on lines of their own, and as the rest."""
    parts: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for document in text.split(END_OF_DOCUMENT):
        lines = document.splitlines(keepends=True)
        prose = _prose_lines(document)
        for number, line in enumerate(lines, start=1):
            parts["prose" if number in prose else "code"].append(line)
    return {kind: "".join(lines) for kind, lines in parts.items()}


def _prose_lines(source: str) -> set[int]:
    """Numbers from 1 of the lines of docstrings, and of comments that have a line of their own."""
    found: set[int] = set()
    begins_line = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and token.string.lstrip("rRuU").startswith(
            ('"""', "'''")
        )
        if begins_line and (is_docstring or token.type == tokenize.COMMENT):
            found.update(range(token.start[0], token.end[0] + 1))
        begins_line = token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    return found


@dataclass(frozen=True)
class Kind:
    """Text of one kind, in tokens."""

    traced: Sequence[Sequence[int]]  # windows to count experts in
    prompts: Sequence[Sequence[int]]  # of the other half

    @classmethod
    def of(cls, token_ids: Sequence[int], requests: int, prompt_tokens: int) -> "Kind":
        half = len(token_ids) // 2
        return cls(
            _windows(token_ids[:half], TRACED_WINDOWS, TRACED_WINDOW_TOKENS),
            _windows(token_ids[half:], requests, prompt_tokens),
        )


def _windows(token_ids: Sequence[int], count: int, length: int) -> list[Sequence[int]]:
    step = (len(token_ids) - length) // max(1, count - 1)
    return [token_ids[start : start + length] for start in range(0, step * count, step)][:count]


def count_experts(model: Path, windows: Sequence[Sequence[int]]) -> Counts:
    """[2, layers, experts]: of each half of the windows, every second one."""
    resident = load_resident_model(model, torch.device("cpu"), torch.float32)
    tracer = RoutingTracer(resident, model, num_kept=1)
    num_experts = Checkpoint.open(model).architecture.num_experts
    counts = []
    for half in (windows[::2], windows[1::2]):
        token_ids = torch.tensor(half)
        batch = tracer.trace(token_ids, torch.ones_like(token_ids, dtype=torch.bool))
        counts.append(count_activations(batch.expert_ids.flatten(0, 1).numpy(), num_experts))
    return np.stack(counts)


def distances(first: Counts, second: Counts) -> list[float]:
    """Total variation between shares of activations, of each layer: 0 the same, 1 no expert in common.

    Args: first, second: [layers, experts].
    """
    shares = [counts / counts.sum(axis=1, keepdims=True) for counts in (first, second)]
    return [round(float(each), 3) for each in np.abs(shares[0] - shares[1]).sum(axis=1) / 2]


class Client(Collector):
    """Keeps what the last chunk tells, too."""

    last: GenerationChunk

    def put(self, chunk: GenerationChunk) -> None:
        self.last = chunk
        super().put(chunk)


@dataclass(frozen=True)
class Served:
    """One request."""

    token_ids: list[int]
    needed: int
    missed: int
    ms_per_token: float


def serve(engine: Engine, number: int, prompt: Sequence[int], new_tokens: int) -> Served:
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.8, seed=number, ignore_eos=True)
    client = Client()
    engine.submit(GenerationRequest(f"request {number}", tuple(prompt), sampling), client)
    client.wait()
    experts, timings = client.last.experts, client.last.timings
    assert experts is not None
    assert timings is not None
    ms_per_token = 1e3 * timings.decode_s / (new_tokens - 1)
    return Served(client.token_ids, experts.needed, experts.missed, ms_per_token)


def new_engine(
    arguments: argparse.Namespace, source: CheckpointExpertSource, subject: str, policy: str, loads: Path
) -> Engine:
    settings = {
        "model": str(arguments.model), "device": "cpu", "expert_slots": arguments.slots, "eviction": policy,
        "prefetch": False, "max_batch_size": 1, **SUBJECTS[subject],
        "max_context_tokens": arguments.prompt_tokens + arguments.new_tokens,
    }  # fmt: skip
    if subject in ("frequency", "pinned"):
        settings["resident_set"] = str(loads)
    engine = build_engine(ServingConfig.from_args(settings, {}), source)
    engine.start()
    return engine


def measure(arguments: argparse.Namespace, kinds: dict[str, Kind], counts: Counts) -> list[dict[str, Any]]:
    """Every subject with every policy, request by request.

    Args: counts: [layers, experts], of the kind before the shift.
    """
    checkpoint = Checkpoint.open(arguments.model)
    source = CheckpointExpertSource(checkpoint)
    prompts = [(kind, prompt) for kind in KINDS for prompt in kinds[kind].prompts]
    with TemporaryDirectory() as folder:
        loads = Path(folder) / "loads"
        ExpertLoads(checkpoint.fingerprint, counts[None]).save(loads)
        engines = {
            (subject, policy): new_engine(arguments, source, subject, policy, loads)
            for policy in arguments.policy
            for subject in arguments.subject
        }
    served: dict[tuple[str, str], list[Served]] = {key: [] for key in engines}
    for number, (_, prompt) in enumerate(prompts):
        for key, engine in engines.items():
            served[key].append(serve(engine, number, prompt, arguments.new_tokens))
        tokens = [each[-1].token_ids for each in served.values()]
        assert all(token_ids == tokens[0] for token_ids in tokens), "no subject changes a token"
    rows = []
    for (subject, policy), engine in engines.items():
        engine.stop()
        results = served[subject, policy]
        for start in range(0, len(results), arguments.window):
            window = results[start : start + arguments.window]
            rows.append(report(subject, policy, prompts[start][0], start, window))
    return rows


def report(
    subject: str, policy: str, kind: str, first_request: int, window: Sequence[Served]
) -> dict[str, Any]:
    needed = sum(each.needed for each in window)
    return {
        "subject": subject,
        "policy": policy,
        "kind": kind,
        "first_request": first_request,
        "hit_rate": round(1 - sum(each.missed for each in window) / needed, 4),
        "ms_per_token": round(statistics.median(each.ms_per_token for each in window), 2),
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    starts = sorted({row["first_request"] for row in rows})
    kinds = {row["first_request"]: row["kind"] for row in rows}
    print(f"{'hit rate, ms per token':<28}" + "".join(f"{f'{kinds[s]} {s}':>14}" for s in starts))
    for subject, policy in dict.fromkeys((row["subject"], row["policy"]) for row in rows):
        own = [row for row in rows if (row["subject"], row["policy"]) == (subject, policy)]
        cells = (f"{row['hit_rate']:.3f} {row['ms_per_token']:.1f}" for row in own)
        print(f"{f'{subject}, {policy}':<28}" + "".join(f"{cell:>14}" for cell in cells))


def plot(rows: Sequence[dict[str, Any]], requests: int, path: Path) -> None:
    """Hit rates above, times below, a column for each policy. Args: requests: before the shift."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    policies = list(dict.fromkeys(row["policy"] for row in rows))
    size = (5 * len(policies), 6)
    figure, axes = plt.subplots(
        2, len(policies), figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for column, policy in enumerate(policies):
        for line, (key, label) in enumerate((("hit_rate", "hit rate"), ("ms_per_token", "ms per token"))):
            axis = axes[line][column]
            for subject in dict.fromkeys(row["subject"] for row in rows):
                own = [row for row in rows if (row["subject"], row["policy"]) == (subject, policy)]
                starts, values = [row["first_request"] for row in own], [row[key] for row in own]
                axis.plot(starts, values, marker="o", label=subject)
            axis.axvline(requests, linestyle="--", color="black")
            axis.set_ylabel(label if column == 0 else "")
            axis.grid(alpha=0.3)
        axes[0][column].set_title(policy)
        axes[1][column].set_xlabel(f"first request of the window; from {requests} on {KINDS[1]}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    arguments, started = parse_arguments(), time.perf_counter()
    torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(arguments.model)
    assert tokenizer is not None, "the benchmark reads text"
    texts = split_kinds(arguments.text.read_text(encoding="utf-8"))
    kinds = {
        kind: Kind.of(
            tokenizer(text, verbose=False)["input_ids"], arguments.requests, arguments.prompt_tokens
        )
        for kind, text in texts.items()
    }
    halves = {kind: count_experts(arguments.model, kinds[kind].traced) for kind in KINDS}
    routing = {
        "between the kinds": distances(*(halves[kind].sum(axis=0) for kind in KINDS)),
        **{f"between halves of {kind}": distances(*halves[kind]) for kind in KINDS},
    }
    for name, values in routing.items():
        print(f"distance {name}, by layer: {values}")
    rows = measure(arguments, kinds, halves[KINDS[0]].sum(axis=0))
    print_table(rows)
    record = {
        "benchmark": "workload_shift",
        "distances": routing,
        "results": rows,
        "seconds": round(time.perf_counter() - started, 1),
        "conditions": conditions(**vars(arguments)),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(rows, arguments.requests, arguments.plot)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
