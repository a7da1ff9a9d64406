"""What the OpenAPI document says, and whether the application answers as it says, for requests made from it."""

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi import checks

from deployments.classification import ClassificationService
from deployments.completions import CompletionService
from deployments.http_api import create_http_api
from deployments.prompts import PromptReader
from tests.deployments.fakes import CHAT_TEMPLATE, LABELS, VOCAB_SIZE, EchoBackend, byte_tokenizer

CONTEXT_LIMIT = 300

reader = PromptReader(byte_tokenizer(CHAT_TEMPLATE), VOCAB_SIZE, CONTEXT_LIMIT)
service = CompletionService("tiny", reader, EchoBackend())
classification = ClassificationService("tiny", reader, EchoBackend(), LABELS)
api = create_http_api(service, api_key=None, classification=classification)
operations = schemathesis.openapi.from_asgi("/openapi.json", api)
answered: Counter[tuple[str, int]] = Counter()


@operations.parametrize()
@settings(
    max_examples=25, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
def test_answers_as_documented(case: schemathesis.Case) -> None:
    # A schema knows neither the vocabulary nor the context, so some of what it allows is refused.
    response = case.call_and_validate(excluded_checks=[checks.positive_data_acceptance])
    answered[case.path, response.status_code] += 1


GENERATIONS = ["/v1/completions", "/v1/chat/completions"]


@pytest.mark.parametrize("path", [*GENERATIONS, "/classify", "/tokenize", "/detokenize"])
def test_answers_of_both_kinds_were_among_them(path: str) -> None:
    if not answered:
        pytest.skip("it looks at what test_answers_as_documented was answered")
    assert answered[path, 200] > 2
    assert answered[path, 400] > 2


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return api.openapi()


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    name = schema["$ref"].removeprefix("#/components/schemas/")
    found: dict[str, Any] = document["components"]["schemas"][name]
    return found


def test_every_error_answer_has_openais_form_and_none_is_a_422(document: dict[str, Any]) -> None:
    documented = {
        (path, method): {int(status) for status in operation["responses"]}
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert all(422 not in statuses for statuses in documented.values())
    assert all(401 in statuses for (path, _), statuses in documented.items() if path != "/health")
    for path in (*GENERATIONS, "/classify"):
        assert documented[path, "post"] == {200, 400, 401, 404, 503}
    for methods in document["paths"].values():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                if status != "200":
                    error = resolved(document, answer["content"]["application/json"]["schema"])
                    assert error["title"] == "ErrorBody"


@pytest.mark.parametrize(
    ("path", "answer"), [("/v1/completions", "Completion"), ("/v1/chat/completions", "ChatCompletion")]
)
def test_generations_are_documented_whole_and_streamed(
    document: dict[str, Any], path: str, answer: str
) -> None:
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    assert resolved(document, content["application/json"]["schema"])["title"] == answer
    assert content["text/event-stream"]["schema"] == {"type": "string"}
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = resolved(document, body)
    assert fields["additionalProperties"] is False
    assert {"n", "min_tokens", "stream_options", "logprobs"} <= fields["properties"].keys()
    assert fields["properties"]["presence_penalty"]["anyOf"][0]["const"] == 0


def test_the_other_bodies_are_documented(document: dict[str, Any]) -> None:
    for method, path, answer in (
        ("post", "/classify", "Classification"),
        ("post", "/tokenize", "Tokenized"),
        ("post", "/detokenize", "Detokenized"),
        ("get", "/version", "Version"),
    ):
        content = document["paths"][path][method]["responses"]["200"]["content"]
        assert resolved(document, content["application/json"]["schema"])["title"] == answer
