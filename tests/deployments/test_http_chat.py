"""The routes beside completions: chat, and text into token ids and back."""

import json
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

import httpx
import pytest

from deployments.completions import CompletionService
from deployments.http_api import create_http_api
from deployments.prompts import PromptReader
from tests.deployments.fakes import CHAT_TEMPLATE, VOCAB_SIZE, EchoBackend, byte_tokenizer, token_ids

MESSAGES = [{"role": "user", "content": "Hi"}]
RENDERED = "<user>Hi<assistant>"
CONTEXT_LIMIT = 100


def client_of(tokenizer: Any, api_key: str | None = None) -> httpx.AsyncClient:
    service = CompletionService("tiny", PromptReader(tokenizer, VOCAB_SIZE, CONTEXT_LIMIT), EchoBackend())
    transport = httpx.ASGITransport(create_http_api(service, api_key))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(byte_tokenizer(CHAT_TEMPLATE)) as client:
        yield client


async def chat(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 4, **fields})


async def test_chats(client: httpx.AsyncClient) -> None:
    body = (await chat(client, model="tiny")).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "<use"}
    assert body["usage"]["prompt_tokens"] == len(RENDERED)


async def test_streams_deltas_up_to_done(client: httpx.AsyncClient) -> None:
    response = await chat(client, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    pieces = [json.loads(line) for line in lines]
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    assert [piece["choices"][0]["delta"] for piece in pieces] == [
        {"role": "assistant", "content": "<"},
        {"content": "u"},
        {"content": "s"},
        {"content": "e"},
    ]
    assert all("usage" not in piece for piece in pieces)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"max_tokens": CONTEXT_LIMIT}, 400, "messages", "context_length_exceeded"),
        ({"messages": []}, 400, "messages", "invalid_parameter"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "invalid_parameter"),
        ({"messages": [*MESSAGES, {"role": "system", "content": ""}]}, 400, "messages", "invalid_parameter"),
        ({"tools": [{}]}, 400, "tools", "invalid_parameter"),
        ({"min_tokens": 5}, 400, "min_tokens", "invalid_parameter"),
    ],
)
async def test_errors_have_openais_form(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str, code: str, stream: bool
) -> None:
    response = await chat(client, stream=stream, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert "\n" not in error["message"]


@pytest.mark.parametrize(("tokenizer", "missing"), [(None, "tokenizer"), (byte_tokenizer(), "chat template")])
async def test_a_model_without_a_chat_template_says_so(tokenizer: Any, missing: str) -> None:
    async with client_of(tokenizer) as client:
        for path in ("/v1/chat/completions", "/tokenize"):
            response = await client.post(path, json={"messages": MESSAGES})
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (400, "no_chat_template")
            assert f"no {missing}" in error["message"]
            assert "/v1/completions" in error["message"]


async def test_tokenizes_a_prompt_or_messages(client: httpx.AsyncClient) -> None:
    for fields, text in (
        ({"prompt": "é"}, "é"),
        ({"prompt": "é", "add_special_tokens": False}, "é"),
        ({"prompt": ""}, ""),
        ({"messages": MESSAGES}, RENDERED),
    ):
        body = (await client.post("/tokenize", json=fields)).json()
        ids = token_ids(text)
        assert body == {"tokens": ids, "count": len(ids), "max_model_len": CONTEXT_LIMIT}
        back = await client.post("/detokenize", json={"tokens": ids})
        assert back.json() == {"prompt": text}


async def test_special_tokens_are_added_unless_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = _beginning_with(tokenizer.convert_tokens_to_ids("!"))
    async with client_of(tokenizer) as client:
        for fields, text in (
            ({}, "!x"),
            ({"add_special_tokens": True}, "!x"),
            ({"add_special_tokens": False}, "x"),
        ):
            body = (await client.post("/tokenize", json={"prompt": "x", **fields})).json()
            assert body["tokens"] == token_ids(text)


def _beginning_with(token_id: int) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="! $A", special_tokens=[("!", token_id)])


@pytest.mark.parametrize(
    ("path", "fields", "param", "code"),
    [
        ("/tokenize", {}, "prompt", "invalid_parameter"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt", "invalid_parameter"),
        ("/tokenize", {"prompt": [1]}, "prompt", "invalid_parameter"),
        (
            "/tokenize",
            {"messages": MESSAGES, "add_special_tokens": True},
            "add_special_tokens",
            "invalid_parameter",
        ),
        ("/tokenize", {"prompt": "x", "model": "tiny"}, "model", "invalid_parameter"),
        ("/detokenize", {}, "tokens", "invalid_parameter"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens", "token_out_of_range"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0", "invalid_parameter"),
        ("/detokenize", {"tokens": "1"}, "tokens", "invalid_parameter"),
    ],
)
async def test_refuses_by_name(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, code: str
) -> None:
    response = await client.post(path, json=fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)


async def test_without_a_tokenizer_there_is_nothing_to_turn() -> None:
    async with client_of(None) as client:
        for path, fields in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
            response = await client.post(path, json=fields)
            assert response.status_code == 400
            assert "no tokenizer" in response.json()["error"]["message"]


async def test_tells_the_version_of_the_package(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": version("sida-serve")}


async def test_the_key_is_needed_here_too() -> None:
    async with client_of(byte_tokenizer(CHAT_TEMPLATE), api_key="s3cret") as client:
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("POST", "/tokenize"),
            ("POST", "/detokenize"),
            ("GET", "/version"),
        ):
            assert (await client.request(method, path, json={})).status_code == 401
        headers = {"authorization": "Bearer s3cret"}
        assert (await client.get("/version", headers=headers)).status_code == 200


async def test_a_body_that_is_no_text_at_all_is_a_400(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    for content in (b"\xff\xfe{", b"[" * 100_000, b"1" * 10_000):
        response = await client.post("/v1/completions", content=content, headers=headers)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_half_a_surrogate_pair_is_a_400(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    for path, body in (
        ("/v1/completions", {"prompt": "\ud800"}),
        ("/v1/completions", {"prompt": "x", "\ud800": 1}),
        ("/v1/completions", {"prompt": "x", "stop": "\ud800"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "\ud800", "content": ""}]}),
        ("/tokenize", {"prompt": "\ud800"}),
    ):
        response = await client.post(path, content=json.dumps(body), headers=headers)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
