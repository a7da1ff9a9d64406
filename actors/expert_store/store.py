"""The expert store: loads every expert of a checkpoint into the nodes' shared memory and owns the references.

A plain class in a Ray process. It never builds the model; it is no server, `deployments/expert_store.py` is its shell.
"""

import asyncio
import logging
import threading
import uuid
from collections import Counter
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from actors.expert_store.balancing import MaxLoad, max_load
from actors.expert_store.directory import ExpertDirectory
from actors.expert_store.loader import ChunkReport, SubmittedChunk, submit_chunk
from actors.expert_store.loads import ExpertLoads
from actors.expert_store.placement import Chunk, NodeOffer, find_offers, make_chunks, place, place_by_load
from actors.expert_store.progress import LoadProgress
from common.checkpoint import Checkpoint
from common.errors import UnavailableError

TASKS_PER_NODE = 4  # beyond that the copies share one memory bus
POLL_S = 0.5  # how soon a load notices that it was stopped


@dataclass(frozen=True)
class StoreDescription:
    """What the store holds, as plain numbers for people and the API."""

    state: str  # "loading", "ready" or "failed"
    model: str
    experts: int
    loaded_experts: int
    expert_bytes: int  # of one expert
    total_bytes: int
    nodes: dict[str, int]  # node id -> bytes loaded there
    placement: str  # "even", or "by load" of a trace
    max_load: (
        dict[str, float] | None
    )  # by load: a MaxLoad of that trace, on the nodes that loaded the experts
    seconds: float
    gb_per_s: float
    generation: str | None
    error: str | None


