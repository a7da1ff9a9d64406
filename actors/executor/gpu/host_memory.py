"""Host memory as the GPU reads it: experts registered where they lie, or staged through a few pinned buffers.

Chooses nothing: which experts are read, and which of the two ways, is the pager's affair.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from actors.executor.gpu.page_ranges import (
    PAGE_BYTES,
    contains,
    outside,
    overlaps,
    span,
    split,
    touched_pages,
)
from common.errors import HostRegistrationError

CHUNK_BYTES = (
    16 << 30
)  # one registration: those above 96 GiB may fail, and a log line per chunk shows progress
BRIDGED_BYTES = 1 << 20  # unused memory between two views that is registered with them: fewer registrations
ADDRESS_ALIGNMENT_BYTES = 16  # of every expert; the copy kernel reads that much at a time
LOG_EVERY_S = 5.0

SUCCESS = 0
ALREADY_REGISTERED = 712  # cudaErrorHostMemoryAlreadyRegistered: a part of the range is
_PORTABLE, _MAPPED = 1, 2  # cudaHostRegisterPortable, cudaHostRegisterMapped


class HostMemoryCalls(Protocol):
    """What is needed of the CUDA runtime. Calls return its error number, 0 for success."""

    def register(self, address: int, num_bytes: int) -> int: ...

    def unregister(self, address: int) -> int:
        """Args: address: the start of a registered range, which is unregistered as a whole."""

    def describe(self, error: int) -> str: ...


class CudaHostMemory:
    """The CUDA runtime, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, num_bytes: int) -> int:
        with torch.cuda.device(self._device):  # a thread of its own would otherwise wake the first GPU
            return self._number(torch.cuda.cudart().cudaHostRegister(address, num_bytes, _PORTABLE | _MAPPED))

    def unregister(self, address: int) -> int:
        with torch.cuda.device(self._device):
            return self._number(torch.cuda.cudart().cudaHostUnregister(address))

    def describe(self, error: int) -> str:
        return str(torch.cuda.CudaError(error))

    def _number(self, result: Any) -> int:
        """CUDA reports a failure again at the thread's next kernel launch: let it be this one."""
        number = int(result)
        if number != SUCCESS:
            with suppress(RuntimeError):
                torch.ones(1, device=self._device)
        return number


