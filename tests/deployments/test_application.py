"""The whole application over HTTP: every real component, tiny models, the library's own output as the measure."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from actors.predictor.hash_function import save_hash_function
from deployments.app import build
from tests.actors.executor.harness import PROMPTS, library_greedy, library_model
from tests.actors.predictor.conftest import make_function
from tests.deployments.fakes import VOCAB_SIZE, write_tokenizer
from tests.tiny_models import NUM_EXPERTS, make_checkpoint

pytestmark = pytest.mark.cluster

NUM_TOKENS = 10
EXACT_APP = "exact"
DEADLINE_S = 120.0


@contextmanager
def running(serve_url: str, app: str, folder: Path, **settings: Any) -> Iterator[httpx.Client]:
    """The application under a route of its own; stopped at the end."""
    serve.run(build({"model": str(folder), **settings}), name=app, route_prefix=f"/{app}")
    try:
        with httpx.Client(base_url=f"{serve_url}/{app}", timeout=DEADLINE_S) as client:
            yield client
    finally:
        serve.delete(app)


def complete(client: httpx.Client, prompt: list[int], **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 0}
    response = client.post("/v1/completions", json={**body, "ignore_eos": True, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def token_ids(answer: dict[str, Any]) -> list[int]:
    """A model without a tokenizer names its tokens by their ids."""
    return [int(token.removeprefix("token_id:")) for token in answer["choices"][0]["logprobs"]["tokens"]]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.1)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_serves_the_librarys_tokens_to_concurrent_clients(
    family: str, serve_url: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(family, tmp_path)
    reference = library_model(folder)
    expected = [library_greedy(reference, prompt, NUM_TOKENS) for prompt in PROMPTS]
    with running(serve_url, f"family-{family}", folder, model_name="tiny", expert_slots=2) as client:
        answers: dict[int, list[int]] = {}
        clients = [
            threading.Thread(
                target=lambda index=index: answers.update(
                    {index: token_ids(complete(client, PROMPTS[index]))}
                )
            )
            for index in range(len(PROMPTS))
        ]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(DEADLINE_S)
    assert [answers[index] for index in range(len(PROMPTS))] == expected


@pytest.fixture(scope="module")
def predicted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and a (random) hash function, its experts large enough for shared memory."""
    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint("qwen3_moe", folder, vocab_size=VOCAB_SIZE, moe_intermediate_size=256)
    write_tokenizer(folder)
    save_hash_function(make_function(folder), folder / "hash_function")
    return folder


@pytest.fixture(scope="module")
def exact(serve_url: str, predicted_folder: Path) -> Iterator[httpx.Client]:
    settings = {"model_name": "tiny", "expert_slots": 4}
    with running(serve_url, EXACT_APP, predicted_folder, **settings) as client:
        yield client


def test_prediction_reaches_the_executor_through_redis(exact: httpx.Client) -> None:
    def tables() -> dict[str, int]:
        counts: dict[str, int] = exact.get("/v1/experts").json()["executors"][0]["hash_tables"]
        return counts

    def one_arrived() -> bool:
        usage = complete(exact, list(range(3, 120)), max_tokens=64)["usage"]["experts"]
        return usage["predicted"] > 0 and tables()["on_time"] + tables()["late"] > 0

    wait_until(one_arrived)
    layers = exact.get("/v1/experts").json()["executors"][0]["layers"]
    assert all(0 < layer["predictor_recall"] < 1 for layer in layers)
    assert tables()["unusable"] == 0


