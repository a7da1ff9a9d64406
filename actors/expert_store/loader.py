"""The Ray task that reads one chunk of experts from the checkpoint. Knows files and offsets only, imports no torch."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.expert_store.placement import HOST_MEMORY_RESOURCE, NodeOffer
from common.file_ranges import FileRange, FileReader

# Lost experts are rebuilt from the checkpoint: each death of a worker or node costs one retry.
MAX_RETRIES = 10


@dataclass(frozen=True)
class ChunkReport:
    """What a load task tells about itself."""

    node_id: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class SubmittedChunk:
    """A running load task: one reference per expert, and the report that comes last."""

    slabs: tuple["ray.ObjectRef[NDArray[np.uint8]]", ...]
    report: "ray.ObjectRef[ChunkReport]"


def submit_chunk(experts: Sequence[Sequence[FileRange]], slab_bytes: int, node: NodeOffer) -> SubmittedChunk:
    """Start loading experts on a node; on any other that offers host memory should it be gone.

    The caller owns the experts: they live as long as it does and holds the references.
    """
    options: dict[str, Any] = {
        "num_returns": len(experts) + 1,
        "num_cpus": 0,  # the caller bounds what runs at once; a CPU might never be free on a laptop
        "max_retries": MAX_RETRIES,
        "resources": {HOST_MEMORY_RESOURCE: 0.001} if node.offers_host_memory else {},
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=True),
    }
    *slabs, report = _load_chunk_task.options(**options).remote(experts, slab_bytes)
    return SubmittedChunk(tuple(slabs), report)


def load_chunk(
    experts: Sequence[Sequence[FileRange]], slab_bytes: int
) -> Iterator[NDArray[np.uint8] | ChunkReport]:
    """Read experts one after the other, then report. Ray stores each before it asks for the next, so the task
    never holds more than one.

    Raises:
        CheckpointError: a file is missing on this node or shorter than it was.
    """
    started = time.perf_counter()
    slab = np.zeros(slab_bytes, np.uint8)  # one for all: fresh pages would cost as much as the copy
    with FileReader() as reader:
        for ranges in experts:
            reader.read(ranges, slab)
            yield slab
    node_id = ray.get_runtime_context().get_node_id()
    yield ChunkReport(node_id, len(experts) * slab_bytes, time.perf_counter() - started)


_load_chunk_task = ray.remote(load_chunk)
