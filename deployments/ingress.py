"""The ingress deployment: HTTP for clients, and the same answers as plain dicts for other Ray applications.

A thin shell: the work is in `completions.py`, the routes in `http_api.py`.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from common.config import ServingConfig
from common.errors import UnavailableError
from common.generation import GenerationChunk, GenerationRequest
from common.tokenizer import load_tokenizer
from deployments.chat_schema import ChatRequest
from deployments.classification import ClassificationService
from deployments.classify_schema import ClassificationRequest
from deployments.completions import CompletionService
from deployments.http_api import create_http_api
from deployments.openai_errors import reply_to
from deployments.openai_schema import CompletionRequest
from deployments.prompts import PromptReader
from deployments.request_metrics import ObservedBackend, RequestMetrics

logger = logging.getLogger("ray.serve")

_STORE_ANSWER_S = 2.0
_PREDICTION_S = 60.0  # Serve lets a call wait for ever while there is no predictor
_EXECUTOR_ANSWERS_S = 10.0
_EXECUTOR_STARTS_S = 600.0
_LOOK_AGAIN_S = 10.0  # whether there is an executor, while a request has no answer


@dataclass(frozen=True)
class ServedModel:
    """What the ingress has to know of the model."""

    vocab_size: int
    has_encoder: bool = False  # which reads prompts
    labels: tuple[str, ...] = ()  # of a classifier


class Ingress:
    """Where requests enter, by HTTP or through a Serve handle.

    Handle calls take and give plain dicts, so that callers need nothing of this project. Their errors are a
    ValueError (the request is at fault) or a RuntimeError (the server is) whose text is OpenAI's error body as JSON.
    """

    def __init__(
        self,
        config: ServingConfig,
        model: ServedModel,
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
        reader = PromptReader(
            load_tokenizer(config.model), model.vocab_size, config.max_context_tokens, model.has_encoder
        )
        self._api_key = config.api_key
        self._metrics = RequestMetrics()
        backend = ObservedBackend(HandleBackend(predictor, executor, store), self._metrics)
        self.service = CompletionService(
            config.served_name, reader, backend, config.seed, generates=not model.labels
        )
        self.classification = ClassificationService(config.served_name, reader, backend, model.labels)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_http_api(self.service, self._api_key, self._metrics, self.classification)

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

    async def classify(self, request: dict[str, Any]) -> dict[str, Any]:
        """The body of `POST /classify` for the same fields.

        Raises:
            ValueError, RuntimeError: see the class.
        """
        try:
            answer = await self.classification.classify(ClassificationRequest.model_validate(request))
        except Exception as error:
            raise _portable(error) from None
        return answer.model_dump()

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
            async with asyncio.timeout(_PREDICTION_S):
                await predictor.predict.remote(request.request_id, list(request.prompt_token_ids))
        except Exception as error:  # the request goes on without its table, on demand
            self._predictions["failed"] += 1
            logger.warning("no prediction for %s: %s: %s", request.request_id, type(error).__name__, error)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        chunks = self._generate.remote(request)
        try:
            yield await self._first(chunks)
            async for chunk in chunks:
                yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            chunks.cancel()
            raise

    async def _first(self, chunks: DeploymentResponseGenerator) -> GenerationChunk:
        """The first chunk. Serve lets a call wait for an executor for ever, even when none can start."""
        first = asyncio.ensure_future(anext(chunks))
        wait_until_s = time.monotonic() + _EXECUTOR_STARTS_S
        try:
            while not (await asyncio.wait({first}, timeout=_LOOK_AGAIN_S))[0]:
                if await self._an_executor_runs():
                    wait_until_s = time.monotonic() + _EXECUTOR_STARTS_S
                elif time.monotonic() > wait_until_s:
                    raise UnavailableError(f"no executor has answered within {_EXECUTOR_STARTS_S:g} s")
            chunk: GenerationChunk = first.result()
            return chunk
        finally:
            if first.cancel():
                chunks.cancel()

    async def _an_executor_runs(self) -> bool:
        """
        Raises:
            UnavailableError: Serve has given up starting one.
        """
        call = self._executor.check_health.remote()
        try:
            async with asyncio.timeout(_EXECUTOR_ANSWERS_S):
                await call
        except TimeoutError:
            call.cancel()
            return False
        except DeploymentUnavailableError as error:
            raise UnavailableError("no executor can start; the log of the last one tells why") from error
        except Exception:
            return True  # in whatever state; Serve sees to it
        return True

    async def expert_report(self) -> dict[str, Any]:
        store, executors = await asyncio.gather(self._describe_store(), self._ask_executors("expert_report"))
        return {"store": store, "predictions": dict(self._predictions), **executors}

    async def live_view(self) -> dict[str, Any]:
        return await self._ask_executors("live_view")

    async def _ask_executors(self, method: str) -> dict[str, Any]:
        try:
            asked = self._executor.broadcast(method)
            answers = await asked.results_async(timeout_s=_EXECUTOR_ANSWERS_S, return_exceptions=True)
        except DeploymentUnavailableError:  # there is none, as after scaling to zero
            answers = []
        except TimeoutError as error:
            raise UnavailableError(f"an executor does not answer within {_EXECUTOR_ANSWERS_S:g} s") from error
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
