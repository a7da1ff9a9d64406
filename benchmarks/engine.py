"""How many tokens per second does the engine generate with few slots, beside the library with every expert in place?

Decode and prefill of the engine on one device at several numbers of slots, against the library's `generate()` on the
same prompts, turn by turn in one process, all greedy, with outputs compared token for token. Prompts are slices of
held-out text, so routing is the model's own. The bytes moved stand beside, and the rate of a plain copy into a slot. Not
measured: HTTP, Ray, the hash function (experts are paged on demand).

    python -m benchmarks.engine [--model models/reference] [--slots 25% 50% 100%] [--batch 1 8] [--out results.json]
"""

import argparse
import json
import queue
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.executor.build import build_engine
from actors.executor.engine import Engine
from actors.executor.expert_source import CheckpointExpertSource
from benchmarks.conditions import conditions
from common.checkpoint import Checkpoint
from common.config import REFERENCE_MODEL, ServingConfig
from common.generation import GenerationChunk, GenerationRequest, SamplingParams
from common.tokenizer import load_tokenizer

Prompts = list[list[int]]


class Collector:
    """A chunk sink that keeps token ids and the time of each."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.times: list[float] = []
        self._done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def put(self, chunk: GenerationChunk) -> None:
        self.token_ids.extend(chunk.token_ids)
        self.times.append(time.perf_counter())
        if chunk.finish_reason is not None:
            self._done.put(None)

    def fail(self, error: Exception) -> None:
        self._done.put(error)

    def wait(self) -> None:
        if (error := self._done.get()) is not None:
            raise error


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    checkpoint = Checkpoint.open(arguments.model)
    prompts = read_prompts(arguments, max(arguments.batch))
    source = CheckpointExpertSource(checkpoint)
    subjects: list[Subject] = [LibrarySubject(arguments)]
    subjects += [EngineSubject(arguments, source, slots) for slots in arguments.slots]
    results = [
        report(row)
        for batch in arguments.batch
        for row in measure(subjects, prompts[:batch], arguments.new_tokens, arguments.runs)
    ]
    for subject in subjects:
        subject.close()
    summary = {
        "benchmark": "engine",
        "conditions": conditions(**vars(arguments)),
        "copy_gb_per_s": round(copy_rate(checkpoint), 2),
        "results": results,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))


def measure(
    subjects: Sequence["Subject"], prompts: Prompts, new_tokens: int, num_rounds: int
) -> list[dict[str, Any]]:
    """Rounds in which every subject takes its turn, so that what else the machine does hits all alike.

    Returns:
        A row for each subject. `of_library` and `of_last` are medians over the rounds of its speed at decoding over that
        of the first and the last subject in the same round.
    """
    for subject in subjects:
        subject.run(prompts, 4)
        subject.begin()
    rounds = [[subject.run(prompts, new_tokens) for subject in subjects] for _ in range(num_rounds)]
    rows = []
    for subject, runs in zip(subjects, zip(*rounds, strict=True), strict=True):
        step_ms = sorted(1e3 * run.decode_s / (new_tokens - 1) for run in runs)
        row = {
            **subject.labels,
            "batch": len(prompts),
            "tokens_per_s": round(len(prompts) * 1e3 / statistics.median(step_ms), 1),
            "step_ms": round(statistics.median(step_ms), 2),
            "step_ms_min_max": [round(step_ms[0], 2), round(step_ms[-1], 2)],
            "prefill_ms": round(1e3 * statistics.median(run.prefill_s for run in runs), 1),
        }
        for name, other in (("of_library", 0), ("of_last", -1)):
            ratios = [each[other].decode_s / run.decode_s for each, run in zip(rounds, runs, strict=True)]
            row[name] = round(statistics.median(ratios), 3)
        identical = all(run.tokens == each[0].tokens for each, run in zip(rounds, runs, strict=True))
        rows.append({**row, "identical_to_library": identical, **subject.counts(num_rounds)})
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REFERENCE_MODEL)
    parser.add_argument("--text", type=Path, default=REFERENCE_MODEL / "heldout.txt")
    parser.add_argument("--slots", nargs="+", default=["25%", "50%", "100%"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=max(1, torch.get_num_threads() // 2))  # as served
    parser.add_argument("--out", type=Path)
    arguments: argparse.Namespace = parser.parse_args()
    return arguments


def read_prompts(arguments: argparse.Namespace, count: int) -> Prompts:
    tokenizer = load_tokenizer(arguments.model)
    assert tokenizer is not None, "the benchmark reads text"
    ids = tokenizer(arguments.text.read_text(encoding="utf-8"))["input_ids"]
    step = (len(ids) - arguments.prompt_tokens) // count
    return [ids[start : start + arguments.prompt_tokens] for start in range(0, step * count, step)]


@dataclass(frozen=True)
class Run:
    tokens: Prompts  # generated
    prefill_s: float
    decode_s: float  # from the first token to the last


class Subject(Protocol):
    """What is measured."""

    labels: dict[str, Any]

    def run(self, prompts: Prompts, new_tokens: int) -> Run: ...

    def begin(self) -> None:
        """What is counted begins here."""

    def counts(self, num_runs: int) -> dict[str, Any]: ...

    def close(self) -> None: ...


class LibrarySubject:
    """`generate()` with every expert in place, on a thread of its own, as the engine has one."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.labels = {"what": "library generate()", "slots": "all"}
        dtype = torch.float32 if arguments.device == "cpu" and arguments.dtype == "auto" else arguments.dtype
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=dtype, experts_implementation="grouped_mm"
        )
        self._model: PreTrainedModel = model.to(arguments.device).eval()
        self._thread = ThreadPoolExecutor(1)

    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        first_s, _ = self._generate(prompts, 1)
        seconds, tokens = self._generate(prompts, new_tokens)
        return Run(tokens, first_s, seconds - first_s)

    def _generate(self, prompts: Prompts, new_tokens: int) -> tuple[float, Prompts]:
        inputs = torch.tensor(prompts, device=self._model.device)
        started = time.perf_counter()
        output = self._thread.submit(
            self._model.generate,
            inputs, attention_mask=torch.ones_like(inputs), do_sample=False, pad_token_id=0,
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=None,
        ).result()  # fmt: skip
        tokens: Prompts = output[:, inputs.shape[1] :].tolist()
        return time.perf_counter() - started, tokens

    def begin(self) -> None:
        pass

    def counts(self, num_runs: int) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._thread.shutdown()


