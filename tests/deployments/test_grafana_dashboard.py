"""The dashboard asks for nothing that /metrics does not tell."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import deployments
from deployments.completions import CompletionService
from deployments.http_api import create_http_api
from deployments.prompts import PromptReader
from deployments.request_metrics import ObservedBackend, RequestMetrics
from tests.deployments.fakes import VOCAB_SIZE, byte_tokenizer
from tests.deployments.test_http_api import client_of
from tests.deployments.two_executors import TwoExecutors

DASHBOARD = Path(deployments.__file__).parent / "grafana_dashboard.json"


@pytest.fixture
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


async def told_metrics() -> dict[str, set[str]]:
    """Every sample's name in /metrics, and its labels, after a request that ended well and one that did not."""
    metrics = RequestMetrics()
    backend = ObservedBackend(TwoExecutors(), metrics)
    service = CompletionService("tiny", PromptReader(byte_tokenizer(), VOCAB_SIZE, 100), backend)
    async with client_of(create_http_api(service, None, metrics)) as client:
        for prompt in ("ab", "full"):
            await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2})
        response: httpx.Response = await client.get("/metrics")
    samples = [s for family in text_string_to_metric_families(response.text) for s in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


async def test_every_metric_and_label_exists(dashboard: dict[str, Any]) -> None:
    told = await told_metrics()
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [
        variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    ]
    asked = {name for query in queries for name in re.findall(r"\bsida_\w+", query)}
    assert len(asked) > 20
    assert asked <= told.keys()
    for query in queries:
        labels = {label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")}
        for name in re.findall(r"\bsida_\w+", query):
            assert labels <= told[name], query


async def test_every_metric_is_on_the_dashboard(dashboard: dict[str, Any]) -> None:
    text = json.dumps(dashboard)
    untold = {
        name
        for name in await told_metrics()
        if name not in text and not name.endswith(("_created", "_sum", "_count"))
    }
    assert untold == set()


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
