"""Where an executor's experts come from: the expert store's objects, or a checkpoint read directly. Not a cache policy.

A source hands out host-memory slabs in the *stored* layout; the slots copy and, where dtypes differ, convert.
"""

import threading
import time
import warnings
from typing import Protocol

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.expert_store.directory import ExpertDirectory
from common.checkpoint import Checkpoint
from common.errors import ExpertsUnavailableError
from common.expert_layout import ExpertLayout

FETCH_TIMEOUT_S = 60.0  # how long a pass waits for an expert whose store has died and reloads
_RETRY_S = 0.2


class ExpertSource(Protocol):
    """Read-only host slabs of every expert. Called from several threads at once."""

    layout: ExpertLayout
    model_fingerprint: str

    def fetch(self, layer: int, expert_id: int) -> Tensor:
        """The expert's slab: [slab_bytes] uint8 on the CPU, to be read only.

        Raises:
            ExpertsUnavailableError: it could not be had in FETCH_TIMEOUT_S.
        """


class CheckpointExpertSource:
    """Reads each expert from the checkpoint once and keeps it: for evaluation and tests, without a store."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.layout = checkpoint.stored_layout
        self.model_fingerprint = checkpoint.fingerprint
        self._checkpoint = checkpoint
        self._slabs: dict[tuple[int, int], Tensor] = {}

    def fetch(self, layer: int, expert_id: int) -> Tensor:
        slab = self._slabs.get((layer, expert_id))
        if slab is None:
            buffer = np.empty(self.layout.slab_bytes, np.uint8)
            self._checkpoint.read_expert(layer, expert_id, buffer)
            slab = self._slabs[layer, expert_id] = torch.from_numpy(buffer)
        return slab


class StoreExpertSource:
    """Zero-copy views of the store's objects on this node; objects of other nodes are fetched when needed.

    Views stay valid when the store dies: passes go on with them until `adopt` brings the reloaded store's directory.
    """

    def __init__(self, directory: ExpertDirectory, node_id: str) -> None:
        self.layout = directory.layout
        self.model_fingerprint = directory.model_fingerprint
        self._node_id = node_id
        self._lock = threading.Lock()
        self._directory = directory
        self._views: dict[tuple[int, int], Tensor] = {}
        self.adopt(directory)

    @property
    def generation(self) -> str:
        return self._directory.generation

    def adopt(self, directory: ExpertDirectory) -> None:
        """Resolve a new directory's local objects, then drop the old views. Blocks; call it off the engine's thread.

        Raises:
            ValueError: the directory is of another model; a running executor cannot change its weights.
        """
        if directory.model_fingerprint != self.model_fingerprint:
            raise ValueError(
                f"store now holds model {directory.model_fingerprint}, not {self.model_fingerprint}"
            )
        local = [key for key, node_id in directory.node_ids.items() if node_id == self._node_id]
        arrays = ray.get([directory.refs[key] for key in local])
        views = {key: _as_tensor(array) for key, array in zip(local, arrays, strict=True)}
        with self._lock:
            self._directory, self._views = directory, views

    def fetch(self, layer: int, expert_id: int) -> Tensor:
        deadline = time.monotonic() + FETCH_TIMEOUT_S
        while True:
            with self._lock:
                view, directory = self._views.get((layer, expert_id)), self._directory
            if view is not None:
                return view
            try:
                return _as_tensor(ray.get(directory.refs[layer, expert_id], timeout=FETCH_TIMEOUT_S))
            except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError) as error:
                if time.monotonic() > deadline:
                    raise ExpertsUnavailableError(layer, expert_id, FETCH_TIMEOUT_S) from error
                time.sleep(_RETRY_S)  # the store's owner died; `adopt` will bring its successor's objects


def _as_tensor(array: NDArray[np.uint8]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
