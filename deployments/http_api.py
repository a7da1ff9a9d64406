"""The OpenAI-compatible HTTP routes over a `CompletionService`, and vLLM's for classification. A plain FastAPI application; Ray is not known here."""

import hmac
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from common.errors import AuthenticationError, ModelNotFoundError
from deployments.chat_schema import ChatCompletion, ChatRequest
from deployments.classification import ClassificationService
from deployments.classify_schema import Classification, ClassificationRequest
from deployments.completions import CompletionService, Piece, peek
from deployments.observation_routes import add_observation_routes
from deployments.openai_errors import ErrorReply, error_reply, invalid_field, reply_to
from deployments.openai_schema import Completion, CompletionRequest, ErrorBody, ModelCard, ModelList
from deployments.request_metrics import RequestMetrics
from deployments.tokenize_schema import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest, Version

_PACKAGE = "sida-serve"


def create_http_api(
    service: CompletionService,
    api_key: str | None,
    metrics: RequestMetrics | None = None,
    classification: ClassificationService | None = None,
) -> FastAPI:
    """The application that a deployment serves.

    Args:
        api_key: what clients must send as a bearer token, everywhere but at /health and for the page at /; None lets
            everybody in.
        metrics: what the service's backend observes, for /metrics.
        classification: for a model that classifies; None: /classify says that it does not.
    """
    api = _Api(
        title=_PACKAGE,
        version=_version(),
        description="OpenAI-compatible serving of Mixture-of-Experts models",
    )
    api.router.route_class = _AnsweringRoute
    api.add_exception_handler(HTTPException, _answer_no_route)
    guards = [Depends(_key_check(api_key))] if api_key else []
    _add_routes(api, service, guards)
    _add_generation_routes(api, service, guards)
    if classification is None:
        classification = ClassificationService(
            service.served_name, service.reader, service.backend, labels=()
        )
    _add_classification_route(api, classification, guards)
    _add_tokenizer_routes(api, service, guards)
    add_observation_routes(api, service.backend, metrics or RequestMetrics(), guards)
    return api


class _Api(FastAPI):
    """A FastAPI whose document leaves out what this one never answers: 422, for every bad body is a 400."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document


def _version() -> str:
    try:
        return version(_PACKAGE)
    except PackageNotFoundError:  # it runs from a folder, as on a cluster with a working_dir
        return "unknown"


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, for its document."""
    return {status: {"model": ErrorBody} for status in statuses}


def _add_routes(api: FastAPI, service: CompletionService, guards: list[Any]) -> None:
    model = ModelCard(
        id=service.served_name, created=int(time.time()), max_model_len=service.reader.context_limit
    )

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/version", dependencies=guards, responses=_errors(401))
    async def package_version() -> Version:
        return Version(version=api.version)

    @api.get("/v1/models", dependencies=guards, responses=_errors(401))
    async def models() -> ModelList:
        return ModelList(data=[model])

    @api.get("/v1/models/{name:path}", dependencies=guards, responses=_errors(401, 404))
    async def one_model(name: str) -> ModelCard:
        if name != model.id:
            raise ModelNotFoundError(name, model.id)
        return model

    @api.get("/v1/experts", dependencies=guards, responses=_errors(401, 503))
    async def experts() -> dict[str, Any]:
        return await service.backend.expert_report()


def _add_generation_routes(api: FastAPI, service: CompletionService, guards: list[Any]) -> None:
    events = {"text/event-stream": {"schema": {"type": "string"}}}  # with stream=true
    answers = {200: {"content": events}, **_errors(400, 401, 404, 503)}

    @api.post("/v1/completions", dependencies=guards, response_model=Completion, responses=answers)
    async def completions(request: CompletionRequest) -> Response:
        return await answer(request)

    @api.post("/v1/chat/completions", dependencies=guards, response_model=ChatCompletion, responses=answers)
    async def chat_completions(request: ChatRequest) -> Response:
        return await answer(request)

    async def answer(request: CompletionRequest | ChatRequest) -> Response:
        if not request.stream:
            return JSONResponse((await service.complete(request)).model_dump())
        # Errors before the first token still have a status of their own.
        return _ClosingStream(_events(await peek(service.stream(request))), media_type="text/event-stream")


def _add_classification_route(api: FastAPI, service: ClassificationService, guards: list[Any]) -> None:
    @api.post("/classify", dependencies=guards, responses=_errors(400, 401, 404, 503))
    async def classify(request: ClassificationRequest) -> Classification:
        return await service.classify(request)


def _add_tokenizer_routes(api: FastAPI, service: CompletionService, guards: list[Any]) -> None:
    reader = service.reader

    @api.post("/tokenize", dependencies=guards, responses=_errors(400, 401))
    async def tokenize(request: TokenizeRequest) -> Tokenized:
        if request.messages is not None:
            tokens = reader.encode_messages(request.messages)
        else:
            assert request.prompt is not None
            tokens = reader.encode(request.prompt, request.add_special_tokens is not False)
        return Tokenized(tokens=tokens, count=len(tokens), max_model_len=reader.context_limit)

    @api.post("/detokenize", dependencies=guards, responses=_errors(400, 401))
    async def detokenize(request: DetokenizeRequest) -> Detokenized:
        return Detokenized(prompt=reader.decode(request.tokens, "tokens"))


async def _events(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[str, None]:
    """Server-sent events, one per piece, and the end mark; a late error is an event of its own."""
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                yield f"data: {piece.model_dump_json(exclude=_unset(piece))}\n\n"
        except Exception as error:  # the status line is long gone
            yield f"data: {json.dumps(reply_to(error).body)}\n\n"
    yield "data: [DONE]\n\n"


def _unset(piece: Piece) -> set[str]:
    return {"usage"} if piece.usage is None else set()


class _ClosingStream(StreamingResponse):
    """Closes its generator as soon as the client has gone, instead of whenever it is collected."""

    def __init__(self, events: AsyncGenerator[str, None], media_type: str) -> None:
        super().__init__(events, media_type=media_type, headers={"cache-control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def _key_check(api_key: str) -> Callable[[Request], Awaitable[None]]:
    expected = f"Bearer {api_key}".encode()

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, expected):
            raise AuthenticationError()

    return check


class _AnsweringRoute(APIRoute):
    """A route that answers every error in OpenAI's form."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException:  # a body that cannot be read at all
                raise
            except RequestValidationError as error:
                return _json(reply_to(invalid_field(error.errors())))
            except Exception as error:  # `reply_to` logs what it does not know
                return _json(reply_to(error))

        return answer


async def _answer_no_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {400: "invalid_request", 404: "route_not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "http_error")
    return _json(error_reply(error.status_code, str(error.detail), code, headers=dict(error.headers or {})))


def _json(reply: ErrorReply) -> JSONResponse:
    return JSONResponse(reply.body, reply.status, reply.headers)
