"""One cell of the table is one policy with one predictor at one number of slots; all run the same requests."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from actors.executor.eviction import EVICTION_POLICIES
from actors.predictor.decoding import (
    ActivationTracePredictor,
    DecodingPredictor,
    FrequencyPredictor,
    NoPredictor,
    OraclePredictor,
    count_activations,
)
from actors.predictor.traces import TraceFiles
from benchmarks.cache_policies.simulation import Ids, belady, simulate, split
from common.errors import ConfigError

BELADY = "belady"


@dataclass(frozen=True)
class Cell:
    policy: str  # in EVICTION_POLICIES, or BELADY
    predictor: str  # in PREDICTORS
    slots: int
    copies_ahead: int


@dataclass(frozen=True)
class Workload:
    """Requests that run one after the other; the first half warms up."""

    model_fingerprint: str
    num_experts: int
    requests: list[Ids]  # expert ids, [tokens, layers, top_k]
    token_ids: list[list[int]]  # of each request

    @classmethod
    def load(cls, trace: TraceFiles, num_requests: int) -> "Workload":
        """
        Raises:
            ConfigError: the trace has fewer than 2 windows without padding.
        """
        num_whole = sum(1 for _ in _whole_windows(trace))
        if num_whole < 2:
            allowed = "2 whole windows or more; trace a longer text, or with smaller window_tokens"
            raise ConfigError("trace", f"{num_whole} whole windows", allowed)
        step = max(1, num_whole // num_requests)
        chosen = list(islice(_whole_windows(trace), 0, step * num_requests, step))
        requests, token_ids = [ids for ids, _ in chosen], [tokens for _, tokens in chosen]
        return cls(trace.header.model_fingerprint, trace.header.num_experts, requests, token_ids)

    @property
    def num_layers(self) -> int:
        return int(self.requests[0].shape[1])

    @property
    def top_k(self) -> int:
        return int(self.requests[0].shape[2])

    @property
    def num_warm_up(self) -> int:
        return len(self.requests) // 2

    def run(self, cell: Cell) -> dict[str, Any]:
        """Returns: a row of the results; rates are of the counted half."""
        passes = [split(request) for request in self.requests]
        policy = belady(passes, self.num_experts) if cell.policy == BELADY else EVICTION_POLICIES[cell.policy]
        predictor = PREDICTORS[cell.predictor](self)
        counts = simulate(
            passes, self.num_experts, cell.slots, policy, predictor, cell.copies_ahead, self.num_warm_up
        )
        return {
            **vars(cell),
            "miss_rate": round(counts.miss_rate, 4),
            "moved_per_token": round(counts.moved / counts.tokens, 3),
            "prefetched_per_token": round(counts.prefetched / counts.tokens, 3),
            "in_vain": round(counts.in_vain / counts.prefetched, 4) if counts.prefetched else None,
        }


def _whole_windows(trace: TraceFiles) -> Iterator[tuple[Ids, list[int]]]:
    """Expert ids and token ids of each window without padding; the last one of a text may be short."""
    for batch in trace.batches(64, None):
        for window in batch.mask.all(dim=1).nonzero().squeeze(1).tolist():
            ids = batch.expert_ids[window, ..., : trace.header.top_k]
            yield ids.numpy().copy(), batch.token_ids[window].tolist()  # not a view of the whole batch


def _frequency(workload: Workload) -> DecodingPredictor:
    seen = np.concatenate(workload.requests[: workload.num_warm_up])  # [tokens, layers, top_k]
    return FrequencyPredictor(count_activations(seen, workload.num_experts))


def _oracle(workload: Workload) -> DecodingPredictor:
    passes = (ids for request in workload.requests for ids in split(request))
    return OraclePredictor(passes, workload.num_experts)


PREDICTORS: dict[str, Callable[[Workload], DecodingPredictor]] = {
    "none": lambda workload: NoPredictor(workload.num_layers, workload.num_experts),
    "frequency": _frequency,
    "activation-trace": lambda workload: ActivationTracePredictor(workload.num_layers, workload.num_experts),
    "oracle": _oracle,
}
