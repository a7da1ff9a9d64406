"""Does the engine stay right and stay small over thousands of decode steps with requests that come, go and give up?

Requests of random lengths and sampling parameters join and leave one engine, without Ray; some are cancelled while they
wait, in their prompt or between two tokens. Every so many steps the engine runs empty and is looked over: page tables
agree with themselves and slots hold the experts they name, no cache row is lost, memory is flat. At the end requests
that were part of changing batches run again alone; greedy and seeded ones must give the same tokens. Prompts are computed
whole, so that each is always computed alike. Not measured: speed; the steps of the look-overs run small batches.

    python -m benchmarks.gpu.soak --model learned --slots 25% [--steps 20000] [--out soak.json]
"""

import argparse
import json
import queue
import random
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.executor.build import build_engine
from actors.executor.decoder import Decoder, Drawn, PendingStep
from actors.executor.engine import Engine
from actors.executor.expert_source import CheckpointExpertSource
from actors.executor.pager import Pager
from actors.executor.sequence import Sequence as EngineSequence
from benchmarks.conditions import conditions
from benchmarks.gpu.page_checks import broken_page_tables, wrong_slots
from benchmarks.gpu.processes import Memory
from benchmarks.gpu.soak_requests import Client, Requests
from common.checkpoint import Checkpoint
from common.config import REFERENCE_MODEL, ServingConfig
from common.errors import QueueFullError

ANSWER_S = 120.0  # for the slowest answer
FLAT_DEVICE_BYTES = 1 << 20
FLAT_HOST_BYTES = 32 << 20  # pieces of it that the allocators keep; a leak of 2 KB per step shows in 20 000