class HostRegistration:
    """Page-locks the memory of CPU tensors and maps it for the device, which then reads it in place.

    Registered views are held until they are released: were their memory unmapped before, the device would go
    on reading the old pages. One thread at a time changes a registration; any may ask `covers`.

    Args:
        calls: `CudaHostMemory` of the device.
        chunk_bytes: of one registration at most.
    """

    def __init__(
        self,
        calls: HostMemoryCalls,
        chunk_bytes: int = CHUNK_BYTES,
        logger: logging.Logger | None = None,
    ) -> None:
        self._calls, self._chunk_bytes = calls, chunk_bytes
        self._logger = logger or logging.getLogger(__name__)
        self._registered: tuple[range, ...] = ()  # sorted, disjoint; replaced, never changed
        self._held: dict[range, list[Tensor]] = {}  # by span

    @property
    def num_bytes(self) -> int:
        """Registered now, whole pages and bridged gaps included."""
        return sum(map(len, self._registered))

    def covers(self, view: Tensor) -> bool:
        """Whether the copy engine may read a view in place.

        CUDA copies from memory that one registration holds or that none touches. It may fail for what is
        between: a view that shares a page with a registered one, or lies across two. `PinnedRing` copies
        those. Kernels have no such limit: they read every view that was given to `extend`.
        """
        return contains(self._registered, span(view))

    def extend(self, views: Iterable[Tensor]) -> None:
        """Register what contiguous views need beyond what is registered; counts one more use of each.

        Takes 0.04 s per GB, ten times that where memory
        was never written (H200 host). Not while a CUDA graph is captured.

        Raises:
            HostRegistrationError: nothing has changed.
        """
        added = [(span(view), view) for view in views]
        spans = [bytes_ for bytes_, _ in added]
        try:
            self._register_pages(spans, BRIDGED_BYTES)
        except HostRegistrationError:  # perhaps nothing is mapped in a gap
            self._register_pages(spans, gap_bytes=0)
        for bytes_, view in added:
            self._held.setdefault(bytes_, []).append(view)

    def release(self, views: Iterable[Tensor]) -> None:
        """Unregister memory that only these views needed. The device must have finished reading them."""
        released = list(views)  # alive until their memory is unregistered
        for bytes_ in map(span, released):
            if uses := self._held.get(bytes_):
                uses.pop()
                if not uses:
                    del self._held[bytes_]
        self._unregister_unused()

    def close(self) -> None:
        """Unregister everything; the device must have finished reading. Twice is fine."""
        held, self._held = self._held, {}
        self._unregister_unused()
        held.clear()  # only now may the memory go

    def __del__(self) -> None:
        self.close()

    def _register_pages(self, spans: Iterable[range], gap_bytes: int) -> None:
        missing = outside(touched_pages(spans, gap_bytes), self._registered)
        total, done = sum(map(len, missing)), list[range]()
        started = logged = time.perf_counter()
        for pages in split(missing, self._chunk_bytes):
            if error := self._register(pages, done):
                self._unregister(done)
                raise HostRegistrationError(total, self._calls.describe(error))
            now = time.perf_counter()
            if now - logged > LOG_EVERY_S or pages.stop == missing[-1].stop:
                self._log_progress(done, total, now - started)
                logged = now
        self._registered = tuple(sorted([*self._registered, *done], key=lambda pages: pages.start))

    def _register(self, pages: range, done: list[range]) -> int:
        """Register page by page where somebody else has registered a part: that part is readable already.

        Returns:
            The CUDA error, or 0; `done` has what was registered.
        """
        error = self._calls.register(pages.start, len(pages))
        if error == SUCCESS:
            done.append(pages)
        if error != ALREADY_REGISTERED:
            return error
        if len(pages) == PAGE_BYTES:
            return SUCCESS
        middle = pages.start + len(pages) // PAGE_BYTES // 2 * PAGE_BYTES
        return self._register(range(pages.start, middle), done) or self._register(
            range(middle, pages.stop), done
        )

    def _unregister_unused(self) -> None:
        needed, before = touched_pages(self._held, gap_bytes=0), self._registered
        self._registered = tuple(pages for pages in before if overlaps(needed, pages))
        self._unregister(pages for pages in before if not overlaps(needed, pages))

    def _unregister(self, registered: Iterable[range]) -> None:
        for pages in registered:
            if error := self._calls.unregister(pages.start):  # nobody could do more about it
                self._logger.warning(
                    "%.2f GB of host memory stay locked: %s", len(pages) / 1e9, self._calls.describe(error)
                )

    def _log_progress(self, done: Iterable[range], total: int, seconds: float) -> None:
        self._logger.info(
            "registered %.2f of %.2f GB of host memory for the GPU in %.1f s",
            sum(map(len, done)) / 1e9, total / 1e9, seconds,
        )  # fmt: skip


def device_addresses(
    views: Mapping[tuple[int, int], Tensor], num_layers: int, num_experts: int
) -> Tensor | None:
    """Where the device reads each registered expert.

    With unified addressing (64-bit Linux) the device reads registered memory under the host's own addresses.

    Args:
        views: by (layer, expert id), registered, and alive as long as the addresses are in use.
    Returns:
        [layers, experts] int64 on the host; None if an expert has no view, because another node holds it.
    """
    if any((layer, expert) not in views for layer in range(num_layers) for expert in range(num_experts)):
        return None
    addresses = torch.empty(num_layers, num_experts, dtype=torch.int64)
    for layer in range(num_layers):
        for expert in range(num_experts):
            address = views[layer, expert].data_ptr()
            assert address % ADDRESS_ALIGNMENT_BYTES == 0
            addresses[layer, expert] = address
    return addresses


class Event(Protocol):
    """The part of `torch.cuda.Event` that the ring uses."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class PinnedRing:
    """A few page-locked buffers that slabs pass through on their way to the device. One thread uses it.

    For memory that is not registered: the processor copies each slab once more, at the speed of a memcpy.

    Args:
        slab_bytes: of the largest slab.
        pin_memory, new_event: for tests without a GPU.
    """

    def __init__(
        self,
        slab_bytes: int,
        num_buffers: int = 4,
        pin_memory: bool = True,
        new_event: Callable[[], Event] = torch.cuda.Event,
    ) -> None:
        buffers = torch.empty(num_buffers, slab_bytes, dtype=torch.uint8, pin_memory=pin_memory)
        self._turns = deque((buffer, new_event()) for buffer in buffers.unbind())

    def copy(self, slab: Tensor, target: Tensor) -> None:
        """Copy a slab to the device behind what the current stream does; waits only for a buffer.

        Args:
            slab: [elements] on the CPU, contiguous; free to change or go when this returns.
            target: [elements] on the device.
        """
        buffer, event = self._turns[0]
        self._turns.rotate(-1)
        event.synchronize()  # the device has read what the buffer held before
        staged = buffer[: slab.nbytes].view(slab.dtype)
        staged.copy_(slab)
        target.copy_(staged, non_blocking=True)
        event.record()
