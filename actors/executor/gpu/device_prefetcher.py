"""Has the device choose what to copy of the experts that hash tables name for the next layer of a prompt."""

from collections.abc import Sequence

from actors.executor.gpu.pager import DevicePager
from actors.executor.passes import PassClock
from actors.executor.prefetcher import PrefetchPlan, QueueingPrefetcher


class DevicePrefetcher(QueueingPrefetcher):
    """For passes that are queued without the host knowing what is resident; they count the copies themselves."""

    def __init__(self, pager: DevicePager, clock: PassClock) -> None:
        super().__init__(pager, clock)
        self._device_pager = pager

    def _prefetch(self, layer: int, plans: Sequence[PrefetchPlan]) -> None:
        named = [expert_id for plan in plans for expert_id in plan.experts_by_layer[layer]]
        self._device_pager.prefetch_used(layer, named)
