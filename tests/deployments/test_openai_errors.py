import logging
import pickle

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError

from common.errors import AuthenticationError, ContextTooLongError, QueueFullError
from deployments.openai_errors import reply_to


def from_ray(cause: Exception) -> BaseException:
    """What a caller of another process gets when `cause` is raised there."""
    return RayTaskError("function", "Traceback", cause, "proctitle", 1, "127.0.0.1").as_instanceof_cause()


@pytest.mark.parametrize("wrap", [lambda error: error, from_ray, lambda error: from_ray(from_ray(error))])
def test_an_error_of_the_tree_keeps_its_status_and_text(wrap: type) -> None:
    reply = reply_to(wrap(ContextTooLongError(5, 6, 7)))
    assert reply.status == 400
    assert reply.body["error"] == {
        "message": "the prompt has 5 tokens and max_tokens is 6, together 11; the limit is 7",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "context_length_exceeded",
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (QueueFullError(4, 4), "queue_full"),
        (BackPressureError(4, 4), "queue_full"),
        (from_ray(BackPressureError(4, 4)), "queue_full"),
        (ActorDiedError(), "engine_stopped"),
        (TaskCancelledError(), "engine_stopped"),
    ],
)
def test_what_passes_says_when_to_retry(error: Exception, code: str) -> None:
    reply = reply_to(error)
    assert (reply.status, reply.body["error"]["code"]) == (503, code)
    assert reply.headers["retry-after"] == "1"
    assert reply.body["error"]["type"] == "server_error"


def test_a_missing_key_is_challenged() -> None:
    assert reply_to(AuthenticationError()).headers["www-authenticate"] == "Bearer"


def test_an_unexpected_error_is_logged_and_its_details_hidden(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    try:
        reply = reply_to(KeyError("secret detail"))
    finally:
        logger.removeHandler(caplog.handler)
    assert (reply.status, reply.body["error"]["code"]) == (500, "internal_error")
    assert "secret" not in str(reply.body)
    assert "secret detail" in caplog.text


def test_replies_survive_pickle() -> None:
    reply = reply_to(QueueFullError(4, 4))
    assert pickle.loads(pickle.dumps(reply)) == reply
