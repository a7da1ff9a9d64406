"""What a Prometheus server reads from the ingress."""

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.generation import GenerationRequest, SamplingParams
from deployments.completions import CompletionService
from deployments.http_api import create_http_api
from deployments.prompts import PromptReader
from deployments.request_metrics import ObservedBackend, RequestMetrics
from tests.deployments.fakes import VOCAB_SIZE, byte_tokenizer
from tests.deployments.test_http_api import client_of
from tests.deployments.two_executors import NUM_SLOTS, TwoExecutors

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def metrics() -> RequestMetrics:
    return RequestMetrics()


@pytest.fixture
def backend() -> TwoExecutors:
    return TwoExecutors()


@pytest.fixture
def service(backend: TwoExecutors, metrics: RequestMetrics) -> CompletionService:
    reader = PromptReader(byte_tokenizer(), VOCAB_SIZE, 100)
    return CompletionService("tiny", reader, ObservedBackend(backend, metrics))


@pytest.fixture
async def client(service: CompletionService, metrics: RequestMetrics) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_http_api(service, None, metrics)) as client:
        yield client


async def scrape(client: httpx.AsyncClient) -> Samples:
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(response.text))
    assert len({family.name for family in families}) == len(families), "a family is told twice"
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"sida_{name}", frozenset(labels.items())]


async def test_every_executor_has_series_of_its_own(client: httpx.AsyncClient) -> None:
    samples = await scrape(client)
    for factor, replica in ((1, "first"), (2, "second")):
        assert of(samples, "num_requests_running", replica=replica) == 2 * factor
        assert of(samples, "num_requests_waiting", replica=replica) == factor
        assert of(samples, "prompt_tokens_total", replica=replica) == 100 * factor
        assert of(samples, "generation_tokens_total", replica=replica) == 50 * factor
        assert of(samples, "expert_hash_tables_total", replica=replica, kind="on_time") == 4 * factor
        by = {"replica": replica, "predictor": "next-gate"}
        assert of(samples, "predictor_prefetched_total", **by) == 9 * factor
        assert of(samples, "predictor_prefetched_used_total", **by) == 6
        assert of(samples, "predictor_prefetched_wasted_total", **by) == 3
        for layer in (0, 1):
            where = {"replica": replica, "layer": str(layer)}
            assert of(samples, "expert_slots", **where) == NUM_SLOTS
            assert of(samples, "expert_resident", **where) == 2
            assert of(samples, "expert_hits_total", **where) == factor * (30 + layer)
            assert of(samples, "expert_misses_total", **where) == factor * (10 + layer)
            assert of(samples, "expert_evictions_total", **where) == factor * (7 + layer)
            assert of(samples, "expert_prefetched_total", **where) == factor * (8 + layer)
            assert of(samples, "expert_prefetched_used_total", **where) == factor * (5 + layer)
            assert of(samples, "expert_prefetched_wasted_total", **where) == factor * (2 + layer)
            assert of(samples, "expert_moved_bytes_total", **where) == factor * 1000
    assert of(samples, "expert_prediction_recall", replica="first", layer="1") == 0.75
    unknown = frozenset({"replica": "second", "layer": "1"}.items())
    assert ("sida_expert_prediction_recall", unknown) not in samples


async def test_tells_of_the_whole_application(client: httpx.AsyncClient, backend: TwoExecutors) -> None:
    samples = await scrape(client)
    assert of(samples, "unreachable_executors") == 1
    assert of(samples, "expert_predictions_total") == 9
    assert of(samples, "expert_predictions_failed_total") == 1
    assert of(samples, "expert_store_bytes") == 5000
    backend.store = None
    samples = await scrape(client)
    assert ("sida_expert_store_bytes", frozenset()) not in samples
    assert of(samples, "num_requests_running", replica="first") == 2, "the store's absence hides nothing else"


async def test_requests_are_counted_by_their_end(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json={"prompt": ["ab", "cd"], "max_tokens": 4})
    await client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 4, "stream": True})
    samples = await scrape(client)
    first, whole = (
        of(samples, f"{name}_seconds_sum") for name in ("time_to_first_token", "e2e_request_latency")
    )
    assert 0 < first < whole
    for prompt in ("full", "bug", "dies"):
        await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4})
    samples = await scrape(client)
    assert of(samples, "request_success_total", finished_reason="length") == 3
    for code in ("queue_full", "internal_error", "engine_stopped"):
        assert of(samples, "request_failure_total", code=code) == 1
    assert of(samples, "time_to_first_token_seconds_count") == 4, "one died after its first token"
    assert of(samples, "inter_token_latency_seconds_count") == 3 * 3
    assert of(samples, "e2e_request_latency_seconds_count") == 3


async def test_a_client_that_goes_is_an_abort(
    service: CompletionService, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    request = GenerationRequest("r1", service.reader.read("hangs", 10), SamplingParams(max_tokens=10))
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "ray.serve")
    async with aclosing(service.backend.generate(request)) as chunks:
        await anext(chunks)
    logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert of(await scrape(client), "request_success_total", finished_reason="abort") == 1
    (line,) = [record.getMessage() for record in caplog.records if "ended" in record.getMessage()]
    assert line.startswith("request r1 ended: status=abort prompt_tokens=5 generated_tokens=1 ttft_ms=")


async def test_metrics_need_the_key(service: CompletionService, metrics: RequestMetrics) -> None:
    async with client_of(create_http_api(service, "s3cret", metrics)) as client:
        for path in ("/metrics", "/v1/experts/live"):
            assert (await client.get(path)).status_code == 401
            response = await client.get(path, headers={"authorization": "Bearer s3cret"})
            assert response.status_code == 200
