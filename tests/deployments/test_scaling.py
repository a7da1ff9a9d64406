"""Executors come and go under load: none, one, two, one, none. One application, a tiny model, real processes."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from deployments import app
from tests.tiny_models import make_checkpoint

pytestmark = pytest.mark.cluster

APP = "scaling"
DEADLINE_S = 120.0
TARGET = 4
STREAM_S = 12.0  # outlasts the decision to take an executor away


@pytest.fixture(scope="module")
def client(serve_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("scaling")
    # Experts large enough for shared memory, positions enough for long streams.
    make_checkpoint("qwen3_moe", folder, moe_intermediate_size=256, max_position_embeddings=32_768)
    settings = {
        "model": str(folder),
        "expert_slots": 4,
        "max_context_tokens": 20_000,
        "min_executors": 0,
        "max_executors": 2,
        "target_ongoing_requests": TARGET,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 1,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "_AVERAGED", {"look_back_period_s": 2.0, "metrics_interval_s": 0.5})
        application = app.build(settings)
    serve.run(application, name=APP, route_prefix=f"/{APP}")
    with httpx.Client(base_url=f"{serve_url}/{APP}", timeout=DEADLINE_S) as client:
        yield client
    serve.delete(APP, _blocking=False)


def replicas() -> dict[str, int]:
    """Executors by their state in Serve."""
    states = serve.status().applications[APP].deployments["ExecutorDeployment"].replica_states
    return {state: count for state, count in states.items() if count}


def wait_until(condition: Callable[[], bool]) -> float:
    """Returns the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + DEADLINE_S, f"it did not come true in time; executors: {replicas()}"
        time.sleep(0.1)
    return time.monotonic() - began


def complete(client: httpx.Client, max_tokens: int) -> float:
    """Returns the tokens per second of a request that must succeed."""
    began = time.monotonic()
    fields = {"prompt": [3, 4, 5], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    response = client.post("/v1/completions", json=fields)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["usage"]["completion_tokens"] == max_tokens
    assert answer["choices"][0]["finish_reason"] == "length"
    return max_tokens / (time.monotonic() - began)


def report(client: httpx.Client, path: str = "/v1/experts") -> dict[str, Any]:
    response = client.get(path)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def total(executor: dict[str, Any], key: str) -> int:
    return sum(layer[key] for layer in executor["layers"])


def used_object_store_bytes() -> float:
    key = "object_store_memory"
    return float(ray.cluster_resources()[key] - ray.available_resources()[key])


def check_that_none_is_seen(client: httpx.Client) -> None:
    for path in ("/v1/experts", "/v1/experts/live"):
        answer = report(client, path)
        assert (answer["executors"], answer["unreachable_executors"]) == ([], 0)
    scraped = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    assert scraped["sida_unreachable_executors"].samples[0].value == 0
    assert scraped["sida_expert_store_bytes"].samples[0].value > 0
    assert scraped["sida_num_requests_running"].samples == []
    assert client.get("/health").status_code == 200


def test_a_request_that_arrives_at_zero_waits_for_an_executor(client: httpx.Client) -> None:
    assert replicas() == {}
    check_that_none_is_seen(client)
    began = time.monotonic()
    complete(client, max_tokens=4)
    print(f"none to one: {time.monotonic() - began:.1f} s")
    assert replicas() == {"RUNNING": 1}
    (executor,) = report(client)["executors"]
    assert total(executor, "prefetched") == 0, "there was nobody to ask what to warm up with"


def test_load_adds_an_executor_and_its_end_takes_it_away_without_cutting_streams(
    client: httpx.Client,
) -> None:
    stream_tokens = int(complete(client, max_tokens=100) * STREAM_S)
    before, used_before = report(client)["store"], used_object_store_bytes()
    assert used_before >= before["total_bytes"]
    with ThreadPoolExecutor(16) as clients:
        load = _load_two(client, clients)
        # All together are load for one executor.
        streams = [clients.submit(complete, client, stream_tokens) for _ in range(TARGET - 1)]
        after = report(client)
        assert len({executor["store_generation"] for executor in after["executors"]}) == 1
        assert after["store"] == before
        used = used_object_store_bytes()
        print(f"object store: {used_before:.0f} bytes, then {used:.0f}; experts: {before['total_bytes']}")
        assert used - used_before < before["total_bytes"] / 2, "the experts are there once"
        assert {total(executor, "prefetched") > 0 for executor in after["executors"]} == {False, True}
        assert any(total(executor, "prefetched_used") > 0 for executor in after["executors"]), (
            "the new executor began with what the other one held"
        )
        for request in load:
            request.result(DEADLINE_S)
        # The shorter queue takes the next request, so that each executor has a stream.
        streams.append(clients.submit(complete, client, stream_tokens))
        seconds = wait_until(lambda: replicas().get("STOPPING") == 1)
        (stays,) = report(client)["executors"]
        assert not any(stream.done() for stream in streams)
        assert 0 < stays["num_running"] < TARGET, "the one that goes has streams too"
        for stream in streams:
            stream.result(DEADLINE_S)
    print(f"two to one: {seconds:.1f} s")


def _load_two(client: httpx.Client, clients: ThreadPoolExecutor) -> set["Future[float]"]:
    """Keep requests under way until two executors share them; every one that ends has succeeded.

    Returns:
        What is under way still.
    """
    began = time.monotonic()
    under_way: set[Future[float]] = set()

    def two_share() -> bool:
        for request in [request for request in under_way if request.done()]:
            request.result()
            under_way.remove(request)
        while len(under_way) < 2 * TARGET:
            under_way.add(clients.submit(complete, client, 50))
        executors = report(client)["executors"]
        return len(executors) == 2 and all(executor["num_running"] >= TARGET - 1 for executor in executors)

    wait_until(two_share)
    print(f"one to two: {time.monotonic() - began:.1f} s")
    return under_way


def test_without_requests_the_last_executor_goes(client: httpx.Client) -> None:
    print(f"one to none: {wait_until(lambda: replicas() == {}):.1f} s")
    check_that_none_is_seen(client)
