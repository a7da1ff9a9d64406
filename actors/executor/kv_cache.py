"""The key/value cache of all sequences: one fixed row per sequence, addressed by (row, position). No paging, no sharing.

Writing a position twice is harmless, so a failed pass can simply be run again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class RowCache(Cache):  # type: ignore[misc]  # untyped
    """A library cache whose attention layers store [rows, heads, max_tokens, head_dim] keys and values.

    Layers are allocated at their first update, from the shapes the model gives: keys and values may have different
    head dims (multi-head latent attention).
    """

    def __init__(self, num_rows: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        self._num_rows, self._max_tokens = num_rows, max_tokens
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._rows: Tensor | slice = slice(0)
        self._row_index = torch.empty(0, 1, dtype=torch.int64)
        self._positions = torch.empty(0, 0, dtype=torch.int64)
        self._length = 0
        self._whole = False  # whether `update` returns every row, for attention that finds its rows itself

    @contextmanager
    def address_kept(self) -> Iterator[None]:
        """Another pass may address the cache in the body; the one under way goes on afterwards."""
        kept = (self._rows, self._row_index, self._positions, self._length, self._whole)
        yield
        self._rows, self._row_index, self._positions, self._length, self._whole = kept

    def address_rows(self, rows: Tensor, positions: Tensor, gather: bool) -> None:
        """Say which rows and positions the coming pass writes, without the host knowing them.

        Args:
            rows, positions: [batch] int64 on the model's device, one token each.
            gather: have `update` copy the rows together; otherwise it returns every row of the cache.
        """
        self._row_index, self._positions = rows.unsqueeze(1), positions.unsqueeze(1)
        self._rows, self._length, self._whole = rows, self._max_tokens, not gather

    def address(self, rows: Sequence[int], positions: Tensor) -> int:
        """Say which rows and positions the coming pass writes.

        Args:
            positions: [len(rows), queries] int64 on the model's device, never falling along a row.
        Returns:
            The number of positions that attention will see: every row is read up to the longest one's end.
        """
        self._row_index = torch.tensor(rows, device=positions.device).unsqueeze(1)
        self._positions = positions
        self._length = int(positions[:, -1].max()) + 1
        self._whole = False
        contiguous = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        self._rows = slice(rows[0], rows[0] + len(rows)) if contiguous else self._row_index.squeeze(1)
        return self._length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [batch, heads, queries, head_dim] states; return [batch, heads, length, head_dim] of the addressed rows,
        or [rows, heads, max_tokens, head_dim] after `address_rows`.
        """
        if layer_idx not in self._keys:
            self._keys[layer_idx] = self._allocate(key_states)
            self._values[layer_idx] = self._allocate(value_states)
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[self._row_index, :, self._positions] = key_states.transpose(1, 2)
        values[self._row_index, :, self._positions] = value_states.transpose(1, 2)
        if self._whole:
            return keys, values
        return keys[self._rows, :, : self._length], values[self._rows, :, : self._length]

    def _allocate(self, states: Tensor) -> Tensor:
        _, heads, _, head_dim = states.shape
        return states.new_zeros(self._num_rows, heads, self._max_tokens, head_dim)

    def of_layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The keys and values of an attention layer that has run: [rows, heads, max_tokens, head_dim] each."""
        return self._keys[layer_idx], self._values[layer_idx]

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._keys.values(), *self._values.values()))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def __len__(self) -> int:
        return len(self._keys)
