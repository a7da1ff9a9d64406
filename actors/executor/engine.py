"""The generation loop: admits sequences to cache rows, runs prompt chunks and decode batches, hands out tokens.

One thread owns the model. `submit`, `cancel` and `attach_table` may be called from any thread and never block on it.
Where the decoder runs ahead, the host hands out the tokens of one decode step while the device computes the next; a
sequence that turns out to have ended takes part in one step too many, whose token is dropped.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from actors.executor.decoder import Decoder, Drawn, PendingStep
from actors.executor.lookahead import Lookahead
from actors.executor.pager import Activity, Pager
from actors.executor.passes import PassClock
from actors.executor.prefetcher import Prefetcher, plan_prefetch
from actors.executor.prompts import PromptReader
from actors.executor.report import EngineReport, LayerReport
from actors.executor.sequence import ChunkSink, PromptChunk, Sequence
from actors.executor.warm_up import Residents, residents_of
from common.errors import EngineStoppedError, NonFiniteLogitsError, QueueFullError
from common.generation import GenerationRequest
from common.hash_table import HashTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLimits:
    """How much the engine takes on at once."""

    max_batch_size: int  # sequences in the KV cache
    prefill_chunk_tokens: int  # prompt tokens per step, so that running streams do not stall
    max_queued_requests: int  # waiting for a row
    max_stall_s: float = 0.05  # that a prompt may hold up running streams, as far as its layers can be parted


class Engine:
    """Continuous batching over one model: sequences join and leave at every step.

    Args:
        prompts: reads prompts; `decoder` generates from them.
        tokenizer: None for a model without one; texts are empty then.
        eos_ids: tokens that end a sequence.
        prefix: the tokens that completions continue; None: their prompts.
        prefetcher: works off what hash tables name; None to do without.
        lookahead: copies what coming layers need while a pass computes; None to do without.
    """

    def __init__(
        self,
        prompts: PromptReader,
        decoder: Decoder,
        pager: Pager,
        clock: PassClock,
        limits: EngineLimits,
        tokenizer: Tokenizer | None = None,
        eos_ids: frozenset[int] = frozenset(),
        prefetcher: Prefetcher | None = None,
        prefix: SequenceOf[int] | None = None,
        lookahead: Lookahead | None = None,
    ) -> None:
        self._prompts, self._decoder, self._pager, self._clock = prompts, decoder, pager, clock
        self._limits, self._tokenizer, self._eos_ids = limits, tokenizer, eos_ids
        self._prefetcher, self._prefix, self._lookahead = prefetcher, prefix, lookahead
        self._changed = threading.Condition()  # guards the next five, and each sequence's table
        self._sequences: dict[str, Sequence] = {}  # every unfinished one
        self._waiting: deque[Sequence] = deque()
        self._cancelled: set[str] = set()
        self._stop_reason: str | None = None
        self._under_way: list[PromptChunk] = []  # of the running pass
        self._free_rows = list(range(limits.max_batch_size))
        self._prefilling: list[Sequence] = []
        self._decoding: list[Sequence] = []
        self._pending: tuple[list[Sequence], PendingStep] | None = None  # launched, result not taken
        self._decoded_at_s = 0.0
        self._tables: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._named, self._chosen = np.zeros((2, clock.num_layers), np.int64)  # predictor recall, [layers]
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        for ahead in (self._prefetcher, self._lookahead):
            if ahead is not None:
                ahead.start()
        self._thread.start()

    def stop(self, reason: str = "it was shut down") -> None:
        """Fail what is unfinished and end the threads. Twice is fine."""
        with self._changed:
            self._stop_reason = self._stop_reason or reason
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for ahead in (self._prefetcher, self._lookahead):
            if ahead is not None:
                ahead.stop()
        self._pager.close()

    def check_health(self) -> None:
        """
        Raises:
            EngineStoppedError: the engine's thread has ended.
        """
        if self._stop_reason is not None:
            raise EngineStoppedError(self._stop_reason)

    def submit(self, request: GenerationRequest, sink: ChunkSink) -> None:
        """Queue a request; its chunks, or one error, go to the sink.

        Raises:
            QueueFullError: too many requests wait for a row.
            EngineStoppedError: the engine takes no more requests.
        """
        sequence = Sequence.of(request, sink, self._tokenizer, self._prefix)
        with self._changed:
            self.check_health()
            num_queued = len(self._waiting) - len(self._free_rows)  # the others start with the next step
            if num_queued >= self._limits.max_queued_requests:
                raise QueueFullError(num_queued, self._limits.max_queued_requests)
            self._sequences[request.request_id] = sequence
            self._waiting.append(sequence)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """Forget a request: its row is free before the next step. Unknown or finished ones are no error."""
        with self._changed:
            if request_id in self._sequences:
                self._cancelled.add(request_id)
                self._changed.notify_all()

    def attach_table(self, request_id: str, table: HashTable) -> None:
        """Give a request its hash table: prefetching for its prompt begins, even in the middle of a pass.

        Raises:
            HashTableError: the table does not fit the model or the prompt; it is not used.
        """
        with self._changed:
            sequence = self._sequences.get(request_id)
            if sequence is None:
                return
            table.check_fits(
                self._pager.source.model_fingerprint,
                self._clock.num_predicted_layers,
                self._pager.num_experts,
                sequence.num_prompt_tokens,
            )
            sequence.table = table
            under_way = [chunk for chunk in self._under_way if chunk.sequence is sequence]
            self._tables["late" if under_way or sequence.num_computed > 0 else "on_time"] += 1
            for chunk in under_way:
                self._plan(chunk, pass_number=self._clock.passes_begun - 1)

    def count_table(self, kind: Literal["lost", "unusable"]) -> None:
        """A request's table did not come, or is not used; it runs on demand."""
        self._tables[kind] += 1

    def report(self) -> EngineReport:
        """What is resident and what has happened since start. May be called while a pass runs."""
        layers = []
        for layer in range(self._clock.num_layers):
            resident = np.flatnonzero(self._pager.resident(layer)).tolist()
            recall = float(self._named[layer] / self._chosen[layer]) if self._chosen[layer] else None
            layers.append(LayerReport.of(layer, resident, self._pager.counters(layer), recall))
        return EngineReport(
            paging="device" if self._decoder.runs_ahead or self._prompts.runs_ahead else "host",
            slots_per_layer=self._pager.num_slots,
            num_experts=self._pager.num_experts,
            layers=tuple(layers),
            prefetches=self._pager.prefetches(),
            hash_tables={kind: self._tables[kind] for kind in ("on_time", "late", "lost", "unusable")},
            num_running=len(self._prefilling) + len(self._decoding),
            num_waiting=len(self._waiting),
            prompt_tokens=self._tokens["prompt"],
            generated_tokens=self._tokens["generated"],
        )

    def residents(self) -> Residents:
        """What is resident, for a new executor to warm up with. May be called while a pass runs."""
        return residents_of(self._pager)

    def activity(self) -> Activity:
        """What can be seen of every expert; for `live_view`. May be called while a pass runs."""
        return self._pager.activity()

    def _run(self) -> None:
        reason = "its thread failed"
        try:
            while self._wait_for_work():
                self._step()
            reason = self._stop_reason or reason
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            logger.exception("the engine's thread failed")
        finally:
            with self._changed:
                self._stop_reason = reason
                unfinished = list(self._sequences.values())
            for sequence in unfinished:  # retiring them may be what failed
                sequence.sink.fail(EngineStoppedError(reason))

    def _wait_for_work(self) -> bool:
        """Returns: False when the engine is to stop."""
        if not self._has_sequences():
            self._finish_pending()
            self._decoder.idle()
        with self._changed:
            self._changed.wait_for(lambda: self._stop_reason or self._cancelled or self._has_sequences())
            return self._stop_reason is None

    def _has_sequences(self) -> bool:
        return bool(self._waiting or self._prefilling or self._decoding)

    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        self._prefill()
        self._decode()

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
        for request_id in cancelled:
            if (sequence := self._sequences.get(request_id)) is not None:
                self._retire(sequence)

    def _admit(self) -> None:
        with self._changed:
            while self._waiting and self._free_rows:
                sequence = self._waiting.popleft()
                sequence.admitted_at_s = time.monotonic()
                sequence.row = min(self._free_rows)
                self._free_rows.remove(sequence.row)
                self._prefilling.append(sequence)

    def _prefill(self) -> None:
        """Read prompts until the tokens of one step are used up, as many at a time as the reader takes."""
        budget, waiting = self._limits.prefill_chunk_tokens, deque(self._prefilling)
        while waiting and budget > 0:
            chunks: list[PromptChunk] = []
            while waiting and budget > 0:
                chunk = self._next_chunk(waiting[0], budget)
                if not self._prompts.joins(chunk, chunks):
                    break
                waiting.popleft()
                chunks.append(chunk)
                budget -= chunk.num_tokens
            self._read(chunks)
            if self._prompts.reads_whole:
                return  # what did not join is more than is left of the budget

    def _next_chunk(self, sequence: Sequence, max_tokens: int) -> PromptChunk:
        whole = self._prompts.reads_whole
        return PromptChunk.next_of(sequence, sequence.num_prompt_tokens if whole else max_tokens)

    def _read(self, chunks: list[PromptChunk]) -> None:
        """One pass over chunks of different sequences."""
        if not self._prompts.runs_ahead:
            self._finish_pending()  # the pass waits for it anyway
        try:
            with self._changed:
                self._under_way = chunks
                for chunk in chunks:
                    self._plan(chunk, pass_number=self._clock.passes_begun)
                for chunk in () if self._decoding else self._following(chunks):
                    self._plan(chunk, self._clock.passes_begun + 1)
            result = self._prompts.read(chunks, self._after_prompt_layer, paced=bool(self._decoding))
            ends = [index for index, chunk in enumerate(chunks) if chunk.is_last]
            complete = [chunks[index].sequence for index in ends]
            drawn = self._decoder.first(complete, result.logits[ends]) if ends else ()
        except Exception as error:
            for chunk in chunks:
                self._fail(chunk.sequence, error)
            return
        finally:
            with self._changed:
                self._under_way = []
        self._account([chunk.sequence for chunk in chunks], result.needed, result.missed, result.fetched)
        for index, chunk in enumerate(chunks):
            if result.choices is not None:
                chunk.sequence.choices.append(result.choices[index])
            chunk.sequence.num_computed = chunk.stop
            self._tokens["prompt"] += chunk.num_tokens
        for sequence, first in zip(complete, drawn, strict=True):
            self._prefilling.remove(sequence)
            self._decoding.append(sequence)
            self._take_token(sequence, first)

    def _following(self, chunks: list[PromptChunk]) -> list[PromptChunk]:
        """What the pass after one over `chunks` will read. The caller holds the lock."""
        if not self._prompts.reads_whole:
            return [chunk.next(self._limits.prefill_chunk_tokens) for chunk in chunks]
        under_way, following = [chunk.sequence for chunk in chunks], list[PromptChunk]()
        for sequence in (*self._prefilling, *self._waiting):
            if sequence in under_way:
                continue
            chunk = self._next_chunk(sequence, self._limits.prefill_chunk_tokens)
            if not self._prompts.joins(chunk, following):
                break
            following.append(chunk)
        return following

    def _after_prompt_layer(self, layer: int) -> None:
        """Prefetch for the next layer, and let running streams go on if they have waited long enough."""
        if self._prefetcher is not None:
            self._prefetcher.after_layer(layer)
        if layer < 0 or not (self._decoding and self._decoder.runs_ahead):
            return
        if layer == 0:
            self._finish_pending()  # the device, which has work again, was done with it before
        if time.monotonic() - self._decoded_at_s > self._limits.max_stall_s:
            with self._prompts.interrupted():
                self._decode()

    def _decode(self) -> None:
        """Launch the next step, then take the result of the one before; or of the same one, if nothing runs ahead."""
        batch = sorted((s for s in self._decoding if s.wants_more), key=lambda sequence: sequence.row)
        previous, self._pending = self._pending, None
        if batch:
            self._pending = self._launch(batch)
        if previous is not None:
            self._finish(*previous)
        if not self._decoder.runs_ahead:
            self._finish_pending()
        self._decoded_at_s = time.monotonic()

    def _launch(self, batch: list[Sequence]) -> tuple[list[Sequence], PendingStep] | None:
        try:
            if (
                self._prefilling and not self._decoder.runs_ahead
            ):  # the step is a pass, and the chunk's the next
                chunk = self._next_chunk(self._prefilling[0], self._limits.prefill_chunk_tokens)
                with self._changed:
                    self._plan(chunk, self._clock.passes_begun + 1)
            step = self._decoder.launch(batch)
        except Exception as error:
            for sequence in batch:
                self._fail(sequence, error)
            return None
        for sequence in batch:
            sequence.num_launched += 1
        return batch, step

    def _finish_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._finish(*pending)

    def _finish(self, batch: list[Sequence], step: PendingStep) -> None:
        try:
            result = step.result()
        except Exception as error:
            for sequence in batch:
                if not sequence.is_retired:
                    self._fail(sequence, error)
            return
        self._account(batch, result.needed, result.missed, result.fetched)
        for sequence, drawn in zip(batch, result.drawn, strict=True):
            if not sequence.is_retired:
                sequence.num_computed += 1
                self._take_token(sequence, drawn)

    def _account(
        self,
        batch: list[Sequence],
        needed: NDArray[np.int64],
        missed: NDArray[np.int64],
        fetched: NDArray[np.int64],
    ) -> None:
        slab_bytes = self._pager.source.layout.slab_bytes
        for index, sequence in enumerate(batch):
            sequence.needed += int(needed[index])
            sequence.missed += int(missed[index])
            sequence.moved_bytes += int(fetched[index]) * slab_bytes

    def _take_token(self, sequence: Sequence, drawn: Drawn) -> None:
        """Pass a token on, and forget the sequence if it was the last."""
        if drawn.label_logits is not None:
            chunk = sequence.classify(drawn.label_logits)
        elif drawn.token_id is not None:
            self._tokens["generated"] += 1
            chunk = sequence.append(drawn.token_id, drawn.logprobs, self._eos_ids)
        else:
            self._fail(sequence, NonFiniteLogitsError(sequence.num_computed))
            return
        if chunk.finish_reason is not None:
            self._retire(sequence)  # before anybody learns of it
        sequence.sink.put(chunk)

    def _plan(self, chunk: PromptChunk, pass_number: int) -> None:
        """Have the experts of a prompt chunk prefetched, if its table is there. The caller holds the lock."""
        sequence = chunk.sequence
        if self._prefetcher is None or sequence.table is None or chunk.num_tokens == 0:
            return

        def count(copied_bytes: int) -> None:
            sequence.moved_bytes += copied_bytes

        expert_ids = sequence.table.expert_ids[:, chunk.start : chunk.stop]
        plan = plan_prefetch(expert_ids, self._pager.num_experts, self._pager.num_slots, pass_number, count)
        self._prefetcher.submit(plan)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        logger.error("request %s failed: %s", sequence.request_id, error, exc_info=error)
        self._retire(sequence)
        sequence.sink.fail(error)

    def _retire(self, sequence: Sequence) -> None:
        """Forget a finished, failed or cancelled sequence and free its row."""
        sequence.is_retired = True
        if (score := sequence.score()) is not None:
            layers = slice(len(score.num_named))
            self._named[layers] += score.num_named
            self._chosen[layers] += score.num_chosen
        with self._changed:
            del self._sequences[sequence.request_id]
            for group in (self._waiting, self._prefilling, self._decoding):
                if sequence in group:
                    group.remove(sequence)
            if sequence.row >= 0:
                num_running = self._limits.max_batch_size - len(self._free_rows)
                self._free_rows.append(sequence.row)
                self._pager.requests_ended(1 / num_running)
        if self._lookahead is not None:
            self._lookahead.end_request(sequence.request_id)
