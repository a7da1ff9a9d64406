"""`POST /classify` and the handle's `classify`: what comes back, and what is refused."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.config import ServingConfig
from deployments import ingress
from deployments.classification import ClassificationService, probabilities
from deployments.completions import CompletionService
from deployments.http_api import create_http_api
from deployments.ingress import Ingress, ServedModel
from deployments.prompts import PromptReader
from tests.deployments.fakes import (
    LABELS,
    VOCAB_SIZE,
    EchoBackend,
    byte_tokenizer,
    token_ids,
    write_tokenizer,
)

LIMIT = 20


@pytest.fixture
def backend() -> EchoBackend:
    return EchoBackend()


@pytest.fixture
async def client(backend: EchoBackend) -> AsyncIterator[httpx.AsyncClient]:
    """Of a classifier."""
    reader = PromptReader(byte_tokenizer(), VOCAB_SIZE, LIMIT, has_encoder=True)
    service = CompletionService("tiny", reader, backend, generates=False)
    classification = ClassificationService("tiny", reader, backend, LABELS)
    async with client_of(create_http_api(service, None, classification=classification)) as client:
        yield client


@pytest.fixture
async def generating(backend: EchoBackend) -> AsyncIterator[httpx.AsyncClient]:
    """Of a model that is none."""
    reader = PromptReader(byte_tokenizer(), VOCAB_SIZE, LIMIT)
    async with client_of(create_http_api(CompletionService("tiny", reader, backend), None)) as client:
        yield client


def client_of(api: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test")


async def test_a_text_gets_the_probability_of_every_label(
    client: httpx.AsyncClient, backend: EchoBackend
) -> None:
    response = await client.post("/classify", json={"model": "tiny", "input": "abcdefg"})
    assert response.status_code == 200
    body = response.json()
    assert (body["object"], body["model"]) == ("list", "tiny")
    assert body["id"].startswith("classify-") and body["created"] > 0
    (only,) = body["data"]
    assert (only["index"], only["label"], only["num_classes"]) == (0, "long", 2)
    assert only["probs"] == pytest.approx([0.182426, 0.817574], abs=1e-6)
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 0, 7)
    assert usage["experts"]["needed"] == 10
    assert backend.predicted == [request.request_id for request in backend.requests]


@pytest.mark.parametrize("form", [lambda text: text, token_ids])
async def test_several_texts_come_back_in_their_order(client: httpx.AsyncClient, form: Any) -> None:
    texts = ["ab", "abcdefgh", "abcdefg", "a"]
    body = (await client.post("/classify", json={"input": [form(text) for text in texts]})).json()
    assert [each["label"] for each in body["data"]] == ["short", "long", "long", "short"]
    assert [each["index"] for each in body["data"]] == [0, 1, 2, 3]
    assert body["usage"]["total_tokens"] == 18
    assert body["usage"]["experts"]["needed"] == 40


async def test_a_text_may_be_as_long_as_the_limit(client: httpx.AsyncClient) -> None:
    assert (await client.post("/classify", json={"input": "x" * LIMIT})).status_code == 200


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"input": "x", "model": "other"}, 404, "model", "model_not_found"),
        ({"input": [300]}, 400, "input", "token_out_of_range"),
        ({"input": ["ok", "x" * 21]}, 400, "input", "context_length_exceeded"),
        ({}, 400, "input", "invalid_parameter"),
        ({"input": ""}, 400, "input", "invalid_parameter"),
        ({"input": []}, 400, "input", "invalid_parameter"),
        ({"input": ["x"] * 65}, 400, "input", "invalid_parameter"),
        ({"input": ["x", 5]}, 400, "input", "invalid_parameter"),
        ({"input": "x", "prompt": "x"}, 400, "prompt", "invalid_parameter"),
        ({"input": ["x", "full"]}, 503, None, "queue_full"),
        ({"input": "bug"}, 500, None, "internal_error"),
    ],
)
async def test_errors_have_openais_form(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    response = await client.post("/classify", json=fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert "\n" not in error["message"]


async def test_each_kind_of_model_names_the_route_of_the_other(
    client: httpx.AsyncClient, generating: httpx.AsyncClient, backend: EchoBackend
) -> None:
    bodies = {
        "/v1/completions": {"prompt": "x"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    }
    for path, body in bodies.items():
        for stream in (False, True):
            refused = await client.post(path, json={**body, "stream": stream})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "wrong_task")
            assert "use /classify" in refused.json()["error"]["message"]
    refused = await generating.post("/classify", json={"input": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "wrong_task")
    assert "use /v1/completions" in refused.json()["error"]["message"]
    assert backend.requests == []


async def test_other_applications_classify_with_plain_dicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokenizer(tmp_path)
    monkeypatch.setattr(ingress, "HandleBackend", lambda *_: EchoBackend())
    settings = {"model": str(tmp_path), "model_name": "tiny", "max_context_tokens": LIMIT}
    config = ServingConfig.from_args(settings, environ={})
    handles: Any = (None, None, None)
    classifier = Ingress(config, ServedModel(VOCAB_SIZE, True, LABELS), *handles)
    answer = await classifier.classify({"input": ["ab", "abcdefgh"]})
    assert [each["label"] for each in answer["data"]] == ["short", "long"]
    with pytest.raises(ValueError) as caught:
        await classifier.generate({"prompt": "ab"})
    assert json.loads(str(caught.value))["error"]["code"] == "wrong_task"
    with pytest.raises(ValueError) as caught:
        await Ingress(config, ServedModel(VOCAB_SIZE), *handles).classify({"input": "ab"})
    assert json.loads(str(caught.value))["error"]["code"] == "wrong_task"


def test_a_single_label_has_the_probability_of_a_sigmoid() -> None:
    assert probabilities([2.0]) == pytest.approx([0.880797], abs=1e-6)
    assert probabilities([-1000.0]) == [0.0]
    assert probabilities([1000.0, 1000.0]) == [0.5, 0.5]
