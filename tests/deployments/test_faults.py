"""What happens when a process of the real application is killed or stopped, a client goes, or Redis holds nonsense."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
from ray import serve

from common.hash_table import HashTable
from tests.actors.executor.harness import PROMPTS
from tests.deployments.application import (
    DEADLINE_S,
    EXACT_APP,
    complete,
    executor_of,
    process_of,
    token_names,
    wait_until,
)

pytestmark = pytest.mark.cluster

LONG = 450  # tokens: enough that a process can be killed meanwhile
TABLE_TOKENS = 200  # enough that a table can come meanwhile


def long_request(**fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPTS[0], "max_tokens": LONG, "temperature": 0, "ignore_eos": True}
    return {**body, "stream": True, **fields}


def answer(client: httpx.Client) -> list[str]:
    return token_names(complete(client, PROMPTS[0]))


def tables(client: httpx.Client, *kinds: str) -> int:
    counts = executor_of(client)["hash_tables"]
    return sum(int(counts[kind]) for kind in kinds)


@pytest.fixture(autouse=True)
def prediction_works_again(exact: httpx.Client) -> Iterator[None]:
    """After each test, so that the next one begins with everything in place."""
    yield
    before = tables(exact, "on_time", "late")

    def one_arrived() -> bool:
        complete(exact, PROMPTS[0], max_tokens=64)
        return tables(exact, "on_time", "late") > before

    wait_until(one_arrived)


def test_a_client_that_leaves_in_mid_stream_leaves_nothing_behind(exact: httpx.Client) -> None:
    tokens, before = answer(exact), executor_of(exact)["generated_tokens"]
    with exact.stream("POST", "/v1/completions", json=long_request()) as response:
        next(response.iter_lines())
    wait_until(lambda: (executor_of(exact)["num_running"], executor_of(exact)["num_waiting"]) == (0, 0))
    assert executor_of(exact)["generated_tokens"] - before < LONG, "it ended early"
    assert answer(exact) == tokens


def test_serving_goes_on_while_a_killed_store_comes_back(exact: httpx.Client) -> None:
    before, tokens = generation_of(exact), answer(exact)
    os.kill(process_of(EXACT_APP, "ExpertStoreDeployment"), signal.SIGKILL)
    num_answers = 0
    end = time.monotonic() + DEADLINE_S
    while generation_of(exact) in (None, before):
        assert answer(exact) == tokens, "every request is answered, and rightly, while the store is away"
        num_answers += 1
        assert time.monotonic() < end, "the store did not come back"
    assert num_answers > 0
    assert answer(exact) == tokens


def generation_of(client: httpx.Client) -> str | None:
    """None while the store, which /v1/experts also asks, is away."""
    response = client.get("/v1/experts")
    return response.json()["executors"][0]["store_generation"] if response.status_code == 200 else None


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "dies"])
def test_requests_run_on_demand_while_redis_is_away_and_it_comes_back(
    exact: httpx.Client, fault: signal.Signals
) -> None:
    tokens, lost = answer(exact), tables(exact, "lost")
    os.kill(valkey_of(EXACT_APP), fault)

    def one_was_lost() -> bool:
        assert answer(exact) == tokens
        return tables(exact, "lost") > lost

    wait_until(one_was_lost)


def valkey_of(app: str) -> int:
    """The embedded server's process: the child of the replica that owns it."""
    children = Path(f"/proc/{process_of(app, 'TableServer')}/task").glob("*/children")
    return next(int(pid) for child in children for pid in child.read_text().split())


def test_requests_run_on_demand_while_a_killed_predictor_comes_back(exact: httpx.Client) -> None:
    tokens, lost = answer(exact), tables(exact, "lost")
    os.kill(process_of(EXACT_APP, "PredictorDeployment"), signal.SIGKILL)

    def one_was_lost() -> bool:
        assert answer(exact) == tokens
        return tables(exact, "lost") > lost

    wait_until(one_was_lost)


def test_an_unusable_table_is_counted_and_does_no_harm(exact: httpx.Client) -> None:
    ids = np.zeros((2, len(PROMPTS[0]), 2), np.uint16)
    other = HashTable(ids, np.ones(ids.shape, np.float16), "another", "hash_function", "1")
    tokens = token_names(complete(exact, PROMPTS[0], max_tokens=TABLE_TOKENS))
    with predictor_stopped():
        for data in (b"nonsense", other.to_bytes()):
            before = tables(exact, "unusable")
            assert tokens_with_table(exact, data) == tokens
            wait_until(lambda before=before: tables(exact, "unusable") == before + 1)


def tokens_with_table(client: httpx.Client, data: bytes) -> list[str]:
    """Of a stream whose table comes once it has begun, from here."""
    names, is_first = list[str](), True
    with client.stream(
        "POST", "/v1/completions", json=long_request(max_tokens=TABLE_TOKENS, logprobs=0)
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                piece = json.loads(line.removeprefix("data: "))
                names += token_names(piece)
                if is_first:
                    publish(f"{piece['id']}-0", data)
                    is_first = False
    return names


@contextmanager
def predictor_stopped() -> Iterator[None]:
    process = process_of(EXACT_APP, "PredictorDeployment")
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def publish(request_id: str, data: bytes) -> None:
    """As `RedisTableBus` does, but anything."""
    url = serve.get_deployment_handle("TableServer", EXACT_APP).url.remote().result(timeout_s=DEADLINE_S)
    with redis.Redis.from_url(url) as client:
        client.set(f"sida:{EXACT_APP}:table:{request_id}", data, px=60_000)
        client.rpush(f"sida:{EXACT_APP}:ready:{request_id}", 1)


def test_a_killed_executor_ends_its_requests_with_an_error_and_is_replaced(exact: httpx.Client) -> None:
    tokens, process = answer(exact), process_of(EXACT_APP, "ExecutorDeployment")

    def ask(stream: bool) -> httpx.Response:
        return exact.post("/v1/completions", json=long_request(stream=stream))

    with ThreadPoolExecutor(2) as clients:
        streamed, whole = clients.submit(ask, True), clients.submit(ask, False)
        wait_until(lambda: executor_of(exact)["num_running"] == 2)
        os.kill(process, signal.SIGKILL)
    *_, event = [line for line in streamed.result().text.splitlines() if line.startswith("data: {")]
    assert streamed.result().status_code == 200, "tokens had come"
    assert (whole.result().status_code, whole.result().headers["retry-after"]) == (503, "1")
    for error in (json.loads(event.removeprefix("data: "))["error"], whole.result().json()["error"]):
        assert (error["code"], error["type"]) == ("engine_stopped", "server_error")
    wait_until_served(exact)
    assert answer(exact) == tokens
    assert process_of(EXACT_APP, "ExecutorDeployment") != process


def wait_until_served(client: httpx.Client) -> None:
    """As a client does that heeds Retry-After; nothing but a 503 may come in between."""
    end = time.monotonic() + DEADLINE_S
    while (
        response := client.post("/v1/completions", json={"prompt": [3], "max_tokens": 1})
    ).status_code != 200:
        assert response.status_code == 503, response.text
        assert time.monotonic() < end, "no other executor came"
        time.sleep(0.1)
