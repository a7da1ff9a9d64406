"""How many tokens per second does the engine generate with few slots, beside the library with every expert in place?

Decode and prefill of the engine on one device at several numbers of slots, against the library's `generate()` on the
same prompts in the same run, all greedy, with outputs compared token for token. Prompts are slices of held-out text,
so routing is the model's own. Beside each time stands what the missed experts alone would take: bytes moved over the
rate of a plain copy into a slot. Not measured: HTTP, Ray, the hash function (experts are paged on demand).

    python -m benchmarks.engine [--model models/reference] [--slots 25% 50% 100%] [--batch 1 8] [--out results.json]
"""

import argparse
import json
import queue
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
    results: list[dict[str, Any]] = []
    expected = {}
    library = load_library_model(arguments)
    for batch in arguments.batch:
        # OpenMP keeps threads for every thread that asked for some; more of them than processors slow the engine's down.
        with ThreadPoolExecutor(1) as thread:
            measured = thread.submit(measure_library, library, prompts[:batch], arguments)
        expected[batch], row = measured.result()
        results.append(report({"what": "library generate()", "slots": "all", "batch": batch, **row}))
    del library
    source = CheckpointExpertSource(checkpoint)
    for slots in arguments.slots:
        config = ServingConfig.from_args(
            {
                "model": str(arguments.model), "expert_slots": slots, "device": arguments.device,
                "dtype": arguments.dtype, "max_batch_size": max(arguments.batch), "max_queued_requests": 64,
                "max_context_tokens": arguments.prompt_tokens + arguments.new_tokens,
            },
            {},
        )  # fmt: skip
        engine = build_engine(config, source)
        engine.start()
        for batch in arguments.batch:
            row = measure_engine(engine, prompts[:batch], expected[batch], arguments)
            results.append(report({"what": "engine", "slots": slots, "batch": batch, **row}))
        engine.stop()
    summary = {
        "benchmark": "engine",
        "conditions": conditions(**vars(arguments)),
        "copy_gb_per_s": round(copy_rate(checkpoint), 2),
        "results": results,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))


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


def load_library_model(arguments: argparse.Namespace) -> PreTrainedModel:
    dtype = torch.float32 if arguments.device == "cpu" and arguments.dtype == "auto" else arguments.dtype
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=dtype, experts_implementation="grouped_mm"
    )
    return model.to(arguments.device).eval()


def measure_library(
    model: PreTrainedModel, prompts: Prompts, arguments: argparse.Namespace
) -> tuple[Prompts, dict[str, Any]]:
    inputs = torch.tensor(prompts, device=model.device)

    def generate(new_tokens: int) -> tuple[Prompts, float]:
        started = time.perf_counter()
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=False, pad_token_id=0,
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=None,
        )  # fmt: skip
        tokens = output[:, inputs.shape[1] :].tolist()
        return tokens, time.perf_counter() - started

    generate(4)
    first = statistics.median(generate(1)[1] for _ in range(arguments.runs))
    runs = [generate(arguments.new_tokens) for _ in range(arguments.runs)]
    decode = [seconds - first for _, seconds in runs]
    return runs[0][0], rates(decode, [first], len(prompts), arguments)


def measure_engine(
    engine: Engine, prompts: Prompts, expected: Prompts, arguments: argparse.Namespace
) -> dict[str, Any]:
    prefill, decode, identical = [], [], True
    generate(engine, prompts, 4)
    before = engine.report()
    for _ in range(arguments.runs):
        started = time.perf_counter()
        collectors = generate(engine, prompts, arguments.new_tokens)
        first = max(collector.times[0] for collector in collectors)
        prefill.append(first - started)
        decode.append(max(collector.times[-1] for collector in collectors) - first)
        identical &= [collector.token_ids for collector in collectors] == expected
    after = engine.report()
    needed, missed, moved_bytes = (
        sum(getattr(layer, name) for layer in after.layers)
        - sum(getattr(layer, name) for layer in before.layers)
        for name in ("hits", "misses", "moved_bytes")
    )
    needed += missed
    return {
        **rates(decode, prefill, len(prompts), arguments),
        "identical_to_library": identical,
        "slots_per_layer": after.slots_per_layer,
        "hit_rate": round(1 - missed / needed, 4),
        "moved_mb_per_run": round(moved_bytes / 1e6 / arguments.runs, 1),
    }


def generate(engine: Engine, prompts: Prompts, new_tokens: int) -> list[Collector]:
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    collectors = []
    for index, prompt in enumerate(prompts):
        collectors.append(Collector())
        engine.submit(GenerationRequest(f"r{index}", tuple(prompt), sampling), collectors[-1])
    for collector in collectors:
        collector.wait()
    return collectors


def rates(
    decode_s: list[float], prefill_s: list[float], batch: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    steps = arguments.new_tokens - 1
    step_ms = sorted(1e3 * seconds / steps for seconds in decode_s)
    return {
        "tokens_per_s": round(batch * 1e3 / statistics.median(step_ms), 1),
        "step_ms": round(statistics.median(step_ms), 2),
        "step_ms_min_max": [round(step_ms[0], 2), round(step_ms[-1], 2)],
        "prefill_ms": round(1e3 * statistics.median(prefill_s), 1),
    }


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
