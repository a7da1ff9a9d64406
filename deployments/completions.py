"""Completion requests into generation requests, and what executors generate into completions.

Plain asyncio behind a Protocol: neither HTTP nor Ray is known here.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from common.errors import EngineStoppedError, ModelNotFoundError
from common.generation import ExpertUsage, FinishReason, GenerationChunk, GenerationRequest, TokenLogprobs
from deployments.openai_schema import Choice, Completion, CompletionRequest, ExpertFigures, Logprobs, Usage
from deployments.prompts import PromptReader

T = TypeVar("T")


class Backend(Protocol):
    """The predictor, the executors and the store, as the ingress sees them."""

    def predict(self, request: GenerationRequest) -> None:
        """Start the prediction of a request's experts. Returns at once and never raises; failures are counted."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """Run a request. Closing the generator cancels it."""
        ...

    async def expert_report(self) -> dict[str, Any]:
        """What the store holds and what every executor did with its slots; plain JSON."""
        ...


class CompletionService:
    """Answers completion requests of one served model."""

    def __init__(
        self, served_name: str, reader: PromptReader, backend: Backend, seed: int | None = None
    ) -> None:
        self.served_name = served_name
        self.reader = reader
        self.backend = backend
        self._seed = seed

    async def complete(self, request: CompletionRequest) -> Completion:
        """
        Raises:
            RequestError: the request cannot be served as it is.
            UnavailableError: it could be served later.
        """
        answer = self._admit(request)
        async with aclosing(self._run(answer)) as chunks:
            async for index, chunk in chunks:
                answer.choices[index].add(chunk)
        return answer.whole()

    async def stream(self, request: CompletionRequest) -> AsyncGenerator[Completion, None]:
        """The completion in pieces as they are generated; closing the generator cancels the request.

        Raises:
            RequestError, UnavailableError: before or between the pieces.
        """
        answer = self._admit(request)
        async with aclosing(self._run(answer)) as chunks:
            async for index, chunk in chunks:
                yield answer.piece([answer.choices[index].add(chunk)])
        if request.include_usage:
            yield answer.piece([], answer.usage())

    def _admit(self, request: CompletionRequest) -> "_Answer":
        if request.model not in (None, self.served_name):
            raise ModelNotFoundError(str(request.model), self.served_name)
        self.reader.check_stops(request.stop)
        prompts = [self.reader.read(prompt, request.max_tokens) for prompt in request.prompt]
        sampling = request.sampling(self._seed)
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        requests = [
            GenerationRequest(f"{answer_id}-{index}", prompt, sampling)
            for index, prompt in enumerate(prompts)
        ]
        choices = [_ChoiceBuilder(index, self.reader) for index in range(len(prompts))]
        return _Answer(answer_id, self.served_name, requests, choices)

    def _run(self, answer: "_Answer") -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        for request in answer.requests:
            self.backend.predict(request)  # first, so that the table is on its way when the executor looks
        return merge([self.backend.generate(request) for request in answer.requests])


@dataclass
class _ChoiceBuilder:
    """One prompt's continuation as it grows."""

    index: int
    reader: PromptReader
    text: list[str] = field(default_factory=list)
    logprobs: Logprobs | None = None
    num_tokens: int = 0
    num_characters: int = 0
    finish_reason: FinishReason | None = None
    experts: ExpertUsage = field(default_factory=ExpertUsage)

    def add(self, chunk: GenerationChunk) -> Choice:
        """Take a chunk in; returns what is new as a choice of its own."""
        new = self._logprobs(chunk.logprobs) if chunk.logprobs else None
        if new is not None:
            self.logprobs = self.logprobs or Logprobs()
            _extend(self.logprobs, new)
        self.text.append(chunk.text)
        self.num_tokens += len(chunk.token_ids)
        self.finish_reason = chunk.finish_reason
        self.experts = chunk.experts or self.experts
        return Choice(index=self.index, text=chunk.text, logprobs=new, finish_reason=chunk.finish_reason)

    def choice(self) -> Choice:
        return Choice(
            index=self.index,
            text="".join(self.text),
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
        )

    def _logprobs(self, positions: Sequence[TokenLogprobs]) -> Logprobs:
        new = Logprobs()
        for position in positions:
            token = self.reader.token_text(position.token_id)
            new.tokens.append(token)
            new.token_logprobs.append(position.logprob)
            new.top_logprobs.append(self._top(position))
            new.text_offset.append(self.num_characters)
            self.num_characters += 0 if token.startswith("token_id:") else len(token)
        return new

    def _top(self, position: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in position.top:
            top.setdefault(self.reader.token_text(token_id), logprob)  # the likelier of two with one spelling
        return top


@dataclass(frozen=True)
class _Answer:
    """One request under way: its prompts as generation requests, and their choices."""

    id: str
    model: str
    requests: list[GenerationRequest]
    choices: list[_ChoiceBuilder]
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self) -> Completion:
        return self.piece([choice.choice() for choice in self.choices], self.usage())

    def piece(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def usage(self) -> Usage:
        prompt_tokens = sum(len(request.prompt_token_ids) for request in self.requests)
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            experts=ExpertFigures.of(_total(choice.experts for choice in self.choices)),
        )


def _total(usages: Iterable[ExpertUsage]) -> ExpertUsage:
    total = ExpertUsage()
    for usage in usages:
        total = ExpertUsage(
            total.needed + usage.needed,
            total.predicted + usage.predicted,
            total.missed + usage.missed,
            total.moved_bytes + usage.moved_bytes,
        )
    return total


def _extend(logprobs: Logprobs, new: Logprobs) -> None:
    logprobs.tokens += new.tokens
    logprobs.token_logprobs += new.token_logprobs
    logprobs.top_logprobs += new.top_logprobs
    logprobs.text_offset += new.text_offset


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The items of several streams as they come, each with its stream's index.

    The first error ends all of them; closing this generator, or cancelling whoever waits for it, does too.
    """
    queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
    running = len(pumps)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int, stream: AsyncGenerator[T, None], queue: "asyncio.Queue[tuple[int, T] | BaseException | None]"
) -> None:
    end: BaseException | None = None
    try:
        async with aclosing(stream):
            async for item in stream:
                queue.put_nowait((index, item))
    except asyncio.CancelledError:
        # Either nobody reads any more, or somebody else cancelled the stream: then the reader must learn of it.
        queue.put_nowait(EngineStoppedError("its request was cancelled"))
        raise
    except Exception as error:  # handed on to whoever reads the queue
        end = error
    queue.put_nowait(end)


async def peek(stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same stream once its first item is there, so that an early error is raised here and now."""
    first = await anext(stream)

    async def whole() -> AsyncGenerator[T, None]:
        async with aclosing(stream):
            yield first
            async for item in stream:
                yield item

    return whole()
