"""What the device knows of its slots: page tables, stamps, counters, and the order in which experts leave. No behaviour."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.executor.pager import ABSENT

# Columns of the counters; `paging_kernels` counts on this order.
COUNTERS = (
    "hits",
    "misses",
    "fetched",
    "evictions",
    "prefetched",
    "prefetched_used",
    "prefetched_wasted",
    "spare",
)
HITS, MISSES, FETCHED, EVICTIONS, PREFETCHED, USED, WASTED, _ = range(len(COUNTERS))


@dataclass(frozen=True)
class EvictionOrder:
    """How an eviction policy values residents, in the terms of `paging_kernels`."""

    stamp_use: bool  # a use counts, not only the copy
    by_heat: bool  # value frequent use, not the last one


# By the names of `eviction.EVICTION_POLICIES`.
EVICTION_ORDERS = {
    "lru": EvictionOrder(stamp_use=True, by_heat=False),
    "fifo": EvictionOrder(stamp_use=False, by_heat=False),
    "lfu": EvictionOrder(stamp_use=True, by_heat=True),
}


class PageState:
    """Page tables, stamps and counters of all layers in one block of memory, so that one copy moves them."""

    def __init__(self, num_layers: int, num_experts: int, num_slots: int, **placement: Any) -> None:
        fields = {
            "step": (torch.int64, (1,)),
            "counters": (torch.int64, (num_layers, len(COUNTERS))),
            "stamps": (torch.int64, (num_layers, num_experts)),  # step of the last use, or of the copy
            "heat": (
                torch.float32,
                (num_layers, num_experts),
            ),  # uses, halved every HALF_LIFE_PASSES; as of the stamp
            "slot_of": (torch.int32, (num_layers, num_experts)),  # or ABSENT
            "expert_in": (torch.int32, (num_layers, num_slots)),  # or ABSENT
            "unused": (torch.int8, (num_layers, num_experts)),  # prefetched, and not needed since
        }
        sizes = [int(np.prod(shape)) * dtype.itemsize for dtype, shape in fields.values()]
        self.memory = torch.zeros(sum(sizes), dtype=torch.uint8, **placement)
        parts = self.memory.split(sizes)
        views = (
            part.view(dtype).view(shape) for part, (dtype, shape) in zip(parts, fields.values(), strict=True)
        )
        self.step, self.counters, self.stamps, self.heat, self.slot_of, self.expert_in, self.unused = views
        self.slot_of.fill_(ABSENT)
        self.expert_in.fill_(ABSENT)