class ExpertStore:
    """Owns all experts of one checkpoint. `start()` loads once; everything else may be called from any thread."""

    def __init__(
        self, folder: str | Path, logger: logging.Logger | None = None, placement_trace: str | None = None
    ) -> None:
        """
        Args:
            placement_trace: a file of ExpertLoads to place experts by; without one nodes are filled evenly.
        """
        self._folder, self._logger = Path(folder), logger or logging.getLogger(__name__)
        self._placement_trace = placement_trace
        self._max_load: MaxLoad | None = None
        self._loaded: Future[ExpertDirectory] = Future()
        self._thread = threading.Thread(target=self._run, name="expert-store-load", daemon=True)
        self._stopping = threading.Event()
        self._progress: LoadProgress | None = None

    def start(self) -> None:
        """Begin to load in a thread; a second call changes nothing."""
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        """Abandon a running load. The experts live until the references, and with them this object, are gone."""
        self._stopping.set()

    def directory(self, timeout_s: float | None = None) -> ExpertDirectory:
        """The references to all experts; waits for the load.

        Raises:
            CheckpointError: the checkpoint is damaged or not on every node.
            CapacityError: the experts do not fit in the object stores.
            ConfigError: the placement trace is unusable or of another model.
            UnavailableError: the store was stopped first.
            TimeoutError: the load took longer than `timeout_s`.
        """
        return self._loaded.result(timeout_s)

    async def wait_directory(self) -> ExpertDirectory:
        """`directory()` for an event loop, without a limit; cancelling it does not cancel the load."""
        return await asyncio.shield(asyncio.wrap_future(self._loaded))

    def check_health(self) -> None:
        """
        Raises:
            ServingError: the load failed; the same as `directory()`.
        """
        if self._loaded.done():
            self._loaded.result()

    def describe(self) -> dict[str, Any]:
        """A StoreDescription as a plain dict, at any time."""
        error = self._loaded.exception() if self._loaded.done() else None
        directory = self._loaded.result() if self._loaded.done() and error is None else None
        progress, nodes = self._progress, Counter(directory.node_ids.values() if directory else ())
        slab_bytes = directory.layout.slab_bytes if directory else 0
        description = StoreDescription(
            state="failed" if error else "ready" if directory else "loading",
            model=str(self._folder),
            experts=progress.num_experts if progress else 0,
            loaded_experts=progress.loaded_experts if progress else 0,
            expert_bytes=slab_bytes,
            total_bytes=progress.total_bytes if progress else 0,
            nodes={node_id: count * slab_bytes for node_id, count in nodes.items()},
            placement="by load" if self._placement_trace else "even",
            max_load=asdict(self._max_load) if self._max_load else None,
            seconds=progress.seconds if progress else 0.0,
            gb_per_s=progress.gb_per_s if progress else 0.0,
            generation=directory.generation if directory else None,
            error=str(error) if error else None,
        )
        return asdict(description)

    def _run(self) -> None:
        try:
            self._loaded.set_result(self._load())
        except Exception as error:
            self._logger.error("the experts of %s were not loaded: %s", self._folder, error)
            self._loaded.set_exception(error)

    def _load(self) -> ExpertDirectory:
        checkpoint = Checkpoint.open(self._folder)
        layout, trace = checkpoint.stored_layout, self._placement_trace
        loads = ExpertLoads.load_for(checkpoint, trace) if trace else None
        offers = find_offers(ray.nodes(), ray.get_runtime_context().get_node_id())
        if loads is not None:
            placed = place_by_load(loads, layout.slab_bytes, offers)
        else:
            placed = _place_evenly(checkpoint, offers)
        directory = ExpertDirectory(uuid.uuid4().hex[:12], checkpoint.fingerprint, layout, {}, {})
        self._progress = LoadProgress(len(checkpoint.expert_ranges), layout.slab_bytes, self._logger)
        try:
            self._load_chunks(checkpoint, placed, directory)
        finally:
            self._progress.close()
        if loads is not None:
            self._max_load = self._measure(loads, directory)
        return directory

    def _measure(self, loads: NDArray[np.int64], directory: ExpertDirectory) -> MaxLoad:
        numbers = {node_id: number for number, node_id in enumerate(sorted(set(directory.node_ids.values())))}
        plan = np.empty(loads.shape[1:], np.int64)
        for (layer, expert_id), node_id in directory.node_ids.items():
            plan[layer, expert_id] = numbers[node_id]
        load = max_load(loads, plan)
        self._logger.info(
            "experts placed on %d nodes by the loads of %s: the most loaded node gets %.1f %% of a batch's tokens, at "
            "most %.1f %%", len(numbers), self._placement_trace, 100 * load.average, 100 * load.worst,
        )  # fmt: skip
        return load

    def _load_chunks(
        self, checkpoint: Checkpoint, placed: list[tuple[Chunk, NodeOffer]], directory: ExpertDirectory
    ) -> None:
        """Keep a bounded number of load tasks running until all experts are in `directory`."""
        limit = sum(_tasks_at_once(node) for node in {node for _, node in placed})
        running: dict[ray.ObjectRef[ChunkReport], tuple[Chunk, SubmittedChunk]] = {}
        waiting = iter(placed)
        while True:
            while len(running) < limit and (following := next(waiting, None)):
                chunk, node = following
                ranges = [checkpoint.expert_ranges[chunk.layer, expert_id] for expert_id in chunk.expert_ids]
                submitted = submit_chunk(ranges, directory.layout.slab_bytes, node)
                running[submitted.report] = chunk, submitted
            if not running:
                return
            for report in self._wait_any(list(running)):
                self._record(*running.pop(report), directory)

    def _wait_any(self, reports: list["ray.ObjectRef[ChunkReport]"]) -> list["ray.ObjectRef[ChunkReport]"]:
        ready: list[ray.ObjectRef[ChunkReport]] = []
        while not self._stopping.is_set():
            ready, _ = ray.wait(reports, num_returns=1, timeout=POLL_S)
            if ready:
                return ready
        raise UnavailableError("the expert store was stopped while it loaded")

    def _record(self, chunk: Chunk, submitted: SubmittedChunk, directory: ExpertDirectory) -> None:
        report = _get_report(submitted)
        for expert_id, slab in zip(chunk.expert_ids, submitted.slabs, strict=True):
            directory.refs[chunk.layer, expert_id] = slab
            directory.node_ids[chunk.layer, expert_id] = report.node_id
        assert self._progress is not None
        self._progress.add(len(chunk.expert_ids))


def _place_evenly(checkpoint: Checkpoint, offers: list[NodeOffer]) -> list[tuple[Chunk, NodeOffer]]:
    architecture, slab_bytes = checkpoint.architecture, checkpoint.stored_layout.slab_bytes
    chunks = make_chunks(architecture.num_layers, architecture.num_experts, slab_bytes, len(offers))
    return list(zip(chunks, place(chunks, slab_bytes, offers), strict=True))


def _tasks_at_once(node: NodeOffer) -> int:
    return max(1, min(TASKS_PER_NODE, int(node.num_cpus)))


def _get_report(submitted: SubmittedChunk) -> ChunkReport:
    """The task's own error, not Ray's wrapping of it with a remote traceback."""
    try:
        report: ChunkReport = ray.get(submitted.report)
    except RayTaskError as error:
        raise error.cause from None
    return report
