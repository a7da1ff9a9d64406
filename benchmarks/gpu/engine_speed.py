"""The engine alone under a closed loop of requests, without Ray and HTTP: what a served engine is measured against.

A job comes in as JSON on stdin, the answers go out as the last line of stdout. A process of its own, because its GPU
memory is only free again when it ends. Texts are decoded as in the server; experts are read from the checkpoint into this
process' own memory.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from actors.executor.build import build_engine
from actors.executor.engine import Engine
from actors.executor.expert_source import CheckpointExpertSource
from benchmarks.gpu.closed_loop import Answer, Plan
from common.checkpoint import Checkpoint
from common.config import ServingConfig
from common.generation import GenerationChunk, GenerationRequest, SamplingParams

WARM_UP_TOKENS = 4


class AnswerSink:
    """Turns a request's chunks into an answer."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()

    def put(self, chunk: GenerationChunk) -> None:
        answer = self._answer
        answer.arrivals_s += [time.perf_counter()] * len(chunk.token_ids)
        answer.text += chunk.text
        answer.completion_tokens += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            answer.experts = asdict(chunk.experts) if chunk.experts is not None else {}
            self._done.put(None)

    def fail(self, error: Exception) -> None:
        self._answer.error = f"{type(error).__name__}: {error}"
        self._done.put(None)

    def wait(self) -> None:
        self._done.get()


def measure_engine(
    settings: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    plans: Sequence[Plan],
    new_tokens: int,
    timeout_s: float,
) -> list[list[Answer]]:
    """The answers to each plan, from a new process that has ended when this returns.

    Args:
        settings: of the configuration.
    Raises:
        RuntimeError, subprocess.TimeoutExpired: the process failed; what it says is on stderr.
    """
    job = {"settings": dict(settings), "prompts": prompts, "plans": plans, "new_tokens": new_tokens}
    command = [sys.executable, "-m", "benchmarks.gpu.engine_speed"]
    finished = subprocess.run(
        command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=False
    )
    if finished.returncode:
        raise RuntimeError(f"the engine's process ended with status {finished.returncode}")
    levels = json.loads(finished.stdout.splitlines()[-1])
    return [[Answer(**answer) for answer in answers] for answers in levels]


def run_plan(engine: Engine, prompts: Sequence[Sequence[int]], plan: Plan, new_tokens: int) -> list[Answer]:
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    answers: list[list[Answer]] = [[] for _ in plan]

    def run_stream(stream: int) -> None:
        for number in plan[stream]:
            answer = Answer(number, time.perf_counter())
            answers[stream].append(answer)
            sink = AnswerSink(answer)
            request_id = f"{stream}-{len(answers[stream])}"
            engine.submit(GenerationRequest(request_id, tuple(prompts[number]), sampling), sink)
            sink.wait()

    threads = [threading.Thread(target=run_stream, args=(stream,)) for stream in range(len(plan))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answer for stream in answers for answer in stream]


def main() -> None:
    job = json.load(sys.stdin)
    config = ServingConfig.from_args(job["settings"], environ={})
    if config.device == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))  # as the served executor does
    engine = build_engine(config, CheckpointExpertSource(Checkpoint.open(config.model)))
    engine.start()
    levels = []
    for plan in job["plans"]:
        run_plan(engine, job["prompts"], [stream[:1] for stream in plan], WARM_UP_TOKENS)
        levels.append(run_plan(engine, job["prompts"], plan, job["new_tokens"]))
    engine.stop()
    print(json.dumps([[asdict(answer) for answer in answers] for answers in levels]))


if __name__ == "__main__":
    main()
