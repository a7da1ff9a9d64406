"""What the device knows of its slots: page tables, stamps, counters, and the order in which experts leave. No behaviour."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.executor.pager import ABSENT, HASH_FUNCTION, NEXT_GATE, RESIDENT_SET, WARM_UP

ASKERS = (HASH_FUNCTION, NEXT_GATE, WARM_UP, RESIDENT_SET)  # for copies ahead of need
# Columns of the counters, of which each asker has the last three; `paging_kernels` counts on this order.
HITS, MISSES, FETCHED, EVICTIONS = range(4)
PREFETCHED, USED, WASTED = (range(4 + kind, 4 + 3 * len(ASKERS), 3) for kind in range(3))
NUM_COUNTERS = 4 + 3 * len(ASKERS)


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
            "counters": (torch.int64, (num_layers, NUM_COUNTERS)),
            "stamps": (torch.int64, (num_layers, num_experts)),  # step of the last use, or of the copy
            "heat": (
                torch.float32,
                (num_layers, num_experts),
            ),  # uses, halved every HALF_LIFE_PASSES; as of the stamp
            "slot_of": (torch.int32, (num_layers, num_experts)),  # or ABSENT
            "expert_in": (torch.int32, (num_layers, num_slots)),  # or ABSENT
            # Prefetched, and not needed since: 1 + the place among ASKERS of who asked for it.
            "unused": (torch.int8, (num_layers, num_experts)),
            "pinned": (torch.int8, (num_layers, num_experts)),  # no victims
        }
        sizes = [int(np.prod(shape)) * dtype.itemsize for dtype, shape in fields.values()]
        self.memory = torch.zeros(sum(sizes), dtype=torch.uint8, **placement)
        parts = self.memory.split(sizes)
        views = (
            part.view(dtype).view(shape) for part, (dtype, shape) in zip(parts, fields.values(), strict=True)
        )
        self.step, self.counters, self.stamps, self.heat = (next(views) for _ in range(4))
        self.slot_of, self.expert_in, self.unused, self.pinned = views
        self.slot_of.fill_(ABSENT)
        self.expert_in.fill_(ABSENT)
