"""Has the device choose what to copy of the experts that hash tables name for the next layer of a prompt, or for the pass
after the running one.
"""

from collections.abc import Sequence

from actors.executor.gpu.pager import DevicePager
from actors.executor.passes import PassClock
from actors.executor.prefetcher import PrefetchPlan, QueueingPrefetcher


class DevicePrefetcher(QueueingPrefetcher):
    """For passes that are queued without the host knowing what is resident; they count the copies themselves."""

    def __init__(self, pager: DevicePager, clock: PassClock, for_next_pass: bool = False) -> None:
        super().__init__(pager, clock, for_next_pass)
        self._device_pager = pager
        self._ahead: dict[int, list[PrefetchPlan]] = {}  # per layer, whose experts there the next pass finds

    def _prefetch(self, layer: int, plans: Sequence[PrefetchPlan]) -> None:
        ahead = self._ahead.pop(layer, ())
        self._device_pager.prefetch_used(layer, _named(layer, [plan for plan in plans if plan not in ahead]))

    def _prefetch_ahead(self, layer: int, following: Sequence[PrefetchPlan]) -> None:
        self._ahead[layer] = list(following)
        self._device_pager.prefetch_ahead(layer, _named(layer, following))


def _named(layer: int, plans: Sequence[PrefetchPlan]) -> list[int]:
    return [expert_id for plan in plans for expert_id in plan.experts_by_layer[layer]]
