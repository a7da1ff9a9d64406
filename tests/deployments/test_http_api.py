import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from deployments.completions import CompletionService
from deployments.http_api import create_http_api
from deployments.prompts import PromptReader
from tests.deployments.fakes import VOCAB_SIZE, EchoBackend, byte_tokenizer


@pytest.fixture
def backend() -> EchoBackend:
    return EchoBackend()


@pytest.fixture
def service(backend: EchoBackend) -> CompletionService:
    return CompletionService("tiny", PromptReader(byte_tokenizer(), VOCAB_SIZE, 100), backend)


@pytest.fixture
async def client(service: CompletionService) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_http_api(service, api_key=None)) as client:
        yield client


def client_of(api: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test")


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_answers_health_models_and_experts(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    models = (await client.get("/v1/models")).json()
    assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [("tiny", 100)]
    assert (await client.get("/v1/models/tiny")).json() == models["data"][0]
    assert (await client.get("/v1/experts")).json()["executors"] == [{"layers": []}]


async def test_completes_a_prompt(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 4})
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "abca", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"]["experts"]["moved_bytes"] == 1000


async def test_streams_events_up_to_done(client: httpx.AsyncClient) -> None:
    fields = {"prompt": "abc", "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    response = await client.post("/v1/completions", json=fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, last = events(response)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "abca"
    assert all("usage" not in piece for piece in pieces)
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 7)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"prompt": "x", "model": "other"}, 404, "model", "model_not_found"),
        ({"prompt": [300]}, 400, "prompt", "token_out_of_range"),
        ({"prompt": "x" * 90, "max_tokens": 11}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": "x", "temperature": 3}, 400, "temperature", "invalid_parameter"),
        ({"prompt": "x", "n": 17}, 400, "n", "invalid_parameter"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, 400, "echo", "invalid_parameter"),
        ({"prompt": "x", "min_tokens": 17}, 400, "min_tokens", "invalid_parameter"),
        ({"prompt": "x", "tempreature": 1}, 400, "tempreature", "invalid_parameter"),
        ({}, 400, "prompt", "invalid_parameter"),
        ({"prompt": ""}, 400, "prompt", "invalid_parameter"),
        ({"prompt": []}, 400, "prompt", "invalid_parameter"),
        ({"prompt": "long"}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": "full"}, 503, None, "queue_full"),
        ({"prompt": "bug"}, 500, None, "internal_error"),
    ],
)
async def test_errors_before_the_first_token_have_a_status(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str | None, code: str, stream: bool
) -> None:
    response = await client.post("/v1/completions", json={**fields, "stream": stream})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert "\n" not in error["message"]
    assert ("retry-after" in response.headers) == (status == 503)


async def test_a_body_that_is_not_json_is_a_400(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    response = await client.post("/v1/completions", content=b'{"prompt": ', headers=headers)
    assert response.status_code == 400
    assert "not JSON" in response.json()["error"]["message"]
    response = await client.post("/v1/completions", content=b"[1]", headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "body")


async def test_a_long_value_is_not_repeated_in_its_error(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": "x", "temperature": "x" * 10_000})
    assert len(response.text) < 500


async def test_unknown_routes_and_methods_have_openais_form(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/nothing")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "route_not_found")
    response = await client.get("/v1/completions")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    response = await client.get("/v1/models/other")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_an_error_after_the_first_token_is_an_event(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": "dies", "stream": True})
    assert response.status_code == 200
    first, error = events(response)
    assert first["choices"][0]["text"] == "d"
    assert error["error"]["code"] == "engine_stopped"


async def test_a_key_opens_everything_but_health(service: CompletionService) -> None:
    async with client_of(create_http_api(service, api_key="s3cret")) as client:
        assert (await client.get("/health")).status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "s3cret"},
            {"authorization": "Bearer é"},
        ):
            for method, path in (("GET", "/v1/models"), ("GET", "/v1/experts"), ("POST", "/v1/completions")):
                encoded = {key: value.encode() for key, value in headers.items()}
                response = await client.request(method, path, headers=encoded, json={"prompt": "x"})
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        good = {"authorization": "Bearer s3cret"}
        assert (await client.post("/v1/completions", json={"prompt": "x"}, headers=good)).status_code == 200


async def test_a_client_that_goes_closes_the_generation(
    service: CompletionService, backend: EchoBackend
) -> None:
    api = create_http_api(service, api_key=None)
    gone = asyncio.Event()
    body = json.dumps({"prompt": "hangs", "stream": True}).encode()
    incoming = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            gone.set()

    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b"",
        "asgi": {"version": "3.0"},
    }  # fmt: skip
    async with asyncio.timeout(5):
        await api(scope, receive, send)
    assert backend.closed == [backend.requests[0].request_id]
