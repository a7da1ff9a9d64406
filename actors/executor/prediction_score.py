"""Holds a hash table against what the routers chose for the same prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.hash_table import HashTable


@dataclass(frozen=True)
class PredictionScore:
    """`num_named` of `num_chosen` (token, choice) pairs per layer were predicted: recall of the true top-k."""

    num_named: NDArray[np.int64]  # [layers]
    num_chosen: NDArray[np.int64]  # [layers]
    # Distinct (layer, expert) pairs of each pass that the table names for that pass's tokens.
    needed_pairs_named: int


def score_prediction(choices: Sequence[Sequence[NDArray[np.int64]]], table: HashTable) -> PredictionScore:
    """Args: choices: for each prompt pass in order, for each layer, [tokens, top_k] expert ids."""
    num_named, num_chosen = np.zeros((2, table.num_layers), np.int64)
    pairs, start = 0, 0
    for layers in choices:
        stop = start + len(layers[0])
        for layer, chosen in enumerate(layers):
            predicted = table.expert_ids[layer, start:stop]  # [tokens, k]
            num_named[layer] += int((chosen[:, :, None] == predicted[:, None, :]).any(axis=2).sum())
            num_chosen[layer] += chosen.size
            pairs += len(np.intersect1d(chosen, predicted))
        start = stop
    return PredictionScore(num_named, num_chosen, pairs)
