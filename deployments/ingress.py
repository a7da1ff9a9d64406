"""The ingress deployment: HTTP for clients, and the same answers as plain dicts for other Ray applications.

A thin shell: the work is in `completions.py`, the routes in `http_api.py`.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from common.config import ServingConfig
from common.generation import GenerationChunk, GenerationRequest
from common.tokenizer import load_tokenizer
from deployments.chat_schema import ChatRequest
from deployments.completions import CompletionService
from deployments.http_api import create_http_api
from deployments.openai_errors import reply_to
from deployments.openai_schema import CompletionRequest
from deployments.prompts import PromptReader
from deployments.request_metrics import ObservedBackend, RequestMetrics

logger = logging.getLogger("ray.serve")

_STORE_ANSWER_S = 2.0


class Ingress:
    """Where requests enter, by HTTP or through a Serve handle.

    Handle calls take and give plain dicts, so that callers need nothing of this project. Their errors are a
    ValueError (the request is at fault) or a RuntimeError (the server is) whose text is OpenAI's error body as JSON.
    """

    def __init__(
        self,
        config: ServingConfig,
        vocab_size: int,
        predictor: DeploymentHandle | None,
        executor: DeploymentHandle,
        store: DeploymentHandle,
    ) -> None:
        """
        Args:
            config: with `max_context_tokens` decided.
            predictor: None when nothing predicts.
        """
        assert config.max_context_tokens is not None
        reader = PromptReader(load_tokenizer(config.model), vocab_size, config.max_context_tokens)
        self._api_key = config.api_key
        self._metrics = RequestMetrics()
        backend = ObservedBackend(HandleBackend(predictor, executor, store), self._metrics)
        self.service = CompletionService(config.served_name, reader, backend, config.seed)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_http_api(self.service, self._api_key, self._metrics)

    async def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """The body of `POST /v1/completions` for the same fields.

        Raises:
            ValueError, RuntimeError: see the class.
        """
        return await self._answer(CompletionRequest, request)

    async def chat(self, request: dict[str, Any]) -> dict[str, Any]:
        """The body of `POST /v1/chat/completions` for the same fields.

        Raises:
            ValueError, RuntimeError: see the class.
        """
        return await self._answer(ChatRequest, request)

    async def stream(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed `POST /v1/completions`, as dicts; call with `.options(stream=True)`.

        Raises:
            ValueError, RuntimeError: see the class.
        """
        async with aclosing(self._pieces(CompletionRequest, request)) as pieces:
            async for piece in pieces:
                yield piece

    async def stream_chat(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed `POST /v1/chat/completions`, as dicts; call with `.options(stream=True)`.

        Raises:
            ValueError, RuntimeError: see the class.
        """
        async with aclosing(self._pieces(ChatRequest, request)) as pieces:
            async for piece in pieces:
                yield piece

    async def _answer(
        self, body: type[CompletionRequest] | type[ChatRequest], request: dict[str, Any]
    ) -> dict[str, Any]:
        try:
            answer = await self.service.complete(body.model_validate(request))
        except Exception as error:
            raise _portable(error) from None
        return answer.model_dump()

    async def _pieces(
        self, body: type[CompletionRequest] | type[ChatRequest], request: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        try:
            pieces = self.service.stream(body.model_validate({**request, "stream": True}))
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece.model_dump()
        except Exception as error:
            raise _portable(error) from None


class HandleBackend:
    """The `Backend` behind Serve handles. Every call it starts is awaited, cancelled or watched."""

    def __init__(
        self, predictor: DeploymentHandle | None, executor: DeploymentHandle, store: DeploymentHandle
    ) -> None:
        self._predictor = predictor
        self._executor = executor
        self._generate = executor.options(stream=True).generate
        self._store = store
        self._watches: set[asyncio.Task[None]] = set()
        self._predictions = {"started": 0, "failed": 0}

    def predict(self, request: GenerationRequest) -> None:
        if self._predictor is None:
            return
        self._predictions["started"] += 1
        watch = asyncio.create_task(self._predict(self._predictor, request))
        self._watches.add(watch)  # the event loop keeps no strong reference of its own
        watch.add_done_callback(self._watches.discard)

    async def _predict(self, predictor: DeploymentHandle, request: GenerationRequest) -> None:
        try:
            await predictor.predict.remote(request.request_id, list(request.prompt_token_ids))
        except Exception as error:  # the request goes on without its table, on demand
            self._predictions["failed"] += 1
            logger.warning("no prediction for %s: %s: %s", request.request_id, type(error).__name__, error)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        chunks = self._generate.remote(request)
        try:
            async for chunk in chunks:
                yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            chunks.cancel()
            raise

    async def expert_report(self) -> dict[str, Any]:
        store, executors = await asyncio.gather(self._describe_store(), self._ask_executors("expert_report"))
        return {"store": store, "predictions": dict(self._predictions), **executors}

    async def live_view(self) -> dict[str, Any]:
        return await self._ask_executors("live_view")

    async def _ask_executors(self, method: str) -> dict[str, Any]:
        answers = await self._executor.broadcast(method).results_async(return_exceptions=True)
        return {
            "executors": [answer for answer in answers if not isinstance(answer, BaseException)],
            "unreachable_executors": sum(isinstance(answer, BaseException) for answer in answers),
        }

    async def _describe_store(self) -> dict[str, Any] | None:
        try:
            async with asyncio.timeout(_STORE_ANSWER_S):
                description: dict[str, Any] = await self._store.describe.remote()
                return description
        except Exception as error:  # executors serve on while Serve brings it back, and so do their figures
            logger.warning(
                "the expert store does not tell what it holds: %s: %s", type(error).__name__, error
            )
            return None


def _portable(error: Exception) -> Exception:
    """The error as a builtin exception, which any process can unpickle."""
    reply = reply_to(error)
    text = json.dumps(reply.body)
    return RuntimeError(text) if reply.status >= 500 else ValueError(text)
