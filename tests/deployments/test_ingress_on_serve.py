"""The ingress as Serve runs it, over real HTTP and real handles, in front of fake executors."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from ray import serve

from common.config import ServingConfig
from deployments.ingress import Ingress, ServedModel
from examples import review_app
from tests.deployments.fake_deployments import FakeExecutor, FakePredictor, FakeStore, OtherApplication
from tests.deployments.fakes import CHAT_TEMPLATE, VOCAB_SIZE, token_ids, write_tokenizer
from tests.tiny_models import make_model

pytestmark = pytest.mark.cluster

APP = "ingress_test"
OPTIONS = {"ray_actor_options": {"num_cpus": 0.1}, "graceful_shutdown_timeout_s": 2}


def deployment(cls: type, **options: Any) -> serve.Deployment:
    return serve.deployment(cls).options(**OPTIONS, **options)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model("qwen3_moe", vocab_size=VOCAB_SIZE).config.save_pretrained(folder)
    write_tokenizer(folder, CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def url(serve_url: str, model_folder: Path) -> Iterator[str]:
    settings = {"model": str(model_folder), "model_name": "tiny", "max_context_tokens": 512}
    config = ServingConfig.from_args(settings, environ={})
    ingress = deployment(serve.ingress()(Ingress), max_ongoing_requests=100)
    fakes = [
        deployment(FakePredictor).bind(),
        deployment(FakeExecutor, num_replicas=2, max_ongoing_requests=8, max_queued_requests=16).bind(),
        deployment(FakeStore).bind(),
    ]
    serve.run(ingress.bind(config, ServedModel(VOCAB_SIZE), *fakes), name=APP, route_prefix="/ingress_test")
    yield f"{serve_url}/ingress_test"
    serve.delete(APP, _blocking=False)


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def reports(url: str) -> list[dict[str, Any]]:
    executors: list[dict[str, Any]] = httpx.get(f"{url}/v1/experts").json()["executors"]
    return executors


def wait_until(condition: Callable[[], bool], deadline_s: float = 30) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.05)


def test_the_openai_client_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_the_openai_client_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny",
        prompt=["abc", "xyz"],
        max_tokens=4,
        temperature=0,
        seed=1,
        stop=["!"],
        extra_body={"top_k": 5},
    )
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [
        ("abca", "length"),
        ("xyzx", "length"),
    ]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 14
    assert answer.usage.model_extra is not None
    assert answer.usage.model_extra["experts"]["needed"] == 20


def test_the_openai_client_streams(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny",
        prompt=token_ids("abc"),
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
    )
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces) == "abcabc"
    assert pieces[-1].choices[0].finish_reason == "length"
    assert last.usage is not None
    assert last.usage.completion_tokens == 6


def test_the_openai_client_reads_logprobs(client: openai.OpenAI) -> None:
    logprobs = (
        client.completions.create(model="tiny", prompt="ab", max_tokens=2, logprobs=2).choices[0].logprobs
    )
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset) == (
        ["a", "b"],
        [-0.5, -0.5],
        [0, 1],
    )
    assert logprobs.top_logprobs is not None
    assert all(len(top) == 2 for top in logprobs.top_logprobs)


def test_the_openai_client_chats(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
        ],
        "max_completion_tokens": 9,
        "logprobs": True,
        "top_logprobs": 1,
        "n": 2,
    }
    answer = client.chat.completions.create(**fields)
    assert [(choice.message.role, choice.message.content) for choice in answer.choices] == [
        ("assistant", "<system>a")
    ] * 2
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert bytes(logprobs.content[1].bytes or []) == b"s"
    pieces = list(client.chat.completions.create(**fields, stream=True))
    for index in range(2):
        deltas = [choice.delta for piece in pieces for choice in piece.choices if choice.index == index]
        assert "".join(delta.content or "" for delta in deltas) == "<system>a"
        assert [delta.role for delta in deltas[:2]] == ["assistant", None]


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_client_knows_our_errors(client: openai.OpenAI, stream: bool) -> None:
    def ask(prompt: Any = "x", **fields: Any) -> None:
        client.completions.create(**{"model": "tiny", "prompt": prompt, "stream": stream, **fields})

    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        ask(model="other")
    with pytest.raises(openai.BadRequestError, match="temperature=3"):
        ask(temperature=3)
    with pytest.raises(openai.BadRequestError, match="the limit is 7"):  # raised by the executor
        ask("long")
    with pytest.raises(openai.InternalServerError) as caught:
        ask("full")
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "1")
    assert caught.value.code == "queue_full"
    with pytest.raises(openai.InternalServerError, match="an internal error"):
        ask("bug")


def test_a_request_id_comes_back(url: str) -> None:
    response = httpx.get(f"{url}/health", headers={"x-request-id": "mine"})
    assert response.headers.get_list("x-request-id") == ["mine"]


def test_every_executor_reports(url: str) -> None:
    assert len({report["pid"] for report in reports(url)}) == 2


def test_failed_predictions_are_counted_and_do_no_harm(url: str, client: openai.OpenAI) -> None:
    def failed() -> int:
        count: int = httpx.get(f"{url}/v1/experts").json()["predictions"]["failed"]
        return count

    before = failed()
    client.completions.create(model="tiny", prompt="abc")
    wait_until(lambda: failed() == before + 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_cancels_its_request(url: str, stream: bool) -> None:
    cancelled_before = sum(len(report["cancelled"]) for report in reports(url))
    fields = {"prompt": "hangs", "max_tokens": 10, "stream": stream}
    with httpx.Client(timeout=60) as http:
        if stream:
            with http.stream("POST", f"{url}/v1/completions", json=fields) as response:
                assert "h" in next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post(f"{url}/v1/completions", json=fields, timeout=2)
    wait_until(lambda: sum(len(report["cancelled"]) for report in reports(url)) == cancelled_before + 1)
    assert not any(report["running"] for report in reports(url))


def test_a_burst_above_the_limits_is_refused_and_leaves_nothing_behind(url: str) -> None:
    def burst(prompt: str, count: int) -> httpx.Response:
        fields = {"prompt": [prompt] * count, "max_tokens": 2}
        return httpx.post(f"{url}/v1/completions", json=fields, timeout=60)

    refused = burst("hangs", 60)  # 16 run, 16 may wait
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
    wait_until(lambda: burst("ab", 16).status_code == 200)
    assert not any(report["running"] for report in reports(url))


def test_another_application_calls_with_plain_dicts(url: str) -> None:
    other = serve.run(deployment(OtherApplication).bind(APP), name="other", route_prefix=None)
    whole = other.ask.remote({"prompt": "abc", "max_tokens": 4}).result(timeout_s=60)
    assert (whole["choices"][0]["text"], whole["usage"]["total_tokens"]) == ("abca", 7)
    pieces = other.ask_streamed.remote({"prompt": "abc", "max_tokens": 4}).result(timeout_s=60)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "abca"

    chat = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 4}
    whole = other.ask.remote(chat, "chat").result(timeout_s=60)
    assert (whole["object"], whole["choices"][0]["message"]["content"]) == ("chat.completion", "<use")
    pieces = other.ask_streamed.remote(chat, "stream_chat").result(timeout_s=60)
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert (deltas[0], "".join(delta["content"] for delta in deltas)) == (
        {"role": "assistant", "content": "<"},
        "<use",
    )

    refused = other.ask.remote({"prompt": "abc", "model": "other"}).result(timeout_s=60)
    assert "ValueError" in refused["raised"]
    assert not any(name.endswith("NotFoundError") for name in refused["raised"])
    full = other.ask.remote({"prompt": "full"}).result(timeout_s=60)
    assert "RuntimeError" in full["raised"]
    assert json.dumps("queue_full") in full["text"]
    serve.delete("other", _blocking=False)


def test_the_example_application_completes_and_streams(url: str, serve_url: str) -> None:
    application = review_app.build({"app": APP, "max_tokens": 6})
    serve.run(application, name="review", route_prefix="/review")
    whole = httpx.post(f"{serve_url}/review", content="abcd", timeout=60)
    assert (whole.status_code, whole.text) == (200, "abcdab")
    with httpx.stream("POST", f"{serve_url}/review?stream", content="abcd", timeout=60) as response:
        assert "".join(response.iter_text()) == "abcdab"
    refused = httpx.post(f"{serve_url}/review", content="", timeout=60)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    serve.delete("review", _blocking=False)


def test_a_dead_executor_is_a_503_and_is_replaced(url: str, client: openai.OpenAI) -> None:
    pids = {report["pid"] for report in reports(url)}
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tiny", prompt="dies")
    assert (caught.value.status_code, caught.value.code) == (503, "engine_stopped")
    assert client.completions.create(model="tiny", prompt="ab", max_tokens=2).choices[0].text == "ab"
    wait_until(lambda: len({report["pid"] for report in reports(url)} - pids) == 1)
