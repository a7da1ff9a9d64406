"""Decode steps as CUDA graphs, one per batch bucket: paging, forward and sampling in one launch, which the host does not
wait for. What rows hold (last token, position, how to sample) lives on the device.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from actors.executor.decoder import Drawn, PendingStep, StepResult
from actors.executor.gpu.captured_pass import CapturedPass, Foresee, NotCapturableError, Reroute
from actors.executor.gpu.device_sampler import RowSampling, sample_tokens
from actors.executor.gpu.pager import MAX_PREFETCHED, MAX_ROWS, DevicePager
from actors.executor.gpu.prefetch_governor import (
    PrefetchGovernor,
    affordable_prefetches,
    break_even_precision,
)
from actors.executor.gpu.prompt_pass import upload
from actors.executor.passes import PassClock
from actors.executor.sequence import Sequence
from common.generation import TokenLogprobs

_REFRESH_S = 0.25  # how old a report of the pager may be
_TIMED_STEPS = 8

# (token_ids, positions, rows), [batch] int64 each, on the device -> [batch, vocab] float32 logits.
DecodeStep = Callable[[Tensor, Tensor, Tensor], Tensor]


class GraphDecoder:
    """
    Args:
        step: queues one forward without a host synchronisation.
        num_rows: of the KV cache that sequences use; one more takes the padding of the buckets.
        max_tokens: that a row of the cache holds.
        top_k: experts per token.
        prefetch: copy experts for the next layer while one is computed, where the step can guess its routing.
        reroute, foresee: replace the routers' choice and the guess of it; for measurements.
    """

    runs_ahead = True

    def __init__(
        self,
        step: DecodeStep,
        pager: DevicePager,
        clock: PassClock,
        num_rows: int,
        max_tokens: int,
        top_k: int,
        device: torch.device,
        prefetch: bool = True,
        reroute: Reroute | None = None,
        foresee: Foresee | None = None,
    ) -> None:
        self._step, self._pager, self._clock = step, pager, clock
        self._top_k, self._prefetch, self._reroute, self._foresee = top_k, prefetch, reroute, foresee
        self._num_rows, self._last_position, self._device = num_rows, max_tokens - 1, device
        self._needed_per_token = top_k * clock.num_layers
        self._sampling = RowSampling(num_rows + 1, device)
        self._last_tokens, self._positions = torch.zeros(
            2, num_rows + 1, dtype=torch.int64, device=device
        ).unbind()
        self._buckets = {size: _Bucket.of(size, num_rows, device) for size in bucket_sizes(num_rows)}
        self._refreshed_at_s = 0.0
        self._governor = PrefetchGovernor(clock.num_layers, break_even=0.5, most=1)

    @torch.inference_mode()
    def capture(self, logger: logging.Logger | None = None) -> None:
        """Capture every bucket's graph; until then, and without CUDA, steps are queued kernel by kernel.

        Raises:
            NotCapturableError: the model's forward waits for the device, or is not one row per token.
        """
        started = time.perf_counter()
        if self._device.type != "cuda":
            return
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        for size in tqdm(sorted(self._buckets, reverse=True), desc="Capturing decode graphs", unit="graph"):
            bucket = self._buckets[size]
            with torch.cuda.stream(stream), _waiting_forbidden():
                self._queue(bucket)  # compiles every kernel; no row is active yet, so no expert moves
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self._queue(bucket)
            bucket.graph = graph
        self._govern_prefetching()
        if logger is not None:
            logger.info(
                "Captured %d decode graphs in %.1f s; steps prefetch up to %d experts for a layer, "
                "as long as %.0f%% of them are needed",
                len(self._buckets), time.perf_counter() - started, self._governor.most,
                100 * self._governor.break_even,
            )  # fmt: skip

    def _govern_prefetching(self) -> None:
        """Measure what prefetching can gain: an idle step computes all of a layer but its experts."""
        graph = self._buckets[1].graph
        assert graph is not None
        graph.replay()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(_TIMED_STEPS):
            graph.replay()
        torch.cuda.synchronize()
        window_s = (time.perf_counter() - started) / (_TIMED_STEPS * self._clock.num_layers)
        copy_s = self._pager.copy_time_s()
        self._governor = PrefetchGovernor(
            self._clock.num_layers,
            break_even_precision(copy_s, window_s),
            affordable_prefetches(copy_s, window_s, MAX_PREFETCHED),
        )
        self._pager.review_prefetching(self._governor)

    @torch.inference_mode()
    def first(self, sequences: SequenceOf[Sequence], logits: Tensor) -> SequenceOf[Drawn]:
        for sequence in sequences:
            self._sampling.set(sequence.row, sequence.request.sampling)
        rows, positions = upload(
            [[each.row for each in sequences], [each.num_prompt_tokens for each in sequences]],
            torch.int64,
            self._device,
        )
        tokens = sample_tokens(logits.contiguous(), rows, positions, self._sampling)
        self._last_tokens[rows] = tokens.clamp(min=0)
        self._positions[rows] = positions
        logprobs = _Logprobs.of(sequences, logits, tokens)
        return logprobs.drawn(tokens.tolist())

    @torch.inference_mode()
    def launch(self, batch: SequenceOf[Sequence]) -> PendingStep:
        self._pager.follow_experts()
        parts = [self._launch_part(batch[i : i + MAX_ROWS]) for i in range(0, len(batch), MAX_ROWS)]
        now = time.monotonic()
        if now - self._refreshed_at_s > _REFRESH_S:
            if self._prefetch:
                self._pager.review_prefetching(self._governor)
            self._pager.refresh()
            self._refreshed_at_s = now
        return _Pending(parts, self._needed_per_token)

    def idle(self) -> None:
        self._pager.refresh()

    def _launch_part(self, batch: SequenceOf[Sequence]) -> "_Part":
        bucket = self._buckets[min(size for size in self._buckets if size >= len(batch))]
        bucket.load([sequence.row for sequence in batch], padding_row=self._num_rows)
        if bucket.graph is not None:
            bucket.graph.replay()
        else:
            self._queue(bucket)
        logprobs = _Logprobs.of(batch, bucket.logits[: len(batch)], bucket.outputs[: len(batch), 0])
        on_host = torch.empty(bucket.outputs.shape, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        on_host.copy_(bucket.outputs, non_blocking=True)
        done = torch.cuda.Event() if self._device.type == "cuda" else None
        if done is not None:
            done.record()
        return _Part(len(batch), on_host, done, logprobs)

    def _queue(self, bucket: "_Bucket") -> None:
        rows = bucket.rows
        self._pager.begin_pass()
        token_ids, positions = self._last_tokens[rows], self._positions[rows]
        prefetches = self._prefetch and self._pager.can_prefetch(bucket.size, self._top_k)
        self._clock.running = CapturedPass(
            self._pager,
            self._clock.num_layers,
            bucket.size,
            bucket.num_active,
            prefetches,
            self._reroute,
            self._foresee,
        )
        bucket.logits = self._step(token_ids, positions, rows)
        self._clock.running = None
        following = positions + 1
        tokens = sample_tokens(bucket.logits, rows, following, self._sampling)
        self._last_tokens.index_copy_(0, rows, tokens.clamp(min=0))  # -1 is no token that could be embedded
        self._positions.index_copy_(0, rows, following.clamp(max=self._last_position))
        self._positions[self._num_rows].zero_()  # padding attends to one token, however long this runs
        bucket.outputs[:, 0] = tokens
        bucket.outputs[:, 1] = self._pager.row_missed[: bucket.size]


@contextmanager
def _waiting_forbidden() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        yield
    except RuntimeError as error:
        if "synchronizing CUDA operation" in str(error):
            raise NotCapturableError(str(error)) from error
        raise
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def bucket_sizes(num_rows: int) -> list[int]:
    """Powers of two up to the first that holds `num_rows`, or MAX_ROWS: larger batches take several launches."""
    largest = min(MAX_ROWS, 1 << (num_rows - 1).bit_length())
    return [1 << power for power in range(largest.bit_length())]


@dataclass
class _Bucket:
    """The fixed memory of one graph."""

    size: int
    rows: Tensor  # [size] int64
    num_active: Tensor  # [1] int32; the rows from there on are padding
    outputs: Tensor  # [size, 2] int64: token id or -1, experts missed
    logits: Tensor  # [size, vocab] float32
    graph: torch.cuda.CUDAGraph | None = None
    loaded: tuple[int, ...] = ()  # what `rows` holds

    @classmethod
    def of(cls, size: int, padding_row: int, device: torch.device) -> "_Bucket":
        rows = torch.full((size,), padding_row, device=device)
        num_active = torch.zeros(1, dtype=torch.int32, device=device)
        outputs = torch.zeros(size, 2, dtype=torch.int64, device=device)
        return cls(size, rows, num_active, outputs, torch.empty(0, device=device))

    def load(self, rows: SequenceOf[int], padding_row: int) -> None:
        if self.loaded == tuple(rows):
            return
        self.loaded = tuple(rows)
        padded = [*rows, *[padding_row] * (self.size - len(rows))]
        self.rows.copy_(torch.tensor(padded))
        self.num_active.fill_(len(rows))


@dataclass(frozen=True)
class _Logprobs:
    """What requests asked to know of a step's distribution, in device memory; empty when none did."""

    counts: tuple[int | None, ...]  # per row, as SamplingParams.logprobs
    chosen: Tensor | None  # [rows]
    values: Tensor | None  # [rows, most]
    ids: Tensor | None

    @classmethod
    def of(cls, batch: SequenceOf[Sequence], logits: Tensor, tokens: Tensor) -> "_Logprobs":
        counts = tuple(sequence.request.sampling.logprobs for sequence in batch)
        asked = [count for count in counts if count is not None]
        if not asked:
            return cls(counts, None, None, None)
        logprobs = logits.log_softmax(dim=-1)
        chosen = logprobs.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1)
        values, ids = logprobs.topk(max(*asked, 1))
        return cls(counts, chosen, values, ids)

    def drawn(self, tokens: SequenceOf[int]) -> list[Drawn]:
        """Args: tokens: per row, -1 where the logits were not numbers."""
        return [
            Drawn(None if token_id < 0 else token_id, self._of_row(row, token_id))
            for row, token_id in enumerate(tokens)
        ]

    def _of_row(self, row: int, token_id: int) -> TokenLogprobs | None:
        count = self.counts[row]
        if count is None or self.chosen is None or self.values is None or self.ids is None:
            return None
        top = zip(self.ids[row, :count].tolist(), self.values[row, :count].tolist(), strict=True)
        return TokenLogprobs(token_id, float(self.chosen[row]), tuple(top))


@dataclass(frozen=True)
class _Part:
    size: int
    outputs: Tensor  # on the host
    done: torch.cuda.Event | None
    logprobs: _Logprobs

    def drawn_and_missed(self) -> tuple[list[Drawn], list[int]]:
        if self.done is not None:
            self.done.synchronize()
        tokens, missed = self.outputs[: self.size].T.tolist()
        return self.logprobs.drawn(tokens), missed


@dataclass(frozen=True)
class _Pending:
    parts: SequenceOf[_Part]
    needed_per_token: int

    def result(self) -> StepResult:
        drawn: list[Drawn] = []
        missed: list[int] = []
        for part in self.parts:
            part_drawn, part_missed = part.drawn_and_missed()
            drawn += part_drawn
            missed += part_missed
        counted = np.array(missed, np.int64)
        return StepResult(drawn, np.full(len(drawn), self.needed_per_token), counted, counted)
