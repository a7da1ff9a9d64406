from typing import Any

import pytest
from pydantic import ValidationError

from common.errors import RequestError
from common.generation import SamplingParams
from deployments.chat_schema import ChatDelta, ChatRequest
from deployments.openai_errors import invalid_field

MESSAGES = [{"role": "user", "content": "Hi"}]


def parse(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": MESSAGES, **fields})


def refusal(**fields: Any) -> RequestError:
    """The error for fields that are refused, whether a validator of ours or pydantic refused them."""
    try:
        parse(**fields)
    except RequestError as error:
        return error
    except ValidationError as error:
        return invalid_field(error.errors())
    raise AssertionError(f"{fields} were accepted")


def test_content_is_text_or_a_list_of_text_parts() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    request = parse(messages=[{"role": "system", "content": ""}, {"role": "user", "content": parts}])
    assert [message.content for message in request.messages] == ["", "one\ntwo"]


def test_an_answer_can_be_sent_back_with_all_that_it_lacks() -> None:
    answer = {"role": "assistant", "content": "Hi", "tool_calls": None, "refusal": None}
    (message,) = parse(messages=[answer]).messages
    assert message.model_dump(exclude_none=True) == {"role": "assistant", "content": "Hi"}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": []}], "messages.0.content"),
        ([{"role": "user", "content": ["Hi"]}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages.0.content"),
        ([{"role": "pirate", "content": "Hi"}], "messages.0.role"),
        ([*MESSAGES, {"role": "assistant", "content": "Hi", "tool_calls": []}], "messages.1.tool_calls"),
    ],
)
def test_other_messages_are_refused_by_name(messages: Any, param: str) -> None:
    error = refusal(messages=messages)
    assert error.param == param
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("field", "default", "other"),
    [
        ("tools", [], [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "none", "auto"),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("modalities", ["text"], ["text", "audio"]),
        ("store", False, True),
        ("presence_penalty", 0, 0.5),
        ("frequency_penalty", 0.0, -1),
        ("logit_bias", {}, {"50": 1}),
    ],
)
def test_what_would_change_the_result_is_refused_unless_default(field: str, default: Any, other: Any) -> None:
    assert parse(**{field: default}) == parse(**{field: None}) == parse()
    error = refusal(**{field: other})
    assert error.param == field
    assert "not supported here" in str(error)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": 6, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True}, "echo"),
        ({"best_of": 1}, "best_of"),
        ({"prompt": "Hi"}, "prompt"),
    ],
)
def test_what_does_not_go_together_or_is_unknown_is_refused(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param


def test_both_names_of_the_token_limit_are_taken() -> None:
    assert parse().token_limit is None
    assert parse(max_tokens=3).token_limit == parse(max_completion_tokens=3).token_limit == 3
    assert parse(max_tokens=3, max_completion_tokens=3).token_limit == 3


def test_becomes_sampling_params() -> None:
    assert parse().sampling(5, None) == SamplingParams(max_tokens=5)
    assert parse(logprobs=True).sampling(5, None).logprobs == 0
    assert parse(logprobs=True, top_logprobs=3).sampling(5, None).logprobs == 3


def test_a_delta_without_a_role_does_not_name_it() -> None:
    assert ChatDelta(content="x").model_dump() == {"content": "x"}
    assert ChatDelta(role="assistant", content="").model_dump() == {"role": "assistant", "content": ""}


def test_a_long_list_of_tools_is_not_repeated_in_its_error() -> None:
    assert len(str(refusal(tools=["x" * 10_000] * 100))) < 500
