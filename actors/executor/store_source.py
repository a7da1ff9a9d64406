"""The experts of an executor as the expert store's objects: views of shared memory, and what happens when it dies."""

import threading
import time
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.expert_source import FETCH_TIMEOUT_S
from actors.expert_store.directory import ExpertDirectory
from common.errors import ExpertsUnavailableError

_RETRY_S = 0.2


class StoreExpertSource:
    """Zero-copy views of the store's objects on this node; objects of other nodes are fetched when needed.

    Views stay valid when the store dies: passes go on with them until `adopt` brings the reloaded store's directory.

    Attributes:
        on_adopted: as `ExpertSource` has it; called on the thread of `adopt`.
    """

    def __init__(self, directory: ExpertDirectory, node_id: str) -> None:
        self.layout = directory.layout
        self.model_fingerprint = directory.model_fingerprint
        self._node_id = node_id
        self._lock = threading.Lock()
        self._directory = directory
        self._views: Mapping[tuple[int, int], Tensor] = {}  # replaced, never changed
        self.on_adopted: Callable[[], None] | None = None
        self.adopt(directory)

    @property
    def generation(self) -> str:
        return self._directory.generation

    def adopt(self, directory: ExpertDirectory) -> None:
        """Resolve a new directory's local objects and make them current, then drop the old views.

        Blocks; call it off the engine's thread.

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
        if self.on_adopted is not None:
            self.on_adopted()

    def local_slabs(self) -> Mapping[tuple[int, int], Tensor]:
        with self._lock:
            return self._views

    def fetch(self, layer: int, expert_id: int) -> Tensor:
        deadline = time.monotonic() + FETCH_TIMEOUT_S
        while True:
            with self._lock:
                view, directory = self._views.get((layer, expert_id)), self._directory
            if view is not None:
                return view
            try:
                return _as_tensor(ray.get(directory.refs[layer, expert_id], timeout=FETCH_TIMEOUT_S))
            except ray.exceptions.RayError as error:
                if time.monotonic() > deadline:
                    raise ExpertsUnavailableError(layer, expert_id, FETCH_TIMEOUT_S) from error
                time.sleep(_RETRY_S)  # the store died; `adopt` will bring its successor's objects


def _as_tensor(array: NDArray[np.uint8]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
