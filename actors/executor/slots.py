"""The slots of one MoE layer: device memory for a fixed number of experts. Knows nothing of who is resident."""

import torch
from torch import Tensor

from common.expert_layout import ExpertLayout


class SlotPool:
    """`num_slots` slabs on the device, and the strided views of them that grouped GEMM reads."""

    def __init__(self, layout: ExpertLayout, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        slabs = torch.zeros(num_slots, layout.slab_bytes, dtype=torch.uint8, device=device)
        self.views = layout.views(slabs)  # name -> [num_slots, *shape]
        self.elements = slabs.view(layout.dtype)  # [num_slots, slab elements], the same memory
        self._slots = self.elements.unbind()

    def write(self, slot: int, slab: Tensor, stored: ExpertLayout) -> None:
        """Copy a host slab ([stored.slab_bytes] uint8) into a slot, converting where the dtypes differ.

        Args:
            stored: has its elements where the slots' layout has them (`ExpertLayout.with_dtype`).
        """
        self._slots[slot].copy_(slab.view(stored.dtype), non_blocking=True)

    def poison(self, slot: int) -> None:
        """Fill a free slot with NaN, so that a test sees any read of it."""
        for view in self.views.values():
            view[slot].fill_(float("nan"))
