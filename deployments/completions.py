"""Requests for completions and chat completions into generation requests, and their chunks into answers.

Plain asyncio behind a Protocol: neither HTTP nor Ray is known here.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from common.errors import EngineStoppedError, ModelNotFoundError, WrongTaskError
from common.generation import GenerationChunk, GenerationRequest
from deployments.answers import Answer, ChatAnswer, CompletionAnswer, GrowingChoice
from deployments.chat_schema import ChatCompletion, ChatCompletionChunk, ChatRequest
from deployments.openai_schema import Completion, CompletionRequest
from deployments.prompts import PromptReader

Request = CompletionRequest | ChatRequest
Whole = Completion | ChatCompletion
Piece = Completion | ChatCompletionChunk
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
        """What the store holds (None if it does not answer) and what every executor did with its slots; plain JSON."""
        ...

    async def live_view(self) -> dict[str, Any]:
        """What happens to every expert of every executor, see `actors.executor.live_view`; plain JSON."""
        ...


class CompletionService:
    """Answers requests for completions and chat completions of one served model.

    Args:
        generates: whether the model can; a classifier's requests are refused.
    """

    def __init__(
        self,
        served_name: str,
        reader: PromptReader,
        backend: Backend,
        seed: int | None = None,
        generates: bool = True,
    ) -> None:
        self.served_name = served_name
        self.reader = reader
        self.backend = backend
        self._seed, self._generates = seed, generates

    async def complete(self, request: Request) -> Whole:
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

    async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        """The answer in pieces as they are generated; closing the generator cancels the request.

        Raises:
            RequestError, UnavailableError: before or between the pieces.
        """
        answer = self._admit(request)
        async with aclosing(self._run(answer)) as chunks:
            async for index, chunk in chunks:
                yield answer.piece(answer.choices[index].add(chunk))
        if request.include_usage:
            yield answer.last_piece()

    def _admit(self, request: Request) -> Answer:
        if request.model not in (None, self.served_name):
            raise ModelNotFoundError(str(request.model), self.served_name)
        if not self._generates:
            raise WrongTaskError("classifies texts and generates none", "/classify")
        self.reader.check_stops(request.stop)
        if isinstance(request, ChatRequest):
            prompts, echoes = [self.reader.read_messages(request.messages, request.token_limit)], [""]
            return self._start(ChatAnswer, request, prompts, echoes)
        prompts = [self.reader.read(prompt, request.token_limit) for prompt in request.prompt]
        echoes = [self.reader.echo(prompt) if request.echo else "" for prompt in request.prompt]
        return self._start(CompletionAnswer, request, prompts, echoes)

    def _start(
        self,
        kind: type[Answer],
        request: Request,
        prompts: Sequence[tuple[int, ...]],
        echoes: Sequence[str],
    ) -> Answer:
        """An answer with `n` generations of each prompt, the first prompt's first."""
        answer_id = f"{kind.id_prefix}-{uuid.uuid4().hex}"
        requests: list[GenerationRequest] = []
        choices: list[GrowingChoice] = []
        for prompt, echoed in zip(prompts, echoes, strict=True):
            max_tokens = request.token_limit or self.reader.room_after(prompt)
            for choice in range(request.n):
                sampling = request.sampling(max_tokens, self._seed, choice)
                requests.append(GenerationRequest(f"{answer_id}-{len(requests)}", prompt, sampling))
                choices.append(GrowingChoice(len(choices), self.reader.token_text, echoed))
        prompt_tokens = sum(len(prompt) for prompt in prompts)
        return kind(answer_id, self.served_name, requests, choices, prompt_tokens, request.timings)

    def _run(self, answer: Answer) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        for request in answer.requests:
            self.backend.predict(request)  # first, so that the table is on its way when the executor looks
        return merge([self.backend.generate(request) for request in answer.requests])


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
