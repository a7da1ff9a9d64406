"""The requests of a soak: drawn at random, by a seed, and what becomes of each."""

import queue
import random
from dataclasses import dataclass, field

from common.generation import GenerationChunk, GenerationRequest, SamplingParams

CANCELLED_SHARE = 0.2


@dataclass
class Client:
    """One request and its sink. Tells `news` when there is something to do about it."""

    request: GenerationRequest
    news: "queue.SimpleQueue[Client]"
    cancel_after: int | None = None  # tokens; None for never
    token_ids: list[int] = field(default_factory=list)
    state: str = "running"  # then "finished", "failed" or "cancelled"
    error: Exception | None = None

    def put(self, chunk: GenerationChunk) -> None:
        self.token_ids += chunk.token_ids
        if chunk.finish_reason is not None:
            self.state = "finished"
        if self.state == "finished" or len(self.token_ids) == self.cancel_after:
            self.news.put(self)

    def fail(self, error: Exception) -> None:
        self.state, self.error = "failed", error
        self.news.put(self)

    @property
    def is_repeatable(self) -> bool:
        return self.request.sampling.temperature == 0 or self.request.sampling.seed is not None


class Requests:
    """Draws requests. The same seed draws the same ones."""

    def __init__(self, seed: int, vocab_size: int, max_prompt: int, max_new: int) -> None:
        self._random, self._vocab_size = random.Random(seed), vocab_size
        self._max_prompt, self._max_new = max_prompt, max_new
        self._num_drawn = 0

    def next(self, news: "queue.SimpleQueue[Client]") -> Client:
        draw = self._random
        self._num_drawn += 1
        length = min(draw.randint(1, self._max_prompt), draw.randint(1, self._max_prompt))
        prompt = tuple(draw.randrange(self._vocab_size) for _ in range(length))
        sampling = self._sampling(draw.randint(1, self._max_new))
        request = GenerationRequest(f"soak-{self._num_drawn}", prompt, sampling)
        gives_up = draw.random() < CANCELLED_SHARE
        return Client(request, news, draw.randint(0, sampling.max_tokens - 1) if gives_up else None)

    def _sampling(self, max_tokens: int) -> SamplingParams:
        draw = self._random
        logprobs = draw.choice([None, None, None, 0, 3])
        if draw.random() < 0.5:
            return SamplingParams(max_tokens, 0.0, logprobs=logprobs, ignore_eos=draw.random() < 0.5)
        return SamplingParams(
            max_tokens,
            temperature=draw.choice([0.3, 1.0, 1.7]),
            top_p=draw.choice([1.0, 0.9, 0.5]),
            top_k=draw.choice([0, 1, 40]),
            seed=draw.choice([None, draw.randrange(2**31)]),
            logprobs=logprobs,
            ignore_eos=True,
        )
