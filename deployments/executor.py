"""Serve shell of the engine: brings requests and their hash tables to it and streams its chunks back."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.serve.handle import DeploymentHandle

from actors.executor.build import build_engine
from actors.executor.chunk_stream import ChunkPace, ChunkStream
from actors.executor.live_view import LiveView
from actors.executor.status_line import StatusLine
from actors.executor.store_source import StoreExpertSource
from actors.executor.warm_up import Residents
from common.config import ServingConfig
from common.errors import HashTableError, TableBusError
from common.generation import ExpertUsage, GenerationChunk, GenerationRequest, RequestTimings
from deployments.peers import ask_peers
from deployments.replica import replica_id
from deployments.table_server import connect_bus

logger = logging.getLogger("ray.serve")

STORE_POLL_S = 1.0


class ExecutorDeployment:
    """One engine. The constructor returns when the model is loaded, which is when Serve sends requests."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ServingConfig, store: DeploymentHandle, table_server: DeploymentHandle | None
    ) -> None:
        """
        Args:
            store: of ExpertStoreDeployment.
            table_server: of TableServer; None when nothing predicts.
        """
        if config.device != "cuda":
            torch.set_num_threads(_num_threads())
        self._config, self._store = config, store
        directory = await store.directory.remote()
        node_id = ray.get_runtime_context().get_node_id()
        self._source, peers = await asyncio.gather(
            asyncio.to_thread(StoreExpertSource, directory, node_id), ask_peers(directory.model_fingerprint)
        )
        self._engine = await asyncio.to_thread(build_engine, config, self._source, logger, peers)
        self._engine.start()
        self._bus = connect_bus(config, table_server) if table_server is not None else None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pace = ChunkPace(config.max_chunks_per_s / config.max_executors)
        self._view = LiveView(self._engine.activity, self._engine.report)
        self._spawn(self._follow_store())
        if config.status_interval_s:
            self._spawn(self._log_status(config.status_interval_s))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Stream a request's chunks; closing the iterator early frees its row.

        Raises:
            QueueFullError, EngineStoppedError, ExpertsUnavailableError: try again.
        """
        stream = ChunkStream(asyncio.get_running_loop(), self._pace)
        self._engine.submit(request, stream)
        delivery = self._spawn(self._deliver_table(request.request_id)) if self._bus is not None else None
        entry = _LogEntry(request)
        try:
            async with aclosing(aiter(stream)) as chunks:
                async for chunk in chunks:
                    entry.take(chunk)
                    yield chunk
        except Exception as error:
            entry.status = getattr(error, "code", type(error).__name__)
            raise
        finally:
            entry.write()
            self._engine.cancel(request.request_id)
            if delivery is not None and not delivery.done():
                delivery.cancel()
                self._engine.count_table("lost")

    async def expert_report(self) -> dict[str, Any]:
        """What is resident and what has happened since start, as JSON."""
        report = self._engine.report().to_json()
        return {"replica": replica_id(), "store_generation": self._source.generation, **report}

    async def residents(self) -> Residents:
        """For `ask_peers` of a new executor."""
        return self._engine.residents()

    async def live_view(self) -> dict[str, Any]:
        """What happens to every expert, for the live page."""
        return {"replica": replica_id(), **self._view.look()}

    def check_health(self) -> None:
        """
        Raises:
            EngineStoppedError: this replica must be replaced.
        """
        self._engine.check_health()

    def stop(self) -> None:
        """Fail what is unfinished and end the engine's threads. Twice is fine."""
        for task in tuple(self._tasks):
            task.cancel()
        self._engine.stop()

    def __del__(self) -> None:  # Serve calls it at the end of a graceful shutdown
        if hasattr(self, "_tasks"):
            self.stop()

    def _spawn(self, coroutine: Any) -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _deliver_table(self, request_id: str) -> None:
        """Bring the engine the request's hash table whenever it comes; the request does not wait for it."""
        assert self._bus is not None
        try:
            table = await self._bus.fetch(request_id, timeout_s=self._config.table_ttl_s)
            if table is None:
                self._engine.count_table("lost")
                return
            self._engine.attach_table(request_id, table)
            await self._bus.discard(request_id)
        except TableBusError as error:
            self._engine.count_table("lost")
            logger.warning("request %s runs on demand: %s", request_id, error)
        except HashTableError as error:
            self._engine.count_table("unusable")
            logger.warning("request %s runs on demand: %s", request_id, error)

    async def _log_status(self, interval_s: float) -> None:
        status = StatusLine(self._engine.report(), time.monotonic())
        while True:
            await asyncio.sleep(interval_s)
            line = status.next(self._engine.report(), time.monotonic())
            if line is not None:
                logger.info("executor %s: %s", replica_id(), line)

    async def _follow_store(self) -> None:
        """Take over the objects of a store that was restarted; until then the old views serve."""
        while True:
            await asyncio.sleep(STORE_POLL_S)
            try:
                if await self._store.generation.remote() != self._source.generation:
                    directory = await self._store.directory.remote()
                    await asyncio.to_thread(self._source.adopt, directory)
                    logger.info("Executor now reads the experts of store generation %s", directory.generation)
            except Exception as error:  # the store is away; Serve brings it back
                logger.warning("The expert store does not answer, its last objects are used: %s", error)


@dataclass
class _LogEntry:
    """One request, as the log tells of it at its end."""

    request: GenerationRequest
    status: str = "cancelled"
    num_tokens: int = 0
    timings: RequestTimings | None = None
    experts: ExpertUsage | None = None

    def take(self, chunk: GenerationChunk) -> None:
        self.num_tokens += len(chunk.token_ids)
        self.status = chunk.finish_reason or self.status
        self.timings, self.experts = chunk.timings, chunk.experts

    def write(self) -> None:
        timings, experts = self.timings, self.experts
        where = "" if timings is None else (
            f" queue_ms={1e3 * timings.queue_s:.1f} prefill_ms={1e3 * timings.prefill_s:.1f} "
            f"decode_ms={1e3 * timings.decode_s:.1f}"
        )  # fmt: skip
        which = "" if experts is None else f" experts_needed={experts.needed} experts_missed={experts.missed}"
        logger.info(
            "request %s ended: status=%s prompt_tokens=%d generated_tokens=%d%s%s",
            self.request.request_id, self.status, len(self.request.prompt_token_ids), self.num_tokens, where, which,
        )  # fmt: skip


def _num_threads() -> int:
    """Half of the processors this process may use. Ray's default is one for whoever reserves part of a CPU; all of
    them would spin against the predictor, the ingress and Serve (measured on 2 cores: 3 to 10 times slower).
    """
    return max(1, len(os.sched_getaffinity(0)) // 2)
