"""One request inside the engine, from its arrival to its last chunk. Only the engine's thread changes it."""

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from actors.executor.prediction_score import PredictionScore, score_prediction
from actors.executor.sampler import Sampler
from actors.executor.text_stream import TextStream
from actors.predictor.hash_function import HashFunctionState
from common.generation import (
    ExpertUsage,
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    RequestTimings,
    TokenLogprobs,
)
from common.hash_table import HashTable


class ChunkSink(Protocol):
    """Where a sequence's output goes. Called on the engine's thread; must not block."""

    def put(self, chunk: GenerationChunk) -> None:
        """The next chunk; the one with a finish reason is the last call."""

    def fail(self, error: Exception) -> None:
        """The request cannot be finished; the last call."""


@dataclass(eq=False)
class Sequence:
    """State of one request."""

    request: GenerationRequest
    sink: ChunkSink
    sampler: Sampler
    text: TextStream
    row: int = -1  # of the KV cache, once admitted
    num_computed: int = 0  # tokens whose keys and values are in the cache
    generated: list[int] = field(default_factory=list)
    num_launched: int = 0  # decode steps; the result of the last may be outstanding
    is_retired: bool = False  # finished, failed or cancelled
    table: HashTable | None = None
    hash_function: HashFunctionState | None = None  # routing=predicted: predicts generated tokens
    routing_table: HashTable | None = None  # routing=predicted: routes the prompt
    num_table_routed: int | None = None  # routing=predicted, of `needed` those that an encoder needed
    # What the routers chose: per prompt pass, per layer, [tokens, top_k].
    choices: list[SequenceOf[NDArray[np.int64]]] = field(default_factory=list)
    needed: int = 0
    missed: int = 0
    moved_bytes: int = 0
    # Monotonic seconds.
    queued_at_s: float = field(default_factory=time.monotonic)
    admitted_at_s: float = 0.0
    first_token_at_s: float = 0.0

    @classmethod
    def of(
        cls,
        request: GenerationRequest,
        sink: ChunkSink,
        tokenizer: Tokenizer | None,
        prefix: SequenceOf[int] | None = None,
    ) -> "Sequence":
        """Args: prefix: the tokens that the completion continues; None: the prompt."""
        sampling = request.sampling
        continued = request.prompt_token_ids if prefix is None else prefix
        text = TextStream(tokenizer, continued, sampling.stop, sampling.min_tokens)
        return cls(request, sink, Sampler(sampling), text)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def prompt_is_computed(self) -> bool:
        return self.num_computed >= self.num_prompt_tokens

    @property
    def wants_more(self) -> bool:
        """Whether another decode step may be needed, whatever the outstanding one brings."""
        return self.num_launched + 1 < self.request.sampling.max_tokens

    def score(self) -> PredictionScore | None:
        """How good the hash table was; None without a table, or where it was obeyed instead of the routers."""
        return score_prediction(self.choices, self.table) if self.table and self.choices else None

    def usage(self) -> ExpertUsage:
        score = self.score()
        if self.num_table_routed is not None:
            predicted = self.num_table_routed
        elif self.hash_function is not None:
            predicted = self.needed
        else:
            predicted = 0 if score is None else score.needed_pairs_named
        return ExpertUsage(self.needed, predicted, self.missed, self.moved_bytes)

    def timings(self) -> RequestTimings:
        """As of now, when the last token has come."""
        return RequestTimings(
            queue_s=self.admitted_at_s - self.queued_at_s,
            prefill_s=self.first_token_at_s - self.admitted_at_s,
            decode_s=time.monotonic() - self.first_token_at_s,
        )

    def append(
        self, token_id: int, logprobs: TokenLogprobs | None, eos_ids: frozenset[int]
    ) -> GenerationChunk:
        """Take a sampled token; the chunk is to be passed on, and is the last one if it has a finish reason."""
        if not self.generated:
            self.first_token_at_s = time.monotonic()
        self.generated.append(token_id)
        text = self.text.push(token_id)
        reason = self._finish_reason(token_id, eos_ids)
        if reason is not None and not self.text.stopped:
            text += self.text.flush()
        return GenerationChunk(
            token_ids=(token_id,),
            text=text,
            logprobs=() if logprobs is None else (logprobs,),
            finish_reason=reason,
            experts=None if reason is None else self.usage(),
            timings=None if reason is None else self.timings(),
        )

    def classify(self, label_logits: tuple[float, ...]) -> GenerationChunk:
        """Take what a classifier says; the chunk is the only one."""
        self.first_token_at_s = time.monotonic()
        return GenerationChunk((), "", (), "stop", self.usage(), self.timings(), label_logits=label_logits)

    def _finish_reason(self, token_id: int, eos_ids: frozenset[int]) -> FinishReason | None:
        sampling = self.request.sampling
        may_end = len(self.generated) >= sampling.min_tokens and not sampling.ignore_eos
        if self.text.stopped or (token_id in eos_ids and may_end):
            return "stop"
        return "length" if len(self.generated) >= sampling.max_tokens else None


@dataclass(frozen=True)
class PromptChunk:
    """The prompt tokens of one sequence that one pass computes."""

    sequence: Sequence
    start: int
    stop: int

    @classmethod
    def next_of(cls, sequence: Sequence, max_tokens: int) -> "PromptChunk":
        start = sequence.num_computed
        return cls(sequence, start, min(sequence.num_prompt_tokens, start + max_tokens))

    def next(self, max_tokens: int) -> "PromptChunk":
        """The chunk after this one; empty when this is the last."""
        stop = min(self.sequence.num_prompt_tokens, self.stop + max_tokens)
        return PromptChunk(self.sequence, self.stop, stop)

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def is_last(self) -> bool:
        return self.stop >= self.sequence.num_prompt_tokens

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.sequence.request.prompt_token_ids[self.start : self.stop]
