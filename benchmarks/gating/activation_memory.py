"""How many bytes a call holds at its peak beyond what was there before: exact on both devices, but for one thing.

On CUDA the allocator counts. On a CPU every storage that an operator returns is followed to its end; buffers that live
and die inside one operator are not seen there.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Of one call, its result included, what existed before excluded."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        peak: int = torch.cuda.max_memory_allocated(device) - before
        return peak
    tracker = StorageTracker()
    with tracker:
        call()
    return tracker.peak_bytes


class StorageTracker(TorchDispatchMode):
    """Counts bytes of storages that operators make while it is active; views and in-place results make none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._live: set[int] = set()  # addresses of storages that were made here

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _address(leaf) not in given:
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, num_bytes = storage._cdata, storage.nbytes()
        if address in self._live or num_bytes == 0:
            return
        self._live.add(address)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, address, num_bytes)

    def _forget(self, address: int, num_bytes: int) -> None:
        self._live.discard(address)
        self.live_bytes -= num_bytes


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
