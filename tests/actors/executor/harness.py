"""Engines over tiny checkpoints without Ray, and the library's own generation to hold them against."""

import queue
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.executor.drivers import new_passes, new_prefetcher, new_runner
from actors.executor.engine import Engine, EngineLimits
from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.expert_source import CheckpointExpertSource, ExpertSource
from actors.executor.host_pager import HostPager
from actors.executor.lookahead import Lookahead
from actors.executor.model_loader import SlotModel, attach_slots, load_dense_model
from actors.executor.pager import Pager
from actors.executor.predicted_routing import PredictedRouting
from actors.executor.resident_set import load_pinned
from actors.executor.slots import SlotPool
from common.architecture import load_config
from common.checkpoint import Checkpoint
from common.generation import GenerationChunk, GenerationRequest, SamplingParams
from common.own_experts import own_model_class
from tests.tiny_models import TOP_K

WAIT_S = 60.0
PROMPTS = ([5, 9, 12, 7, 3, 4, 8, 11, 2, 6, 1, 13, 14, 25], [17, 3, 20, 21], [30, 31, 32, 33, 34, 35, 36])


class QueueSink:
    """Collects a request's chunks; `result` waits for the last one."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[GenerationChunk | Exception] = queue.SimpleQueue()
        self.chunks: list[GenerationChunk] = []

    def put(self, chunk: GenerationChunk) -> None:
        self._queue.put(chunk)

    def fail(self, error: Exception) -> None:
        self._queue.put(error)

    def next(self) -> GenerationChunk:
        item = self._queue.get(timeout=WAIT_S)
        if isinstance(item, Exception):
            raise item
        self.chunks.append(item)
        return item

    def result(self) -> list[GenerationChunk]:
        while not self.chunks or self.chunks[-1].finish_reason is None:
            self.next()
        return self.chunks

    def token_ids(self) -> list[int]:
        return [token_id for chunk in self.result() for token_id in chunk.token_ids]

    def text(self) -> str:
        return "".join(chunk.text for chunk in self.result())

    def is_silent(self) -> bool:
        return self._queue.empty()


@dataclass
class Harness:
    """One engine and the parts a test wants to look at."""

    engine: Engine
    slot_model: SlotModel

    def submit(self, prompt: Sequence[int], request_id: str, **sampling: Any) -> QueueSink:
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling})
        sink = QueueSink()
        self.engine.submit(GenerationRequest(request_id, tuple(prompt), params), sink)
        return sink

    def generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[list[int]]:
        sinks = [self.submit(prompt, f"r{index}", **sampling) for index, prompt in enumerate(prompts)]
        return [sink.token_ids() for sink in sinks]


def slot_model(
    folder: Path,
    num_slots: int | None = None,
    dtype: torch.dtype = torch.float32,
    eviction: str = "lru",
    source: ExpertSource | None = None,
    device: str = "cpu",
    on_device: bool = False,
    pinned: Sequence[Sequence[int]] = (),
) -> SlotModel:
    """A model whose free slots are poisoned; num_slots None is the smallest legal number.

    Args:
        on_device: page on the device, which may be the CPU, in Triton's interpreter.
        pinned: of each layer the experts that keep their slots, loaded already.
    """
    checkpoint = Checkpoint.open(folder)
    source = source or CheckpointExpertSource(checkpoint)

    def new_pager(pools: Sequence[SlotPool], num_experts: int) -> Pager:
        if not on_device:
            policy = EVICTION_POLICIES[eviction]
            return HostPager(source, pools, num_experts, policy, torch.device(device), True, pinned)
        from actors.executor.gpu.host_experts import HostExperts
        from actors.executor.gpu.pager import DevicePager

        experts = HostExperts(source, len(pools), num_experts, torch.device(device))
        pager = DevicePager(source, pools, num_experts, experts, eviction, True, pinned)
        if pager.holds_all:
            pager.load_all()
        return pager

    model = load_dense_model(folder, dtype, torch.device(device))
    layout = source.layout.with_dtype(dtype)
    built = attach_slots(model, layout, num_slots or checkpoint.architecture.top_k, new_pager)
    load_pinned(built.pager, pinned)
    return built


def start_engine(
    model: SlotModel,
    *,
    prefetch: bool = True,
    limits: EngineLimits | None = None,
    top_k: int = TOP_K,
    routing: PredictedRouting | None = None,
    lookahead: Lookahead | None = None,
    **engine: Any,
) -> Harness:
    limits = limits or EngineLimits(max_batch_size=4, prefill_chunk_tokens=5, max_queued_requests=8)
    runner = new_runner(model, limits.max_batch_size, max_tokens=128)
    prompts, decoder = new_passes(model, runner, limits, top_k, routing, prefetch, lookahead=lookahead)
    prefetcher = new_prefetcher(model, prompts) if prefetch else None
    built = Engine(
        prompts,
        decoder,
        model.pager,
        model.clock,
        limits,
        prefetcher=prefetcher,
        lookahead=lookahead,
        **engine,
    )
    built.start()
    return Harness(built, model)


def library_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same checkpoint in the unmodified library, with every expert in place."""
    is_in_registry = own_model_class(load_config(folder)) is None
    options = {"experts_implementation": "grouped_mm"} if is_in_registry else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def library_greedy(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    inputs = torch.tensor([prompt], device=model.device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()
