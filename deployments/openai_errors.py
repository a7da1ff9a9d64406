"""Exceptions as the OpenAI API shows them: status, headers and body. The one place that knows Ray's exceptions."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from ray.exceptions import NodeDiedError, RayActorError, RayTaskError, TaskCancelledError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from common.errors import (
    EngineStoppedError,
    InvalidParameterError,
    QueueFullError,
    RequestError,
    ServingError,
    Shortened,
)
from deployments.openai_schema import ErrorBody, ErrorDetail, ErrorKind

logger = logging.getLogger("ray.serve")

RETRY_AFTER_S = 1

_DEATHS = (RayActorError, NodeDiedError, WorkerCrashedError, TaskCancelledError, DeploymentUnavailableError)


@dataclass(frozen=True)
class ErrorReply:
    """One error on its way to a client."""

    status: int
    headers: dict[str, str]
    body: dict[str, Any]


def reply_to(error: BaseException) -> ErrorReply:
    """Translate an exception; one that nobody expected is logged and shown without its details."""
    meaning = serving_error(error)
    headers = {"retry-after": str(RETRY_AFTER_S)} if meaning.retryable else {}
    if meaning.status == 401:
        headers["www-authenticate"] = "Bearer"
    return error_reply(meaning.status, str(meaning), meaning.code, meaning.param, headers)


def error_reply(
    status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
) -> ErrorReply:
    kind: ErrorKind = "server_error" if status >= 500 else "invalid_request_error"
    detail = ErrorDetail(message=_encodable(message), type=kind, param=param and _encodable(param), code=code)
    return ErrorReply(status, headers or {}, ErrorBody(error=detail).model_dump())


def error_code(error: BaseException) -> str:
    """The code that `reply_to` gives an exception; logs nothing."""
    return (_known_error(error) or ServingError()).code


def _encodable(text: str) -> str:
    """Names of unknown fields may hold half of a surrogate pair, which UTF-8 cannot write."""
    return text.encode(errors="backslashreplace").decode()


def serving_error(error: BaseException) -> ServingError:
    """The error of our tree that an exception amounts to, wherever it was raised."""
    known = _known_error(error)
    if known is not None:
        return known
    logger.error("unexpected error while answering a request", exc_info=error)
    return ServingError("an internal error; the server's log has the details")


def _known_error(error: BaseException) -> ServingError | None:
    cause = _without_ray(error)
    if isinstance(cause, ServingError):
        return cause
    if isinstance(cause, ValidationError):
        return invalid_field(cause.errors(include_url=False))
    if isinstance(cause, BackPressureError):
        return QueueFullError(*cause.args[:2])
    if isinstance(cause, _DEATHS):
        return EngineStoppedError(type(cause).__name__)
    return None


def invalid_field(problems: Sequence[Any]) -> RequestError:
    """The first of pydantic's problems, in one line that names the field, its value and what is allowed."""
    problem = problems[0]
    path = [str(part) for part in problem["loc"] if part != "body"]
    param, value = ".".join(path) or "body", Shortened(problem["input"])
    if problem["type"] == "json_invalid":
        return InvalidParameterError("body", Shortened("..."), f"not JSON: {problem['ctx']['error']}")
    if problem["type"] == "extra_forbidden":
        return InvalidParameterError(param, value, "there is no such field")
    if problem["type"] == "missing":
        return InvalidParameterError(param, None, "the field is required")
    message = problem["msg"].removeprefix("Value error, ")
    return InvalidParameterError(param, value, message[:1].lower() + message[1:])


def _without_ray(error: BaseException) -> BaseException:
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error
