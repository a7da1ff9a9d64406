"""One cell of the table is one policy with one predictor at one number of slots; all run the same requests."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.pager import HASH_FUNCTION, NEXT_GATE
from actors.predictor.decoding import (
    ActivationTracePredictor,
    DecodingPredictor,
    FrequencyPredictor,
    NoPredictor,
    OraclePredictor,
    count_activations,
)
from actors.predictor.hash_function import find_hash_function
from actors.predictor.traces import TraceFiles
from benchmarks.cache_policies.guesses import (
    Guesses,
    RecordedGuesses,
    guess_by_hash_function,
    guess_next_gates,
)
from benchmarks.cache_policies.simulation import Ids, Number, belady, simulate, split
from common.checkpoint import Checkpoint
from common.errors import CheckpointError, ConfigError

BELADY = "belady"
NEED_A_MODEL = (NEXT_GATE, HASH_FUNCTION)  # for these predictors the trace alone is not enough


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
    at_once: bool = False  # an encoder reads all tokens of a request in one pass
    guesses: Mapping[str, list[Guesses]] = field(default_factory=dict)  # by predictor, for each request

    @classmethod
    def load(cls, trace: TraceFiles, num_requests: int) -> "Workload":
        """
        Raises:
            ConfigError: the trace has fewer than 2 windows.
        """
        num_windows = sum(1 for _ in _windows(trace))
        if num_windows < 2:
            allowed = "2 windows or more; trace a longer text, or with smaller window_tokens"
            raise ConfigError("trace", f"{num_windows} windows", allowed)
        step = max(1, num_windows // num_requests)
        chosen = list(islice(_windows(trace), 0, step * num_requests, step))
        requests, token_ids = [ids for ids, _ in chosen], [tokens for _, tokens in chosen]
        header = trace.header
        at_once = header.stack == "encoder"
        return cls(header.model_fingerprint, header.num_experts, requests, token_ids, at_once)

    def with_guesses(
        self, model: Path, hash_function: str = "auto", device: torch.device | None = None
    ) -> "Workload":
        """
        Args:
            model: the traced one.
            hash_function: its folder; auto: the model's own, if there is one.
            device: where the model reads the text.
        Raises:
            CheckpointError: the model is another one.
            ConfigError: the trace lacks what the model read; as `find_hash_function`.
        """
        self.check_model(model)
        found = find_hash_function(model, hash_function)
        guesses = {}
        if self.num_layers > 1:
            device = device or torch.device("cpu")
            guesses[NEXT_GATE] = guess_next_gates(model, self.token_ids, self.num_layers, device)
        if found is not None:
            guesses[HASH_FUNCTION] = guess_by_hash_function(found, model, self.token_ids)
        return replace(self, guesses=guesses)

    def check_model(self, model: Path) -> None:
        """
        Raises:
            CheckpointError, ConfigError: as `with_guesses`.
        """
        checkpoint = Checkpoint.open(model)
        if checkpoint.fingerprint != self.model_fingerprint:
            raise CheckpointError(str(model), "the trace is of another model; trace this one")
        if checkpoint.architecture.num_encoder_layers and not self.at_once:
            lacks = (
                "without --model, of a decoder beside an encoder: its trace does not hold what that one read"
            )
            raise ConfigError("model", str(model), lacks)

    @property
    def predictors(self) -> list[str]:
        """Those that can be simulated."""
        return [name for name in PREDICTORS if name in self.guesses or name not in NEED_A_MODEL]

    @property
    def num_layers(self) -> int:
        return int(self.requests[0].shape[1])

    @property
    def top_k(self) -> int:
        return int(self.requests[0].shape[2])

    @property
    def num_warm_up(self) -> int:
        return len(self.requests) // 2

    def warm_up_counts(self) -> Ids:
        """[layers, experts] activations of the half that warms up."""
        return count_activations(np.concatenate(self.requests[: self.num_warm_up]), self.num_experts)

    def passes(self, request: npt.NDArray[Number]) -> list[npt.NDArray[Number]]:
        """Args: request: [tokens, ...]."""
        return split(request, len(request) if self.at_once else 1)

    def all_passes(self, requests: list[npt.NDArray[Number]]) -> Iterator[npt.NDArray[Number]]:
        return (pass_ for request in requests for pass_ in self.passes(request))

    def run(self, cell: Cell) -> dict[str, Any]:
        """Returns: a row of the results; rates are of the counted half."""
        passes = [self.passes(request) for request in self.requests]
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


def _windows(trace: TraceFiles) -> Iterator[tuple[Ids, list[int]]]:
    """Expert ids and token ids of each window, without padding."""
    for batch in trace.batches(64, None):
        for window, length in enumerate(batch.mask.sum(dim=1).tolist()):
            ids = batch.expert_ids[window, :length, :, : trace.header.top_k]
            yield (
                ids.numpy().copy(),
                batch.token_ids[window, :length].tolist(),
            )  # not a view of the whole batch


def _frequency(workload: Workload) -> DecodingPredictor:
    return FrequencyPredictor(workload.warm_up_counts())


def _oracle(workload: Workload) -> DecodingPredictor:
    return OraclePredictor(workload.all_passes(workload.requests), workload.num_experts)


def _next_gate(workload: Workload) -> DecodingPredictor:
    return RecordedGuesses(workload.all_passes(workload.guesses[NEXT_GATE]), reach=1)


def _hash_function(workload: Workload) -> DecodingPredictor:
    return RecordedGuesses(workload.all_passes(workload.guesses[HASH_FUNCTION]))


PREDICTORS: dict[str, Callable[[Workload], DecodingPredictor]] = {
    "none": lambda workload: NoPredictor(workload.num_layers, workload.num_experts),
    NEXT_GATE: _next_gate,
    HASH_FUNCTION: _hash_function,
    "frequency": _frequency,
    "activation-trace": lambda workload: ActivationTracePredictor(workload.num_layers, workload.num_experts),
    "oracle": _oracle,
}
