from typing import Any

import pytest
from pydantic import ValidationError

from common.errors import InvalidParameterError, RequestError
from common.generation import ExpertUsage, SamplingParams
from deployments.openai_errors import invalid_field
from deployments.openai_schema import CompletionRequest, ExpertFigures


def parse(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "x", **fields})


def refusal(**fields: Any) -> RequestError:
    """The error for fields that are refused, whether a validator of ours or pydantic refused them."""
    try:
        parse(**fields)
    except RequestError as error:
        return error
    except ValidationError as error:
        return invalid_field(error.errors())
    raise AssertionError(f"{fields} were accepted")


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("one", ["one"]),
        ([1, 2], [[1, 2]]),
        (["one", "two"], ["one", "two"]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["one", [3]], ["one", [3]]),
        ("", [""]),  # whether that is a prompt is the tokenizer's to say
    ],
)
def test_a_prompt_is_text_or_token_ids_or_several_of_them(prompt: Any, prompts: list[Any]) -> None:
    assert parse(prompt=prompt).prompt == prompts


@pytest.mark.parametrize("prompt", [[], [[]], 5, {"a": 1}, [1, "a"], [1.5], [True], ["x"] * 65])
def test_other_prompts_are_refused(prompt: Any) -> None:
    error = refusal(prompt=prompt)
    assert error.param == "prompt"
    assert "text, a list of token ids, or a list of 1 to 64 of either" in str(error)


def test_a_missing_prompt_is_named() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({})
    assert str(invalid_field(caught.value.errors())) == "prompt=None is not possible: the field is required"


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_tokens", 0, "greater than or equal to 1"),
        ("max_tokens", "5", "valid integer"),
        ("temperature", -0.1, "greater than or equal to 0"),
        ("temperature", 2.1, "less than or equal to 2"),
        ("temperature", "hot", "valid number"),
        ("top_p", 0, "greater than 0"),
        ("top_p", 1.1, "less than or equal to 1"),
        ("top_k", -2, "greater than or equal to -1"),
        ("logprobs", 6, "less than or equal to 5"),
        ("logprobs", True, "valid integer"),
        ("stop", "", "a text that is not empty, or a list of up to 16 of them"),
        ("stop", ["a"] * 17, "a list of up to 16 of them"),
        ("stop", [1], "a text that is not empty"),
        ("seed", 2**63, "less than or equal to"),
        ("ignore_eos", "yes", "valid boolean"),
        ("n", 0, "greater than or equal to 1"),
        ("n", 17, "less than or equal to 16"),
        ("n", True, "valid integer"),
        ("best_of", 2, "only n (1) is accepted"),
        ("echo", 1, "valid boolean"),
        ("min_tokens", -1, "greater than or equal to 0"),
        ("stream_options", {"include_usage": True}, "only with stream=true"),
    ],
)
def test_an_impossible_value_is_refused_by_name(field: str, value: Any, allowed: str) -> None:
    error = refusal(**{field: value})
    assert error.param == field
    assert str(error).startswith(f"{field}=")
    assert allowed in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("field", "default", "other"),
    [
        ("presence_penalty", 0, False),
        ("suffix", "", "end"),
        ("presence_penalty", 0, 0.5),
        ("frequency_penalty", 0.0, -1),
        ("logit_bias", {}, {"50": 1}),
    ],
)
def test_what_would_change_the_result_is_refused_unless_default(field: str, default: Any, other: Any) -> None:
    assert parse(**{field: default}) == parse()
    error = refusal(**{field: other})
    assert error.param == field
    assert "not supported here" in str(error)


def test_what_changes_nothing_is_accepted() -> None:
    assert parse(user="me", metadata={"run": "1"}).sampling(16, None) == SamplingParams()


def test_an_unknown_field_is_refused_by_name() -> None:
    error = refusal(tempreature=1)
    assert (error.param, str(error)) == (
        "tempreature",
        "tempreature=1 is not possible: there is no such field",
    )


def test_null_counts_as_not_given() -> None:
    fields = [
        "max_tokens", "temperature", "stop", "logprobs", "n", "best_of", "echo", "min_tokens", "suffix", "stream",
        "logit_bias",
    ]  # fmt: skip
    assert parse(**dict.fromkeys(fields)) == parse()


def test_becomes_sampling_params() -> None:
    request = parse(
        max_tokens=3, temperature=0, top_p=0.5, top_k=-1, seed=9, stop="end", logprobs=0, ignore_eos=True,
        min_tokens=2,
    )  # fmt: skip
    assert request.token_limit == 3
    assert request.sampling(3, default_seed=1) == SamplingParams(3, 0.0, 0.5, 0, 9, ("end",), 0, True, 2)
    assert parse().sampling(16, default_seed=1).seed == 1


def test_every_choice_of_a_prompt_has_a_seed_of_its_own() -> None:
    assert [parse(seed=9).sampling(3, 1, choice).seed for choice in range(3)] == [9, 10, 11]
    assert [parse().sampling(3, None, choice).seed for choice in range(2)] == [None, None]
    assert parse(seed=2**63 - 1).sampling(3, None, choice=1).seed == -(2**63), "samplers take 64 bits"


def test_min_tokens_is_at_most_max_tokens() -> None:
    assert parse(min_tokens=4).sampling(4, None).min_tokens == 4
    with pytest.raises(
        InvalidParameterError, match="min_tokens=4 is not possible: at most max_tokens, 3 here"
    ):
        parse(min_tokens=4).sampling(3, None)


def test_best_of_is_n_and_echo_has_no_logprobs() -> None:
    assert parse(n=3, best_of=3).n == 3
    assert refusal(n=3, best_of=1).param == "best_of"
    assert parse(echo=True).echo
    error = refusal(echo=True, logprobs=0)
    assert (error.param, "logprobs" in str(error)) == ("echo", True)


def test_expert_figures_give_the_hit_rate() -> None:
    figures = ExpertFigures.of(ExpertUsage(needed=10, predicted=8, missed=3, moved_bytes=5))
    assert figures.hit_rate == 0.7
    assert ExpertFigures.of(ExpertUsage()).hit_rate is None
