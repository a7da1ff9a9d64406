"""From prompts to hash tables: the interface of every predictor, and the one that runs SiDA's hash function."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from actors.predictor.hash_function import PREDICTOR_NAME, checked, to_table
from actors.predictor.network import HashFunction
from common.hash_table import HashTable

MAX_PADDED_SHARE = 0.5  # of a batch; prompts of very different lengths run apart


class Predictor(Protocol):
    """Tells which experts every token of a prompt will need, before the model runs. Not thread-safe."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def predict(self, prompts: Sequence[Sequence[int]]) -> list[HashTable]:
        """One table per prompt, in their order; a prompt's table does not depend on the others.

        Raises:
            VocabularyError: an id lies outside the model's vocabulary.
        """


class HashFunctionPredictor:
    """SiDA's hash function (arXiv 2310.18859, section 3.4.2) over several prompts at once, padded on the right."""

    name = PREDICTOR_NAME

    def __init__(self, function: HashFunction) -> None:
        self._function = function

    @property
    def version(self) -> str:
        return self._function.spec.version

    @torch.no_grad()
    def predict(self, prompts: Sequence[Sequence[int]]) -> list[HashTable]:
        spec = self._function.spec
        tokens = [checked(prompt, spec) for prompt in prompts]
        tables: dict[int, HashTable] = {}
        for group in _groups([len(prompt) for prompt in prompts]):
            batch = pad_sequence([tokens[number] for number in group], batch_first=True)
            lengths = torch.tensor([len(tokens[number]) for number in group])
            mask = torch.arange(batch.shape[1]) < lengths[:, None]
            logits = self._function(batch, mask)  # [prompts, tokens, layers, experts]
            ids, weights = self._function.route(logits)
            for row, number in enumerate(group):
                length = len(tokens[number])
                tables[number] = to_table(spec, ids[row, :length], weights[row, :length])
        return [tables[number] for number in range(len(prompts))]


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions of prompts to run together, longest first, so that at most half of a batch is padding."""
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if group and lengths[number] < MAX_PADDED_SHARE * lengths[group[0]]:
            yield group
            group = []
        group.append(number)
    if group:
        yield group
