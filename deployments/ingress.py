"""The ingress deployment: HTTP for clients, and the same completions as plain dicts for other Ray applications.

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
from deployments.completions import CompletionService
from deployments.http_api import create_http_api
from deployments.openai_errors import reply_to
from deployments.openai_schema import CompletionRequest
from deployments.prompts import PromptReader

logger = logging.getLogger("ray.serve")


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
        self.service = CompletionService(
            config.served_name, reader, HandleBackend(predictor, executor, store), config.seed
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_http_api(self.service, self._api_key)

    async def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """The body of `POST /v1/completions` for the same fields.

        Raises:
            ValueError, RuntimeError: see the class.
        """
        try:
            completion = await self.service.complete(CompletionRequest.model_validate(request))
        except Exception as error:
            raise _portable(error) from None
        return completion.model_dump()

    async def stream(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed `POST /v1/completions`, as dicts; call with `.options(stream=True)`.

        Raises:
            ValueError, RuntimeError: see the class.
        """
        try:
            pieces = self.service.stream(CompletionRequest.model_validate({**request, "stream": True}))
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
        executors = self._executor.broadcast("expert_report").results_async(return_exceptions=True)
        store, reports = await asyncio.gather(self._store.describe.remote(), executors)
        return {
            "store": store,
            "predictions": dict(self._predictions),
            "executors": [report for report in reports if not isinstance(report, BaseException)],
            "unreachable_executors": sum(isinstance(report, BaseException) for report in reports),
        }


def _portable(error: Exception) -> Exception:
    """The error as a builtin exception, which any process can unpickle."""
    reply = reply_to(error)
    text = json.dumps(reply.body)
    return RuntimeError(text) if reply.status >= 500 else ValueError(text)
