"""The routes by which people and machines watch the server: /metrics, the live page and its data."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from deployments.completions import Backend
from deployments.executor_metrics import registry_of
from deployments.openai_schema import ErrorBody
from deployments.request_metrics import RequestMetrics

LIVE_PAGE = Path(__file__).parent / "live_page.html"


def add_observation_routes(
    api: FastAPI, backend: Backend, metrics: RequestMetrics, guards: list[Any]
) -> None:
    """
    Args:
        metrics: of the requests, as the ingress sees them; executors are asked at each scrape.
        guards: dependencies of every route but the page, which is empty without its data.
    """

    @api.get("/metrics", dependencies=guards, include_in_schema=False)
    async def prometheus() -> Response:
        executors = registry_of(await backend.expert_report())
        text = generate_latest(metrics.registry) + generate_latest(executors)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in (401, 503)}

    @api.get("/v1/experts/live", dependencies=guards, responses=errors)
    async def live() -> dict[str, Any]:
        return await backend.live_view()

    @api.get("/", include_in_schema=False)
    async def live_page() -> FileResponse:
        return FileResponse(LIVE_PAGE, headers={"cache-control": "no-cache"})
