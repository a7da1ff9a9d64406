"""What it takes to page experts: the interface of `HostPager` and `DevicePager`, and what both count."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.expert_source import ExpertSource

ABSENT = -1  # instead of a slot

# Who asks for copies ahead of need, beside the decoding predictors, which go by their names in the configuration.
HASH_FUNCTION, WARM_UP, RESIDENT_SET = "hash-function", "warm-up", "resident-set"
NEXT_GATE = "next-gate"  # a decoding predictor, and what a GPU does by itself


@dataclass
class LayerCounters:
    """What happened in one layer since start. Experts are counted once per pass, however many tokens chose them."""

    hits: int = 0  # needed and resident when the layer began
    misses: int = 0  # needed and not resident when the layer began
    prefetched: int = 0  # copied ahead of need
    prefetched_used: int = 0  # of those, needed before they were evicted
    prefetched_wasted: int = 0  # of those, evicted before they were needed
    evictions: int = 0
    moved_bytes: int = 0  # host to slot, on demand and ahead of need


@dataclass
class PrefetchCounts:
    """What became of the copies that one predictor asked for, in all layers since start. As in `LayerCounters`."""

    copied: int = 0
    used: int = 0
    wasted: int = 0

    def __add__(self, other: "PrefetchCounts") -> "PrefetchCounts":
        return PrefetchCounts(self.copied + other.copied, self.used + other.used, self.wasted + other.wasted)


@dataclass(frozen=True)
class Activity:
    """What can be seen of every expert: [layers, experts] each, as they were at one moment."""

    slot_of: NDArray[np.int64]  # or ABSENT
    unused: NDArray[np.bool_]  # prefetched, and not needed since
    uses: NDArray[np.int64]  # grows when the expert is needed; by one, where misses are counted
    misses: NDArray[np.int64] | None  # grows by one when it was missed; None where nobody counts


class Pager(Protocol):
    """Page tables and slots of all MoE layers, as passes that the host drives see them.

    The rule of every implementation: a slot that the running step reads is never a victim, and a slot is never read
    before its copy is complete.
    """

    source: ExpertSource
    num_slots: int  # per layer
    num_experts: int  # per layer

    @property
    def wave_size(self) -> int:
        """Experts to read at once when a layer needs more than fit."""

    def fits(self, layer: int, expert_ids: NDArray[np.int64]) -> bool:
        """Whether these distinct experts of a layer can be in slots at once: pinned ones keep theirs."""

    def close(self) -> None:
        """Let go of the experts, when no pass will run any more. Twice is fine."""

    def host_pass(self) -> AbstractContextManager[None]:
        """Every call below but `counters` belongs into one; a pass of the model runs in it."""

    def interrupted(self) -> AbstractContextManager[None]:
        """Within `host_pass`, between two layers: another pass may run in the body."""

    def requests_ended(self, share: float) -> None:
        """This share of the running requests has ended, above 0; with 1 none is left. Needs no `host_pass`."""

    def resident(self, layer: int) -> NDArray[np.bool_]:
        """[experts] bool: which experts of a layer could be read now."""

    def loading(self, layer: int) -> NDArray[np.bool_]:
        """[experts] bool: which experts of a layer are on their way and not in `resident` yet."""

    def counters(self, layer: int) -> LayerCounters:
        """May lag a moment behind, and may be called from any thread."""

    def prefetches(self) -> dict[str, PrefetchCounts]:
        """By who asked for them. May lag a moment behind, and may be called from any thread."""

    def activity(self) -> Activity:
        """May lag a moment behind, and may be called from any thread.

        A pager on a device tells of uses what its order of eviction remembers: with FIFO only those that were copied,
        with a slot for every expert none. A prefetch that came and went unused between two calls looks like a use.
        """

    def reading(self, layer: int, expert_ids: Sequence[int]) -> AbstractContextManager[Tensor]:
        """Hold these experts in slots while the body reads them, or queues its reads; misses are fetched in place.

        Args:
            expert_ids: distinct; they fit.
        Yields:
            The layer's page table row: [experts] integers on the host, slot or ABSENT.
        Raises:
            ExpertsUnavailableError: an expert could not be fetched; nothing stays held.
        """

    def load_ahead(self, layer: int, expert_ids: Sequence[int]) -> None:
        """Within `reading`: start copying what the layer reads next, where copies run beside the compute."""

    def prefetch(self, layer: int, expert_id: int, keep: Collection[int], by: str = HASH_FUNCTION) -> bool:
        """Copy an expert ahead of need, if it is absent and a slot can be had without evicting one of `keep`.

        Args:
            by: who asks.
        Returns:
            Whether it was, or will be, copied.
        """
