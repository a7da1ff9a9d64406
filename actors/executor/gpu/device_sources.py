"""Reads what a classifier judges, several texts in one pass that pages by itself."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from actors.executor.encoder_prompts import joined_routing
from actors.executor.gpu.captured_sources import CapturedSources, bucket_sizes
from actors.executor.gpu.device_prompts import QueuedPasses
from actors.executor.gpu.pager import MAX_ROWS
from actors.executor.gpu.prompt_pass import PackedPrompts, PackedTokens, PromptPass
from actors.executor.model_loader import SlotModel
from actors.executor.packed_encoder import ClassifierRunner
from actors.executor.passes import Routing
from actors.executor.predicted_routing import PredictedRouting
from actors.executor.prompts import AfterLayer, PromptResult
from actors.executor.runner import RowInput
from actors.executor.sequence import PromptChunk


class DeviceSources(QueuedPasses):
    """
    Args:
        max_tokens: of a pass over several texts; a longer one has a pass of its own, queued kernel by kernel.
        top_k: of the routers.
        routing: replaces the routers' choice; None lets them decide.
    """

    runs_ahead = True
    reads_whole = True

    def __init__(
        self,
        slot_model: SlotModel,
        runner: ClassifierRunner,
        max_tokens: int,
        top_k: int,
        routing: PredictedRouting | None = None,
    ) -> None:
        super().__init__(slot_model)
        self._runner, self._max_tokens, self._routing = runner, max_tokens, routing
        self._buckets = [
            CapturedSources(self._pager, self._clock.num_layers, size, None if routing is None else top_k)
            for size in bucket_sizes(max_tokens)
        ]

    @torch.inference_mode()
    def capture(self, logger: logging.Logger) -> None:
        """Compile what passes run, and capture those up to `max_tokens`; without CUDA there are no graphs."""
        started = time.perf_counter()
        self.warm_up(self._pager.num_experts)  # so many tokens may need all experts, and so waves
        if self._device.type != "cuda":
            return
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        for bucket in tqdm(self._buckets[::-1], desc="Capturing passes", unit="pass"):
            self._clock.begin_pass(bucket.pass_)
            try:
                bucket.run(self._queue, lambda _: None)
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    bucket.capture(self._queue, pool)
            finally:
                self._clock.end_pass()
        torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - started
        logger.info("Captured passes over up to %d tokens in %.1f s", self._buckets[-1].size, seconds)

    def joins(self, chunk: PromptChunk, chunks: Sequence[PromptChunk]) -> bool:
        if not chunks:
            return True
        fits = sum(each.num_tokens for each in (*chunks, chunk)) <= self._max_tokens
        return fits and len(chunks) < MAX_ROWS

    @torch.inference_mode()
    def read(self, chunks: Sequence[PromptChunk], after_layer: AfterLayer, paced: bool) -> PromptResult:
        inputs = [RowInput(number, 0, chunk.token_ids) for number, chunk in enumerate(chunks)]
        routing = None
        if self._routing is not None:
            routing = joined_routing([self._routing.of_source(chunk) for chunk in chunks])
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        bucket = next((bucket for bucket in self._buckets if bucket.size >= num_tokens), None)
        if bucket is None:
            pass_ = self._new_pass(PackedPrompts.of(inputs, self._device), after_layer, routing)
            logits = self._run(pass_)
        else:
            bucket.load(inputs, routing)
            pass_, logits = bucket.pass_, self._run_bucket(bucket, after_layer)[: len(inputs)]
        self._pager.refresh()
        result = self._result(pass_, inputs, logits)
        if routing is None:
            return result
        for chunk, needed in zip(chunks, result.needed.tolist(), strict=True):
            chunk.sequence.num_table_routed = needed
        return replace(result, choices=None)

    def _run_bucket(self, bucket: CapturedSources, after_layer: AfterLayer) -> Tensor:
        self._clock.begin_pass(bucket.pass_)
        try:
            self._pager.begin_prompt()
            return bucket.run(self._queue, after_layer)
        finally:
            self._pager.join()
            self._clock.end_pass()

    def _new_pass(
        self,
        prompts: PackedTokens,
        after_layer: AfterLayer = lambda _: None,
        routing: Routing | None = None,
    ) -> PromptPass:
        if routing is not None:
            routing = Routing(routing.expert_ids.to(self._device), routing.weights.to(self._device))
        return PromptPass(self._pager, self._clock.num_layers, prompts, after_layer, routing=routing)

    def _queue(self, prompts: PackedTokens) -> Tensor:
        states = self._runner.encode.states(prompts.token_ids, prompts.positions, prompts.rows)
        return self._runner.judge(states, prompts.rows, len(prompts.inputs))

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        raise NotImplementedError("a classifier takes no decode steps")
        yield
