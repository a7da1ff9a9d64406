"""The experts of a source where the device can have them: addresses for kernels, and the way for the copy engine."""

import logging
import threading

import torch
from torch import Tensor

from actors.executor.expert_source import ExpertSource
from actors.executor.gpu.host_memory import CudaHostMemory, HostRegistration, PinnedRing, device_addresses
from common.errors import HostRegistrationError

logger = logging.getLogger(__name__)


class HostExperts:
    """Registers all experts of a source with the device, and follows when the source replaces them.

    Args:
        source: every expert of which lies in this process' memory.
    Raises:
        HostRegistrationError: the device cannot be given the memory.
        ValueError: an expert lies on another node.
    """

    def __init__(self, source: ExpertSource, num_layers: int, num_experts: int, device: torch.device) -> None:
        self._source, self._shape = source, (num_layers, num_experts)
        self._lock = threading.Lock()
        self._replacement: Tensor | None = None
        self._registration: HostRegistration | None = None
        self._ring: PinnedRing | None = None
        if device.type == "cuda":
            self._registration = HostRegistration(CudaHostMemory(device))
            self._ring = PinnedRing(source.layout.slab_bytes)
        self._views = source.local_slabs()  # held, and so in place, as long as addresses name them
        self.addresses = self._register()  # [layers, experts] int64 on the host
        source.on_adopted = self._prepare_replacement

    def copy(self, slab: Tensor, target: Tensor) -> None:
        """Copy a slab's elements to a slot's on the current stream, converting where the dtypes differ.

        Args:
            slab: [slab_bytes] uint8 of the source. target: [slab elements] on the device.
        """
        stored = slab.view(self._source.layout.dtype)
        if self._ring is not None and self._registration is not None and not self._registration.covers(slab):
            self._ring.copy(stored, target)
        else:
            target.copy_(stored, non_blocking=True)

    def take_replacement(self) -> Tensor | None:
        """New addresses, once after the source replaced its experts; read the old ones no more, then `drop_replaced`."""
        with self._lock:
            addresses, self._replacement = self._replacement, None
        return addresses

    def drop_replaced(self) -> None:
        """Let go of the memory that no address names any more; the device must have finished reading it."""
        old, self._views = self._views, self._source.local_slabs()
        if self._registration is not None:
            self._registration.release(old.values())

    def close(self) -> None:
        """Twice is fine."""
        if self._registration is not None:
            self._registration.close()

    def _register(self) -> Tensor:
        views = self._source.local_slabs()
        addresses = device_addresses(views, *self._shape)
        if addresses is None:
            raise ValueError("not every expert lies on this node")
        if self._registration is not None:
            self._registration.extend(views.values())
        return addresses

    def _prepare_replacement(self) -> None:
        """On the thread of the source's `adopt`."""
        try:
            addresses = self._register()
        except (HostRegistrationError, ValueError):
            logger.exception(
                "The reloaded experts cannot be given to the device; it goes on with the old ones"
            )
            return
        with self._lock:
            self._replacement = addresses
