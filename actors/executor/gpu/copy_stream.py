"""The copy engine beside the compute: which copy waits for which read, and which read for which copy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class CopyStream:
    """Orders the copies of host-driven passes against the compute that reads slots: a slot is overwritten after its
    layer's last read, and read after its copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._last_read: dict[int, torch.cuda.Event] = {}  # per layer, of this pass
        self._copied: dict[tuple[int, int], torch.cuda.Event] = {}  # (layer, slot) -> its copy is complete

    def begin_pass(self) -> None:
        self._last_read.clear()
        self._copied.clear()
        self.stream.wait_stream(torch.cuda.current_stream())

    def finish(self) -> None:
        torch.cuda.current_stream().wait_stream(self.stream)

    @contextmanager
    def copying(self, layer: int, slot: int) -> Iterator[None]:
        if (read := self._last_read.get(layer)) is not None:
            self.stream.wait_event(read)
        with torch.cuda.stream(self.stream):
            yield
            self._copied[layer, slot] = torch.cuda.Event()
            self._copied[layer, slot].record()

    def wait_for(self, layer: int, slots: Sequence[int]) -> None:
        for slot in slots:
            if (copied := self._copied.pop((layer, slot), None)) is not None:
                torch.cuda.current_stream().wait_event(copied)

    def mark_read(self, layer: int) -> None:
        self._last_read[layer] = torch.cuda.Event()
        self._last_read[layer].record()
