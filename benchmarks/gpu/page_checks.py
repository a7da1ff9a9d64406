"""What must hold of an idle pager: its tables agree with each other, and slots hold the experts that they name."""

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from actors.executor.host_pager import HostPager
from actors.executor.pager import ABSENT, Pager

SLOTS_COMPARED = 4  # per layer


def broken_page_tables(pager: Pager) -> Iterator[str]:
    """Where a page table is not one-to-one, or not the inverse of its own inverse."""
    for layer, slot_of in enumerate(_slot_of(pager).tolist()):
        taken = {slot: expert for expert, slot in enumerate(slot_of) if slot != ABSENT}
        if len(taken) != sum(slot != ABSENT for slot in slot_of):
            yield f"layer {layer}: two experts in one slot: {slot_of}"
        if any(not 0 <= slot < pager.num_slots for slot in taken):
            yield f"layer {layer}: slots that do not exist: {slot_of}"
        if (state := getattr(pager, "state", None)) is not None:
            expert_in = state.expert_in[layer].tolist()
            if {slot: expert for slot, expert in enumerate(expert_in) if expert != ABSENT} != taken:
                yield f"layer {layer}: slot_of {slot_of} against expert_in {expert_in}"


def wrong_slots(pager: Pager, draw: random.Random) -> Iterator[str]:
    """Slots, of some drawn ones, that do not hold the expert that the page table names."""
    pools = [state.pool for state in pager._layers] if isinstance(pager, HostPager) else pager._pools  # type: ignore[attr-defined]
    for layer, slot_of in enumerate(_slot_of(pager).tolist()):
        resident = [expert for expert, slot in enumerate(slot_of) if slot != ABSENT]
        for expert in draw.sample(resident, min(SLOTS_COMPARED, len(resident))):
            held = pools[layer].elements[slot_of[expert]].cpu()
            stored = pager.source.fetch(layer, expert).view(pager.source.layout.dtype).to(held.dtype)
            if not torch.equal(held, stored):
                yield f"layer {layer}: slot {slot_of[expert]} does not hold expert {expert}"


def _slot_of(pager: Pager) -> Tensor:
    """[layers, experts] on the host: a slot or ABSENT."""
    if isinstance(pager, HostPager):
        return pager.page_table
    slot_of: Tensor = pager.state.slot_of.cpu()  # type: ignore[attr-defined]
    return slot_of