class EngineSubject:
    def __init__(self, arguments: argparse.Namespace, source: CheckpointExpertSource, slots: str) -> None:
        self.labels = {"what": "engine", "slots": slots}
        config = ServingConfig.from_args(
            {
                "model": str(arguments.model), "expert_slots": slots, "device": arguments.device,
                "dtype": arguments.dtype, "max_batch_size": max(arguments.batch), "max_queued_requests": 64,
                "max_context_tokens": arguments.prompt_tokens + arguments.new_tokens,
            },
            {},
        )  # fmt: skip
        self._engine = build_engine(config, source)
        self._engine.start()
        self.begin()

    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        started = time.perf_counter()
        collectors = generate(self._engine, prompts, new_tokens)
        first = max(collector.times[0] for collector in collectors)
        last = max(collector.times[-1] for collector in collectors)
        return Run([collector.token_ids for collector in collectors], first - started, last - first)

    def begin(self) -> None:
        self._before = self._engine.report()

    def counts(self, num_runs: int) -> dict[str, Any]:
        after = self._engine.report()
        hits, misses, moved_bytes = (
            sum(getattr(layer, name) for layer in after.layers)
            - sum(getattr(layer, name) for layer in self._before.layers)
            for name in ("hits", "misses", "moved_bytes")
        )
        return {
            "slots_per_layer": after.slots_per_layer,
            "hit_rate": round(hits / (hits + misses), 4),
            "moved_mb_per_run": round(moved_bytes / 1e6 / num_runs, 1),
        }

    def close(self) -> None:
        self._engine.stop()


def generate(engine: Engine, prompts: Prompts, new_tokens: int) -> list[Collector]:
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    collectors = []
    for index, prompt in enumerate(prompts):
        collectors.append(Collector())
        engine.submit(GenerationRequest(f"r{index}", tuple(prompt), sampling), collectors[-1])
    for collector in collectors:
        collector.wait()
    return collectors


def report(row: dict[str, Any]) -> dict[str, Any]:
    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return row


def copy_rate(checkpoint: Checkpoint) -> float:
    """GB/s of copying expert-sized slabs on the host, the limit of paging on a CPU."""
    slabs = torch.ones(64, checkpoint.stored_layout.slab_bytes, dtype=torch.uint8)
    target = torch.empty_like(slabs)
    started = time.perf_counter()
    for _ in range(5):
        for slab, slot in zip(slabs, target, strict=True):
            slot.copy_(slab)
    return 5 * slabs.nbytes / (time.perf_counter() - started) / 1e9


if __name__ == "__main__":
    main()
