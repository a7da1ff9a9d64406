"""`python -m actors.expert_store.record_loads trace=FOLDER out=FILE`: count the load of every expert in a recorded trace.

The trace is one of `python -m actors.predictor.trace`; the server takes the file as `placement_trace=FILE`
and as `resident_set=FILE`.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from actors.expert_store.loads import ExpertLoads
from actors.predictor.arguments import read_command_line
from actors.predictor.traces import TraceBatch, TraceFiles, TraceSource
from common.errors import ConfigError, ServingError

READ_AT_ONCE = 64  # windows of the trace


class LoadArguments(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    trace: str = Field(description="folder of traces", min_length=1)
    out: str = Field(description="file for the loads", min_length=1)
    batch_tokens: int = Field(
        512,
        ge=1,
        description="tokens of one load window; windows of the trace are put together until they have them",
    )


def record_loads(source: TraceSource, batch_tokens: int) -> ExpertLoads:
    """Loads of a trace in its own order, in windows of `batch_tokens` and more; what is left at the end is not counted.

    Raises:
        ConfigError: the trace has fewer tokens than one window.
    """
    header = source.header
    counted = (
        window
        for batch in source.batches(READ_AT_ONCE, None)
        for window in zip(
            batch.mask.sum(1).tolist(), _count(batch, header.num_experts, header.top_k), strict=True
        )
    )
    counts = list(_merge(counted, batch_tokens))
    if not counts:
        raise ConfigError("batch_tokens", batch_tokens, "no more than the trace has tokens")
    return ExpertLoads(header.model_fingerprint, np.stack(counts), header.stack)


def _merge(
    windows: Iterable[tuple[int, NDArray[np.int64]]], batch_tokens: int
) -> Iterator[NDArray[np.int64]]:
    tokens, counts = 0, np.zeros(1, np.int64)
    for more_tokens, more_counts in windows:
        tokens, counts = tokens + more_tokens, counts + more_counts
        if tokens >= batch_tokens:
            yield counts
            tokens, counts = 0, np.zeros(1, np.int64)


def _count(batch: TraceBatch, num_experts: int, top_k: int) -> NDArray[np.int64]:
    """[windows, layers, experts], without padding."""
    ids = batch.expert_ids[..., :top_k].cpu().numpy()  # [windows, tokens, layers, top_k]
    windows, _, layers, _ = ids.shape
    counters = np.arange(windows * layers).reshape(windows, 1, layers, 1) * num_experts  # the first of each
    return np.bincount(
        (ids + counters)[batch.mask.cpu().numpy()].reshape(-1), minlength=windows * layers * num_experts
    ).reshape(windows, layers, num_experts)


def main() -> None:
    arguments = read_command_line(LoadArguments, __doc__)
    try:
        loads = record_loads(TraceFiles(arguments.trace), arguments.batch_tokens)
        loads.save(arguments.out)
    except (ServingError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    windows, layers, experts = loads.counts.shape
    print(f"{windows} windows of {layers} layers and {experts} experts in {arguments.out}")


if __name__ == "__main__":
    main()