def test_what_happens_can_be_watched(exact: httpx.Client) -> None:
    timings = complete(exact, PROMPTS[0], timings=True)["usage"]["timings"]
    assert min(timings["queue_ms"], timings["prefill_ms"], timings["decode_ms"]) > 0
    names = {family.name: family for family in text_string_to_metric_families(exact.get("/metrics").text)}
    samples = names["sida_generation_tokens"].samples
    assert len(samples) == 1 and samples[0].value >= NUM_TOKENS
    assert names["sida_expert_store_bytes"].samples[0].value > 0
    ended = {
        sample.labels.get("finished_reason"): sample.value for sample in names["sida_request_success"].samples
    }
    assert ended["length"] >= 1
    (executor,) = exact.get("/v1/experts/live").json()["executors"]
    assert executor["replica"] == samples[0].labels["replica"]
    assert {len(row) for row in executor["experts"]} == {NUM_EXPERTS}
    assert set("".join(executor["experts"])) & set("hijklm"), "the request used some"
    assert "<title>sida-serve</title>" in exact.get("/").text


def test_predicted_routing_serves_other_tokens_than_the_routers(
    serve_url: str, exact: httpx.Client, predicted_folder: Path
) -> None:
    settings = {"model_name": "tiny", "routing": "predicted"}
    with running(serve_url, "lossy", predicted_folder, **settings) as client:
        predicted = complete(client, PROMPTS[0])
    assert predicted["choices"][0]["text"] != complete(exact, PROMPTS[0])["choices"][0]["text"]
    assert predicted["usage"]["experts"]["predicted"] == predicted["usage"]["experts"]["needed"]


def process_of(app: str, deployment: str) -> int:
    """The process of an application's replica, by the title Ray gives it."""
    title = f"ray::ServeReplica:{app}:{deployment}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cmdline").read_bytes().startswith(title):
                    return int(entry.name)
            except OSError:
                continue  # it ended while we looked
    raise AssertionError(f"no process {title!r}")


def test_serving_goes_on_while_a_killed_store_comes_back(exact: httpx.Client) -> None:
    def answer() -> list[str]:
        tokens: list[str] = complete(exact, PROMPTS[0])["choices"][0]["logprobs"]["tokens"]
        return tokens

    before, tokens = generation_of(exact), answer()
    assert len(tokens) == NUM_TOKENS
    os.kill(process_of(EXACT_APP, "ExpertStoreDeployment"), signal.SIGKILL)
    num_answers = 0
    end = time.monotonic() + DEADLINE_S
    while generation_of(exact) in (None, before):
        assert answer() == tokens, "every request is answered, and rightly, while the store is away"
        num_answers += 1
        assert time.monotonic() < end, "the store did not come back"
    assert num_answers > 0
    assert answer() == tokens


def generation_of(client: httpx.Client) -> str | None:
    """None while the store, which /v1/experts also asks, is away."""
    response = client.get("/v1/experts")
    return response.json()["executors"][0]["store_generation"] if response.status_code == 200 else None


def token_names(answer: dict[str, Any]) -> list[str]:
    names: list[str] = answer["choices"][0]["logprobs"]["tokens"]
    return names


def executor_of(client: httpx.Client) -> dict[str, Any]:
    (executor,) = client.get("/v1/experts").json()["executors"]
    return dict(executor)


def lost_tables(client: httpx.Client) -> int:
    return int(executor_of(client)["hash_tables"]["lost"])


def arrived_tables(client: httpx.Client) -> int:
    tables = executor_of(client)["hash_tables"]
    return int(tables["on_time"] + tables["late"])


def valkey_of(app: str) -> int:
    """The embedded server's process: the child of the replica that owns it."""
    children = Path(f"/proc/{process_of(app, 'TableServer')}/task").glob("*/children")
    return next(int(pid) for child in children for pid in child.read_text().split())


def test_requests_run_on_demand_while_redis_hangs_and_it_is_replaced(exact: httpx.Client) -> None:
    tokens, lost, server = token_names(complete(exact, PROMPTS[0])), lost_tables(exact), valkey_of(EXACT_APP)
    os.kill(server, signal.SIGSTOP)

    def one_was_lost() -> bool:
        assert token_names(complete(exact, PROMPTS[0])) == tokens
        return lost_tables(exact) > lost

    def one_arrived() -> bool:
        complete(exact, PROMPTS[0], max_tokens=64)
        return arrived_tables(exact) > arrived

    wait_until(one_was_lost)
    arrived = arrived_tables(exact)
    wait_until(one_arrived)