class CountedDecoder:
    """The engine's own decoder, its steps counted."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self.runs_ahead = decoder, decoder.runs_ahead
        self.num_steps = 0
        self.batch_sizes: Counter[int] = Counter()

    def first(self, sequences: Sequence[EngineSequence], logits: Tensor) -> Sequence[Drawn]:
        return self._decoder.first(sequences, logits)

    def launch(self, batch: Sequence[EngineSequence]) -> PendingStep:
        self.num_steps += 1
        self.batch_sizes[len(batch)] += 1
        return self._decoder.launch(batch)

    def idle(self) -> None:
        self._decoder.idle()


class Soak:
    """One engine under load, and what is held against it."""

    def __init__(self, engine: Engine, requests: Requests, arguments: argparse.Namespace) -> None:
        self._engine, self._requests, self._arguments = engine, requests, arguments
        # The engine has no public way to its parts, and a soak looks at them only while it is idle.
        self.decoder = CountedDecoder(engine._decoder)
        engine._decoder = self.decoder
        self._pager: Pager = engine._pager
        self._random = random.Random(arguments.seed + 1)
        self._news: queue.SimpleQueue[Client] = queue.SimpleQueue()
        self._running: dict[str, Client] = {}
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.kept: list[Client] = []  # finished ones to run again
        self.memory: list[dict[str, int]] = []  # at every look-over

    def run(self) -> None:
        arguments, started = self._arguments, time.monotonic()
        next_check = arguments.check_every
        while self.decoder.num_steps < arguments.steps and time.monotonic() - started < arguments.limit_s:
            # As many as may run and wait, and sometimes more, which are refused.
            self._load(self._random.randint(0, 2 * arguments.max_batch + 2))
            if self.decoder.num_steps >= next_check:
                self.look_over()
                next_check = self.decoder.num_steps + arguments.check_every

    def _load(self, target: int) -> None:
        """Have `target` requests under way, then wait for news of some of them."""
        for _ in range(target - len(self._running)):
            self._submit()
        for _ in range(self._random.randint(1, 1 + len(self._running)) if self._running else 0):
            if not self._await_news():
                return

    def _submit(self) -> None:
        client = self._requests.next(self._news)
        try:
            self._engine.submit(client.request, client)
        except QueueFullError:
            self.outcomes["refused"] += 1
            return
        self._running[client.request.request_id] = client
        if client.cancel_after == 0:
            self._cancel(client)

    def _await_news(self) -> bool:
        """Returns: whether any request is still to be heard of."""
        if not self._running:
            return False
        try:
            client = self._news.get(timeout=ANSWER_S)
        except queue.Empty:
            self.problems.append(f"no answer in {ANSWER_S} s: {sorted(self._running)}")
            self._running.clear()
            return False
        if client.state == "running":
            self._cancel(client)
        elif client.request.request_id in self._running:
            self._finish(client)
        return bool(self._running)

    def _cancel(self, client: Client) -> None:
        self._engine.cancel(client.request.request_id)
        if self._running.pop(client.request.request_id, None) is not None:
            self.outcomes["cancelled"] += 1

    def _finish(self, client: Client) -> None:
        del self._running[client.request.request_id]
        self.outcomes[client.state] += 1
        request_id, sampling = client.request.request_id, client.request.sampling
        if client.error is not None:
            self.problems.append(f"{request_id} failed: {client.error}")
        elif sampling.ignore_eos and len(client.token_ids) != sampling.max_tokens:
            self.problems.append(f"{request_id}: {len(client.token_ids)} of {sampling.max_tokens} tokens")
        elif client.is_repeatable:
            self._keep(client)

    def _keep(self, client: Client) -> None:
        """A sample of all so far, each as likely as the others."""
        self.outcomes["repeatable"] += 1
        if len(self.kept) < self._arguments.repeats:
            self.kept.append(client)
        elif (place := self._random.randrange(self.outcomes["repeatable"])) < len(self.kept):
            self.kept[place] = client

    def look_over(self) -> None:
        """Let the engine run empty, then check what must hold of an idle one."""
        while self._await_news():
            pass
        if not self._is_idle():
            self.problems.append(f"the engine is not idle: {self._engine.report()}")
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.problems += [f"step {self.decoder.num_steps}: {text}" for text in self._broken_invariants()]
        device_bytes = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        self.memory.append(
            {
                "step": self.decoder.num_steps,
                "device_bytes": device_bytes,
                "anonymous_bytes": Memory.read_own().anonymous,
            }
        )
        print(
            {**self.memory[-1], "outcomes": dict(self.outcomes), "problems": len(self.problems)}, flush=True
        )

    def _is_idle(self) -> bool:
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            report = self._engine.report()
            if report.num_running == report.num_waiting == 0:
                time.sleep(0.05)  # it is about to give the last row back
                return True
            time.sleep(0.01)
        return False

    def _broken_invariants(self) -> Iterator[str]:
        if sorted(self._engine._free_rows) != list(range(self._arguments.max_batch)):
            yield f"free cache rows: {sorted(self._engine._free_rows)}"
        yield from broken_page_tables(self._pager)
        yield from wrong_slots(self._pager, self._random)

    def repeat(self) -> dict[str, int]:
        """Run the kept requests again, one at a time."""
        counts = Counter(greedy=0, greedy_differ=0, seeded=0, seeded_differ=0)
        for client in self.kept:
            again = Client(client.request, self._news)
            self._engine.submit(again.request, again)
            while self._news.get(timeout=ANSWER_S) is not again:
                pass  # late news of one that was cancelled
            kind = "greedy" if client.request.sampling.temperature == 0 else "seeded"
            counts[kind] += 1
            counts[f"{kind}_differ"] += again.token_ids != client.token_ids
        return dict(counts)


def memory_verdict(memory: Sequence[dict[str, int]]) -> dict[str, Any]:
    """The first look-over, a warm-up, against the last."""
    first, last = memory[0], memory[-1]
    device = last["device_bytes"] - first["device_bytes"]
    host = last["anonymous_bytes"] - first["anonymous_bytes"]
    return {
        "device_grown_bytes": device,
        "host_grown_bytes": host,
        "is_flat": device <= FLAT_DEVICE_BYTES and host <= FLAT_HOST_BYTES,
    }


def main() -> None:
    arguments = parse_arguments()
    checkpoint = Checkpoint.open(arguments.model)
    if arguments.device == "cpu":
        torch.set_num_threads(1)  # on more, BLAS gives a row other bits in another batch
    settings = {
        "model": str(arguments.model),
        "expert_slots": arguments.slots,
        "device": arguments.device,
        "max_batch_size": arguments.max_batch,
        "max_queued_requests": arguments.max_batch,
        "max_context_tokens": arguments.max_prompt + arguments.max_new,
        "prefill_chunk_tokens": arguments.max_prompt * arguments.max_batch,
        "eviction": arguments.eviction,
    }
    config = ServingConfig.from_args(settings, environ={})
    source = CheckpointExpertSource(checkpoint)
    source.local_slabs()  # now, not bit by bit, which would look like a leak
    engine = build_engine(config, source)
    soak = Soak(
        engine,
        Requests(arguments.seed, checkpoint.architecture.vocab_size, arguments.max_prompt, arguments.max_new),
        arguments,
    )
    engine.start()
    started = time.perf_counter()
    try:
        soak.run()
        soak.look_over()
        steps, batch_sizes = soak.decoder.num_steps, sorted(soak.decoder.batch_sizes.items())
        repeated = soak.repeat()
    finally:
        engine.stop()
    verdict = memory_verdict(soak.memory)
    record = {
        "benchmark": "gpu_soak",
        "conditions": conditions(**vars(arguments)),
        "ok": not soak.problems and not repeated["greedy_differ"] and verdict["is_flat"],
        "steps": steps,
        "seconds": round(time.perf_counter() - started, 1),
        "pager": type(soak._pager).__name__,
        "batch_sizes": dict(batch_sizes),
        "requests": dict(soak.outcomes),
        "repeated_alone": repeated,
        "look_overs": len(soak.memory),
        "memory": {
            **verdict,
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            "series": soak.memory,
        },
        "problems": soak.problems[:50],
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    if not record["ok"]:
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REFERENCE_MODEL)
    parser.add_argument("--slots", default="25%")
    parser.add_argument("--steps", type=int, default=20_000, help="decode steps")
    parser.add_argument("--check-every", type=int, default=1000, help="steps")
    parser.add_argument(
        "--limit-s", type=float, default=420.0, help="end after so long, even without the steps"
    )
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--max-prompt", type=int, default=64)
    parser.add_argument("--max-new", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=40, help="requests to run again alone")
    parser.add_argument("--eviction", default=ServingConfig.model_fields["eviction"].default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
