"""What executors hold, so that a new one begins with the experts that the others found useful. Copies by the pager."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.executor.pager import ABSENT, WARM_UP, Pager


@dataclass(frozen=True)
class Residents:
    """What one executor holds; travels to a new one."""

    model_fingerprint: str
    by_layer: tuple[tuple[int, ...], ...]  # expert ids, most used first


def residents_of(pager: Pager) -> Residents:
    """May be called from any thread."""
    activity = pager.activity()
    ordered = np.argsort(-activity.uses, axis=1, kind="stable")
    by_layer = (
        tuple(order[slots[order] != ABSENT].tolist())
        for order, slots in zip(ordered, activity.slot_of, strict=True)
    )
    return Residents(pager.source.model_fingerprint, tuple(by_layer))


def warm_up(pager: Pager, peers: Sequence[Residents]) -> int:
    """Fill the slots with what the peers hold; no pass may run.

    Returns:
        How many experts were copied.
    Raises:
        ExpertsUnavailableError: one could not be fetched; those before it are there.
    """
    num_copied = 0
    with pager.host_pass():
        for layer, expert_ids in enumerate(most_useful(peers, pager.num_slots)):
            for expert_id in reversed(expert_ids):  # where age decides, the most useful leaves last
                num_copied += pager.prefetch(layer, expert_id, keep=expert_ids, by=WARM_UP)
    return num_copied


def most_useful(peers: Sequence[Residents], num_slots: int) -> list[list[int]]:
    """By layer, at most `num_slots` experts: those that most peers hold first, of equally many what they use most."""
    return [
        _most_useful(layers)[:num_slots] for layers in zip(*(peer.by_layer for peer in peers), strict=True)
    ]


def _most_useful(residents: Sequence[Sequence[int]]) -> list[int]:
    holders: Counter[int] = Counter()
    ranks: Counter[int] = Counter()
    for expert_ids in residents:
        for rank, expert_id in enumerate(expert_ids):
            holders[expert_id] += 1
            ranks[expert_id] += rank
    return sorted(holders, key=lambda expert_id: (-holders[expert_id], ranks[expert_id], expert_id))
