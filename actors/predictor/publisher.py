"""Predicts requests' hash tables and puts them on the table bus; requests that come together are predicted together."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from actors.predictor.predictor import Predictor
from common.errors import EngineStoppedError
from common.hash_table import HashTable
from common.table_bus import TableBus

MAX_BATCH = 8
MAX_DELAY_S = 0.002  # how long the first request of a batch waits for others


@dataclass(frozen=True)
class _Job:
    request_id: str
    token_ids: Sequence[int]
    done: asyncio.Future[None]


class TablePublisher:
    """Micro-batches `publish` calls of one event loop; the predictor runs on a thread of its own."""

    def __init__(
        self,
        predictor: Predictor,
        bus: TableBus,
        *,
        max_batch: int = MAX_BATCH,
        max_delay_s: float = MAX_DELAY_S,
    ) -> None:
        self._predictor, self._bus = predictor, bus
        self._max_batch, self._max_delay_s = max_batch, max_delay_s
        self._queue: asyncio.Queue[_Job] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predictor")
        self._worker: asyncio.Task[None] | None = None
        self._handing_over: set[asyncio.Task[None]] = set()
        self.num_batches = 0
        self.num_published = 0

    async def publish(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Predict and publish; returns when the table is on the bus.

        Raises:
            VocabularyError: an id lies outside the model's vocabulary.
            TableBusError: the bus did not take the table.
            EngineStoppedError: the publisher was stopped meanwhile.
        """
        if self._worker is None:
            self._worker = asyncio.create_task(self._run())
        job = _Job(request_id, token_ids, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(job)
        await job.done

    async def stop(self) -> None:
        """Fail what waits and end the thread; a second call does nothing."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.cancel()
            await asyncio.gather(worker, *self._handing_over, return_exceptions=True)
        self._thread.shutdown(wait=False)
        while not self._queue.empty():
            _fail(self._queue.get_nowait(), EngineStoppedError("the predictor stops"))

    async def _run(self) -> None:
        while True:
            jobs = [job for job in await self._collect() if not job.done.done()]  # without those that gave up
            try:
                await self._predict_and_publish(jobs)
            except asyncio.CancelledError:
                for job in jobs:
                    _fail(job, EngineStoppedError("the predictor stops"))
                raise

    async def _collect(self) -> list[_Job]:
        jobs = [await self._queue.get()]
        deadline = asyncio.get_running_loop().time() + self._max_delay_s
        while len(jobs) < self._max_batch:
            try:
                async with asyncio.timeout_at(deadline):
                    jobs.append(await self._queue.get())
            except TimeoutError:
                break
        return jobs

    async def _predict_and_publish(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        try:
            tables = await self._predict([job.token_ids for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                _fail(jobs[0], error)
                return
            for job in jobs:  # one bad prompt must not cost the others their tables
                await self._predict_and_publish([job])
            return
        self.num_batches += 1
        for job, table in zip(jobs, tables, strict=True):
            handing_over = asyncio.create_task(self._hand_over(job, table))  # a slow bus delays no prediction
            self._handing_over.add(handing_over)
            handing_over.add_done_callback(self._handing_over.discard)

    async def _predict(self, prompts: list[Sequence[int]]) -> list[HashTable]:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._predictor.predict, prompts
        )

    async def _hand_over(self, job: _Job, table: HashTable) -> None:
        try:
            await self._bus.publish(job.request_id, table)
        except Exception as error:
            _fail(job, error)
            return
        self.num_published += 1
        if not job.done.done():
            job.done.set_result(None)


def _fail(job: _Job, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)
