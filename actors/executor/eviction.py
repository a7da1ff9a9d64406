"""Which resident expert of a layer makes room. Policies order; the pager decides who may be evicted at all."""

from collections.abc import Callable, Iterable
from typing import Protocol


class EvictionPolicy(Protocol):
    """The order in which one layer's resident experts leave. Not thread safe; the pager holds its lock."""

    def loaded(self, expert_id: int) -> None:
        """The expert was given a slot."""

    def used(self, expert_ids: Iterable[int]) -> None:
        """A pass read these resident experts."""

    def evicted(self, expert_id: int) -> None:
        """The expert lost its slot."""

    def victims(self) -> Iterable[int]:
        """Resident experts, the one to evict first first."""


class LruPolicy:
    """Least recently used first. Loading counts as use, or a prefetched expert would leave before its layer runs."""

    def __init__(self) -> None:
        self._order: dict[int, None] = {}  # insertion order is the order of last use

    def loaded(self, expert_id: int) -> None:
        self._order[expert_id] = None

    def used(self, expert_ids: Iterable[int]) -> None:
        for expert_id in expert_ids:
            self._order.pop(expert_id)
            self._order[expert_id] = None

    def evicted(self, expert_id: int) -> None:
        del self._order[expert_id]

    def victims(self) -> Iterable[int]:
        return tuple(self._order)


class FifoPolicy:
    """First loaded first, as SiDA-MoE evicts under a memory budget (arXiv 2310.18859, section 3.3)."""

    def __init__(self) -> None:
        self._order: dict[int, None] = {}

    def loaded(self, expert_id: int) -> None:
        self._order[expert_id] = None

    def used(self, expert_ids: Iterable[int]) -> None:
        pass

    def evicted(self, expert_id: int) -> None:
        del self._order[expert_id]

    def victims(self) -> Iterable[int]:
        return tuple(self._order)


EVICTION_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LruPolicy, "fifo": FifoPolicy}
