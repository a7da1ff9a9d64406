"""The experts that a recorded trace used most, which keep their slots: the resident set of a task.

Few experts matter for one task (task-specific expert pruning, arXiv 2206.00277). Here the others stay available: what the
set lacks is paged through the slots that are left, so no token changes.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from actors.executor.pager import RESIDENT_SET, Pager
from actors.expert_store.loads import ExpertLoads
from common.checkpoint import Checkpoint
from common.config import ServingConfig
from common.errors import ConfigError

SETTING = "resident_set"
_AUTO_SHARE = 4  # a quarter of the slots is pinned
PinnedExperts = Sequence[Collection[int]]  # of each layer


def recorded_counts(config: ServingConfig) -> NDArray[np.int64] | None:
    """[layers, experts] activations in the trace; None without `resident_set`.

    Raises:
        ConfigError: the file is unusable or of another model.
    """
    if config.resident_set is None:
        return None
    checkpoint = Checkpoint.open(config.model)
    counts: NDArray[np.int64] = ExpertLoads.load_for(checkpoint, config.resident_set, SETTING).sum(axis=0)
    return counts


def count_pinned(config: ServingConfig, num_slots: int, num_experts: int, top_k: int) -> int:
    """Experts per layer to pin; the slots of one token are left to page through.

    Raises:
        ConfigError: `pinned_experts` is more than that, or comes without `resident_set`.
    """
    asked, most = config.pinned_experts, num_slots - top_k
    if config.resident_set is None:
        if asked:
            raise ConfigError("pinned_experts", asked, "set resident_set, the file that says which experts")
        return 0
    if asked is not None and asked > most and num_slots < num_experts:
        allowed = f"of {num_slots} slots per layer {top_k} are for what one token needs; give at most {most}"
        raise ConfigError("pinned_experts", asked, allowed)
    if num_slots == num_experts:
        return 0  # nothing ever leaves
    return min(most, num_slots // _AUTO_SHARE) if asked is None else asked


def most_used(counts: NDArray[np.int64], most: int) -> list[list[int]]:
    """Of each layer at most so many experts that were used, the most used first. Args: counts: [layers, experts]."""
    order = np.argsort(-counts, axis=1, kind="stable")[:, :most]
    return [[int(e) for e in experts if row[e]] for experts, row in zip(order, counts, strict=True)]


def load_pinned(pager: Pager, pinned: PinnedExperts) -> None:
    """Give them their slots; no pass may run.

    Raises:
        ExpertsUnavailableError: one could not be fetched.
    """
    with pager.host_pass():
        for layer, expert_ids in enumerate(pinned):
            for expert_id in expert_ids:
                pager.prefetch(layer, expert_id, keep=expert_ids, by=RESIDENT_SET)
