"""What the ingress sees of requests: Prometheus counters and histograms, and one log line at each request's end.

A request here is one prompt. What executors count is in `executor_metrics.py`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from common.generation import GenerationChunk, GenerationRequest
from deployments.completions import Backend
from deployments.openai_errors import error_code

logger = logging.getLogger("ray.serve")

ABORTED = "abort"  # vLLM's word for a request whose client has gone

_TTFT_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_TOKEN_BUCKETS_S = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_REQUEST_BUCKETS_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)


class RequestMetrics:
    """The figures of one ingress, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.succeeded = Counter(
            "sida_request_success", "Requests that ended well.", ["finished_reason"], registry=registry
        )
        self.failed = Counter(
            "sida_request_failure", "Requests that ended with an error.", ["code"], registry=registry
        )
        self.first_token_s = Histogram(
            "sida_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            registry=registry,
            buckets=_TTFT_BUCKETS_S,
        )
        self.token_s = Histogram(
            "sida_inter_token_latency_seconds",
            "From one token of a request to the next; tokens that come together share their time.",
            registry=registry,
            buckets=_TOKEN_BUCKETS_S,
        )
        self.request_s = Histogram(
            "sida_e2e_request_latency_seconds",
            "From a request's arrival to its last token.",
            registry=registry,
            buckets=_REQUEST_BUCKETS_S,
        )


class ObservedBackend:
    """A `Backend` that passes everything on to another one and observes the requests."""

    def __init__(self, backend: Backend, metrics: RequestMetrics) -> None:
        self._backend, self._metrics = backend, metrics

    def predict(self, request: GenerationRequest) -> None:
        self._backend.predict(request)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        observation = _Observation(request, self._metrics)
        try:
            async with aclosing(self._backend.generate(request)) as chunks:
                async for chunk in chunks:
                    observation.take(chunk)
                    yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            observation.end(ABORTED)
            raise
        except Exception as error:
            observation.fail(error_code(error))
            raise

    async def expert_report(self) -> dict[str, Any]:
        return await self._backend.expert_report()

    async def live_view(self) -> dict[str, Any]:
        return await self._backend.live_view()


class _Observation:
    """One request on its way. It ends once; what comes after that is not counted."""

    def __init__(self, request: GenerationRequest, metrics: RequestMetrics) -> None:
        self._request, self._metrics = request, metrics
        self._began_s = self._last_s = time.monotonic()
        self._first_token_s: float | None = None  # from the beginning
        self._num_tokens = 0
        self._ended = False

    def take(self, chunk: GenerationChunk) -> None:
        num_tokens = len(chunk.token_ids)
        if num_tokens:
            now_s = time.monotonic()
            if self._first_token_s is None:
                self._first_token_s = now_s - self._began_s
                self._metrics.first_token_s.observe(self._first_token_s)
                num_after = num_tokens - 1
            else:
                num_after = num_tokens
            for _ in range(num_after):
                self._metrics.token_s.observe((now_s - self._last_s) / num_tokens)
            self._num_tokens += num_tokens
            self._last_s = now_s
        if chunk.finish_reason is not None:
            self._metrics.request_s.observe(time.monotonic() - self._began_s)
            self.end(chunk.finish_reason)

    def end(self, reason: str) -> None:
        if not self._ended:
            self._metrics.succeeded.labels(reason).inc()
            self._log(reason)

    def fail(self, code: str) -> None:
        if not self._ended:
            self._metrics.failed.labels(code).inc()
            self._log(code)

    def _log(self, status: str) -> None:
        self._ended = True
        first = "-" if self._first_token_s is None else f"{1e3 * self._first_token_s:.1f}"
        logger.info(
            "request %s ended: status=%s prompt_tokens=%d generated_tokens=%d ttft_ms=%s e2e_ms=%.1f",
            self._request.request_id, status, len(self._request.prompt_token_ids), self._num_tokens, first,
            1e3 * (time.monotonic() - self._began_s),
        )  # fmt: skip
