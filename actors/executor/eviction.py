"""Which resident expert of a layer makes room. Policies order; the pager decides who may be evicted at all."""

from collections.abc import Callable, Iterable
from typing import Protocol

HALF_LIFE_PASSES = 24  # of a use under lfu; between 16 and 32 the traces of trained models hardly differ
_RESCALE_AFTER_HALF_LIVES = 64


class EvictionPolicy(Protocol):
    """The order in which one layer's resident experts leave. Not thread safe; the pager holds its lock."""

    def loaded(self, expert_id: int) -> None:
        """The expert was given a slot."""

    def used(self, expert_ids: Iterable[int]) -> None:
        """A pass read these experts; some may have left since."""

    def evicted(self, expert_id: int) -> None:
        """The expert lost its slot."""

    def requests_ended(self, share: float) -> None:
        """This share of the running requests has ended, above 0; with 1 none is left."""

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
            if expert_id in self._order:
                del self._order[expert_id]
                self._order[expert_id] = None

    def evicted(self, expert_id: int) -> None:
        del self._order[expert_id]

    def requests_ended(self, share: float) -> None:
        pass

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

    def requests_ended(self, share: float) -> None:
        pass

    def victims(self) -> Iterable[int]:
        return tuple(self._order)


class InactiveLifoPolicy:
    """Inactive experts first, of them the last loaded first: *expert buffering* (Huang et al., arXiv 2303.06182).

    Active are the experts of the batch that asks for the slot; the pager never evicts those, which leaves their order
    for here. Unlike in the paper, where nothing is copied ahead, what was loaded since the last pass leaves after all
    others, or a prefetched expert would leave before its layer runs.
    """

    def __init__(self) -> None:
        self._order: dict[int, None] = {}  # as loaded
        self._fresh: set[int] = set()

    def loaded(self, expert_id: int) -> None:
        self._order[expert_id] = None
        self._fresh.add(expert_id)

    def used(self, expert_ids: Iterable[int]) -> None:
        self._fresh.clear()

    def evicted(self, expert_id: int) -> None:
        del self._order[expert_id]
        self._fresh.discard(expert_id)

    def requests_ended(self, share: float) -> None:
        pass

    def victims(self) -> Iterable[int]:
        newest_first = list(reversed(self._order))
        return sorted(newest_first, key=lambda e: e in self._fresh)


class ActivationPolicy:
    """Least activated by the running requests first (MoE-Infinity, arXiv 2401.14361, on its expert cache).

    The paper evicts the lowest (p + eps) (1 - layer / layers), p the expert's share of its layer's activations in the
    matrix of the request. Its layers share one cache. Here each has slots of its own, so that the second factor, like
    eps and the sum that makes counts shares, is the same for all who compete: the counts alone decide. What differs:

    - A pass counts once, however many tokens chose the expert: in decoding one request the same, in a prompt less.
    - Requests join and leave at any time. When one of n ends, every count loses the nth part, not what was that
      request's own; with one at a time, the matrix begins anew with each request, as in the paper.
    - Of equally active experts the first loaded leaves first; what was loaded since the last pass, after all others.
    """

    def __init__(self) -> None:
        self._counts: dict[int, float] = {}  # passes that used the expert
        self._order: dict[int, None] = {}  # as loaded
        self._fresh: set[int] = set()

    def loaded(self, expert_id: int) -> None:
        self._order[expert_id] = None
        self._fresh.add(expert_id)

    def used(self, expert_ids: Iterable[int]) -> None:
        self._fresh.clear()
        for expert_id in expert_ids:
            self._counts[expert_id] = self._counts.get(expert_id, 0.0) + 1.0

    def evicted(self, expert_id: int) -> None:
        del self._order[expert_id]
        self._fresh.discard(expert_id)

    def requests_ended(self, share: float) -> None:
        self._counts = {e: count * (1 - share) for e, count in self._counts.items()}

    def victims(self) -> Iterable[int]:
        return sorted(self._order, key=lambda e: (e in self._fresh, self._counts.get(e, 0.0)))


class DecayedLfuPolicy:
    """Least frequently used first, where a use counts half as much after every HALF_LIFE_PASSES passes.

    Uses are remembered while an expert is not resident. What was loaded since the last pass leaves after all others, or
    a prefetched expert would leave before its layer runs.
    """

    def __init__(self) -> None:
        self._heat: dict[
            int, float
        ] = {}  # in units that double every half-life, so that nothing has to decay
        self._resident: set[int] = set()
        self._fresh: set[int] = set()
        self._passes = 0

    def loaded(self, expert_id: int) -> None:
        self._resident.add(expert_id)
        self._fresh.add(expert_id)

    def used(self, expert_ids: Iterable[int]) -> None:
        self._fresh.clear()
        self._passes += 1
        if self._passes > _RESCALE_AFTER_HALF_LIVES * HALF_LIFE_PASSES:
            self._rescale()
        use = 2 ** (self._passes / HALF_LIFE_PASSES)
        for expert_id in expert_ids:
            self._heat[expert_id] = self._heat.get(expert_id, 0.0) + use

    def evicted(self, expert_id: int) -> None:
        self._resident.discard(expert_id)
        self._fresh.discard(expert_id)

    def requests_ended(self, share: float) -> None:
        pass

    def victims(self) -> Iterable[int]:
        return sorted(self._resident, key=lambda e: (e in self._fresh, self._heat.get(e, 0.0), e))

    def _rescale(self) -> None:
        self._heat = {e: heat / 2**_RESCALE_AFTER_HALF_LIVES for e, heat in self._heat.items()}
        self._passes -= _RESCALE_AFTER_HALF_LIVES * HALF_LIFE_PASSES


EVICTION_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LruPolicy,
    "fifo": FifoPolicy,
    "lfu": DecayedLfuPolicy,
    "inactive-lifo": InactiveLifoPolicy,
    "activation": ActivationPolicy,
}
