"""Tells a library encoder or decoder at which positions the tokens of a forward stand, row by row.

Relative attention (T5, arXiv 1910.10683, section 2.1) and sinusoidal embeddings (arXiv 1706.03762, section 3.5) get no
position ids from the library: it takes every row to begin at the same position. The two methods that compute from that
are replaced here, on the modules of one model. Rotary and learned positions need none of this.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class RowPositions:
    """Where the tokens of the coming forward of one encoder or decoder stand; set it before each.

    Args:
        stack: the encoder or decoder.
    """

    def __init__(self, stack: nn.Module) -> None:
        self._queries = self._keys = torch.empty(0, 0, dtype=torch.int64)
        self._visible: Tensor | None = None
        self.biases_attention = False  # whether a bias on the scores tells the model positions
        for module in stack.modules():
            if getattr(module, "has_relative_attention_bias", False):
                module.compute_bias = partial(self._bias, module)  # type: ignore[assignment]
                self.biases_attention = True
            if hasattr(module, "create_position_ids_from_input_ids"):
                module.create_position_ids_from_input_ids = self._embedded  # type: ignore[assignment]

    def set(self, queries: Tensor, keys: Tensor, visible: Tensor | None = None) -> None:
        """
        Args:
            queries: [rows, queries] int64. keys: [rows, keys] or [1, keys] int64.
            visible: [rows, queries, keys] bool, for a model whose bias is to be its mask too.
        """
        self._queries, self._keys, self._visible = queries, keys, visible

    def _bias(self, attention: Any, *_: Any, **__: Any) -> Tensor:
        """`compute_bias` of a T5 attention: [rows, heads, queries, keys]."""
        buckets = attention._relative_position_bucket(
            self._keys[:, None, :] - self._queries[:, :, None],
            bidirectional=not attention.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        bias: Tensor = attention.relative_attention_bias(buckets).permute(0, 3, 1, 2)
        if self._visible is None:
            return bias
        return bias.masked_fill(~self._visible.unsqueeze(1), torch.finfo(bias.dtype).min)

    def _embedded(self, token_ids: Tensor, padding_idx: int, *_: Any) -> Tensor:
        """`create_position_ids_from_input_ids` of fairseq's sinusoidal embeddings, where padding has no position."""
        is_token = (token_ids != padding_idx).long()
        return (self._queries + 1) * is_token + padding_idx
