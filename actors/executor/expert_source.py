"""Where an executor's experts come from, and the plainest such place, the checkpoint itself. Not a cache policy.

A source hands out host-memory slabs in the *stored* layout; the slots copy and, where dtypes differ, convert.
"""

import mmap
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.expert_layout import ExpertLayout

FETCH_TIMEOUT_S = 60.0  # how long a pass waits for an expert whose store has died and reloads


class ExpertSource(Protocol):
    """Read-only host slabs of every expert. Called from several threads at once."""

    layout: ExpertLayout
    model_fingerprint: str
    # Called after all slabs were replaced by others of the same contents; must not raise.
    on_adopted: Callable[[], None] | None

    def fetch(self, layer: int, expert_id: int) -> Tensor:
        """The expert's slab: [slab_bytes] uint8 on the CPU, to be read only.

        Raises:
            ExpertsUnavailableError: it could not be had in FETCH_TIMEOUT_S.
        """

    def local_slabs(self) -> Mapping[tuple[int, int], Tensor]:
        """The slabs in this process' address space now, by (layer, expert id), as `fetch` returns them.

        The mapping never changes, and whoever holds it keeps the slabs where they are.
        """


class CheckpointExpertSource:
    """Reads each expert from the checkpoint once and keeps it: for evaluation and tests, without a store."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.layout = checkpoint.stored_layout
        self.model_fingerprint = checkpoint.fingerprint
        self._checkpoint = checkpoint
        self._slabs: dict[tuple[int, int], Tensor] = {}
        self.on_adopted: Callable[[], None] | None = None  # never called: nothing is replaced

    def fetch(self, layer: int, expert_id: int) -> Tensor:
        slab = self._slabs.get((layer, expert_id))
        if slab is None:
            buffer = np.empty(self.layout.slab_bytes, np.uint8)
            self._checkpoint.read_expert(layer, expert_id, buffer)
            slab = self._slabs[layer, expert_id] = torch.from_numpy(buffer)
        return slab

    def local_slabs(self) -> Mapping[tuple[int, int], Tensor]:
        """All experts: the first call reads them, into memory that they share with nothing else."""
        keys = list(self._checkpoint.expert_ranges)
        if len(self._slabs) < len(keys):
            block = torch.frombuffer(mmap.mmap(-1, len(keys) * self.layout.slab_bytes), dtype=torch.uint8)
            for key, slab in zip(keys, block.view(len(keys), -1).unbind(), strict=True):
                self._checkpoint.read_expert(*key, slab.numpy())
                self._slabs[key] = slab
        return self._slabs
