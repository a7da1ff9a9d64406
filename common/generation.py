"""What the ingress asks of an executor and what comes back. Plain frozen data; crosses processes by pickle.

This is not the HTTP schema: that one lives in `deployments/openai_schema.py` and is turned into this.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop. The ingress has validated every field.

    Before `min_tokens` tokens neither an end-of-sequence token nor a stop string ends the completion. What did not end
    it stays: the stop string as text, the end token as a token, which the model reads on, as with `ignore_eos`.
    """

    max_tokens: int = 16
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps the whole vocabulary
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # None: none; n: the chosen token's and the n most likely ones'
    ignore_eos: bool = False
    min_tokens: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue, or for a classifier to judge. `request_id` is also the key of its hash table."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams  # a classifier samples nothing


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities of the model itself (temperature 1, nothing cut off) at one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # most likely first


@dataclass(frozen=True)
class ExpertUsage:
    """The experts one request needed, summed over its MoE layers and forward passes.

    `needed` counts distinct (layer, expert) pairs of each pass; `predicted` those of them that the request's
    hash table named; `missed` those that were not in a slot when their layer began; `moved_bytes` what was copied
    into slots for this request, on demand or ahead of need. A copy that several requests of a batch waited for
    counts for each of them.
    """

    needed: int = 0
    predicted: int = 0
    missed: int = 0
    moved_bytes: int = 0

    @classmethod
    def total(cls, usages: Iterable["ExpertUsage"]) -> "ExpertUsage":
        counts = [(each.needed, each.predicted, each.missed, each.moved_bytes) for each in usages]
        return cls(*map(sum, zip(*counts, strict=True)))


@dataclass(frozen=True)
class RequestTimings:
    """Where the seconds of one request went, on its executor. They follow each other without a gap."""

    queue_s: float  # from its arrival until it had a row of the batch
    prefill_s: float  # from there to its first token
    decode_s: float  # from there to its last token


@dataclass(frozen=True)
class GenerationChunk:
    """What one step added to a request. `text` may lag behind `token_ids` (split characters, possible stops).

    A classifier's only chunk has no tokens but `label_logits`.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token id when asked for
    finish_reason: FinishReason | None = None  # set on the last chunk
    experts: ExpertUsage | None = None  # set on the last chunk
    timings: RequestTimings | None = None  # set on the last chunk
    label_logits: tuple[float, ...] | None = None
