"""The sentences that are timed: real ones of the three tasks' lengths, and what each needs of every layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.passes import Routing
from benchmarks.sida.data.tokens import NO_TOKEN
from benchmarks.sida.speed.host_model import HostModel
from benchmarks.sida.speed.resident import RoutingTable, resident_system
from common.hash_table import HashTable

PAD_ID = 0


@dataclass(frozen=True)
class Sentence:
    request_id: str
    token_ids: tuple[int, ...]
    table: HashTable  # [layers, tokens, 1]: what routes it in every system

    def routing(self, device: torch.device) -> Routing:
        """On the device: nothing of it is copied while a sentence is timed."""
        ids = torch.from_numpy(self.table.expert_ids.astype(np.int64)).to(device)
        return Routing(ids, torch.from_numpy(self.table.weights.astype(np.float32)).to(device))

    def distinct_experts(self) -> NDArray[np.int64]:
        """[layers]"""
        return np.array([len(np.unique(layer)) for layer in self.table.expert_ids])


def draw(
    ids: NDArray[np.integer[Any]], count: int, padded: bool, seed: int
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Distinct rows of [sentences, tokens], their numbers first.

    Padded ones have the length of the longest. Padding counts as text: it takes the same time where it is masked.

    Raises:
        ValueError: there are not so many.
    """
    if len(ids) < count:
        raise ValueError(f"{count} sentences are asked for and {len(ids)} there: fewer --sentences or --runs")
    chosen = np.random.default_rng(seed).permutation(len(ids))[:count].tolist()
    rows = [ids[row][ids[row] != NO_TOKEN].tolist() for row in chosen]
    longest = max(map(len, rows)) if padded else 0
    return chosen, [(*row, *[PAD_ID] * (longest - len(row))) for row in rows]


@torch.inference_mode()
def route_by_routers(host: HostModel, name: str, sentences: Sequence[tuple[int, ...]]) -> list[Sentence]:
    """What the routers of the random model decide. Call it within `host.all_resident()`. Args: name: of these sentences."""
    made = []
    for number, token_ids in enumerate(sentences):
        table = RoutingTable(recorded=[])
        with resident_system(host.model, "grouped", table):
            host.model(input_ids=torch.tensor([token_ids], device=host.device))
        assert table.recorded is not None
        ids, weights = (torch.stack(part).cpu() for part in zip(*table.recorded, strict=True))
        made.append(_sentence(host, f"{name}-{number}", token_ids, ids, weights))
    return made


class Recording:
    """What the encoder of a trained classifier decided for sentences of its task."""

    def __init__(self, path: Path, num_experts: int) -> None:
        with np.load(path) as arrays:
            recorded_experts = int(arrays["num_experts"])
            self._token_ids, self._experts = arrays["token_ids"], arrays["experts"]
        if recorded_experts != num_experts:
            raise ValueError(f"{path} is of a model with {recorded_experts} experts, not {num_experts}")

    def sentences(self, host: HostModel, name: str, count: int, padded: bool, seed: int) -> list[Sentence]:
        """Each layer is routed as the trained layer at about the same depth; padding goes to expert 0."""
        numbers, token_ids = draw(self._token_ids, count, padded, seed)
        depth = [layer * len(self._experts) // host.num_layers for layer in range(host.num_layers)]
        made: list[Sentence] = []
        for number, tokens in zip(numbers, token_ids, strict=True):
            ids = np.zeros((host.num_layers, len(tokens), 1), np.int64)
            length = int((self._token_ids[number] != NO_TOKEN).sum())
            ids[:, :length, 0] = self._experts[depth, number, :length]
            made.append(
                _sentence(host, f"{name}-{number}", tokens, torch.from_numpy(ids), torch.ones(ids.shape))
            )
        return made


def write_recording(path: Path, num_experts: int, token_ids: NDArray[Any], experts: NDArray[Any]) -> None:
    """
    Args:
        token_ids: [sentences, tokens], NO_TOKEN behind their ends.
        experts: [layers, sentences, tokens].
    """
    np.savez_compressed(
        path,
        num_experts=num_experts,
        token_ids=token_ids.astype(np.int16),
        experts=experts.astype(np.uint8),
    )


def _sentence(
    host: HostModel, request_id: str, token_ids: tuple[int, ...], ids: Tensor, weights: Tensor
) -> Sentence:
    table = HashTable(
        ids.numpy().astype(np.uint16),
        weights.float().numpy().astype(np.float16),
        host.source.model_fingerprint,
        "recorded",
        "1",
    )
    return Sentence(request_id, token_ids, table)
