"""Every error crosses processes as Ray carries it (pickled, rebuilt from its args) and says what to do."""

import inspect
import pickle
from typing import Any

import pytest

from common import errors
from common.errors import ServingError

ARGUMENTS: dict[str, Any] = {
    "key": "expert_slots",
    "value": "many",
    "allowed": "a count, a percentage or bytes",
    "path": "/models/m",
    "problem": "no config.json there",
    "needed_bytes": 61_000_000_000,
    "available_bytes": 20_000_000_000,
    "remedy": "give more",
    "num_bytes": 61_000_000_000,
    "cuda_error": "out of memory (2)",
    "slots": 3,
    "top_k": 8,
    "param": "temperature",
    "token_id": 70_000,
    "vocab_size": 50_000,
    "prompt_tokens": 4_000,
    "max_tokens": 200,
    "limit": 4_096,
    "model": "other",
    "served": "reference",
    "waiting": 64,
    "reason": "it was stopped",
    "layer": 3,
    "expert_id": 17,
    "waited_s": 30.0,
}


def subclasses(root: type[ServingError]) -> list[type[ServingError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in subclasses(child))]


def make(error: type[ServingError]) -> ServingError:
    if error.__init__ is Exception.__init__:
        return error("something happened")
    names = [
        name
        for name in inspect.signature(error.__init__).parameters
        if name not in ("self", "args", "kwargs")
    ]
    return error(*(ARGUMENTS.get(name, f"some {name}") for name in names))


EVERY_ERROR = [error for error in subclasses(ServingError) if error.__module__ == errors.__name__]


def test_the_tree_is_found() -> None:
    assert len(EVERY_ERROR) >= 19


@pytest.mark.parametrize("error", EVERY_ERROR)
def test_survives_pickling_with_its_type_message_and_fields(error: type[ServingError]) -> None:
    original = make(error)
    copy = pickle.loads(pickle.dumps(original))
    assert type(copy) is error
    assert str(copy) == str(original)
    assert vars(copy) == vars(original)


@pytest.mark.parametrize("error", EVERY_ERROR)
def test_is_rebuilt_from_its_args_as_ray_does(error: type[ServingError]) -> None:
    original = make(error)
    assert str(error(*original.args)) == str(original)


@pytest.mark.parametrize("error", EVERY_ERROR)
def test_message_is_one_line_that_holds_its_arguments(error: type[ServingError]) -> None:
    message = str(make(error))
    assert message
    assert "\n" not in message


@pytest.mark.parametrize("error", EVERY_ERROR)
def test_unavailable_means_try_again_and_a_bad_request_does_not(error: type[ServingError]) -> None:
    assert error.retryable or error.status != 503
    assert not (error.retryable and error.status < 500)
    assert 400 <= error.status < 600


@pytest.mark.parametrize("error", EVERY_ERROR)
def test_stands_in_the_tree_of_the_docstring(error: type[ServingError]) -> None:
    assert errors.__doc__ is not None
    assert error.__name__ in errors.__doc__


def test_codes_are_distinct() -> None:
    leaves = [error for error in EVERY_ERROR if not error.__subclasses__()]
    assert len({error.code for error in leaves}) == len(leaves)
