"""Decode attention over the row cache for every family that looks its attention up in the library's registry."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actors.executor.families import chunk_of_layer, window_of_layer
from actors.executor.gpu.attention_kernels import decode_attention

_IMPLEMENTATION = "cache_rows"
_ADDRESS: ContextVar[tuple[Tensor, Tensor]] = ContextVar("address")


@contextmanager
def attending_to_rows(config: PretrainedConfig, rows: Tensor, positions: Tensor) -> Iterator[None]:
    """Within, the model's attention reads cache rows by number, each up to its position, instead of taking a mask.

    Args:
        rows, positions: [batch] int64 on the device, one token each.
    """
    configured = config._attn_implementation
    config._attn_implementation = _IMPLEMENTATION
    token = _ADDRESS.set((rows, positions))
    try:
        yield
    finally:
        _ADDRESS.reset(token)
        config._attn_implementation = configured


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one token per row over [rows, heads, max_tokens, head_dim] keys and values.

    Args:
        query: [batch, heads, 1, head_dim].
    Returns:
        [batch, 1, heads, value_dim].
    """
    rows, positions = _ADDRESS.get()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = decode_attention(
        query.squeeze(2).contiguous(),
        key.contiguous(),
        value.contiguous(),
        rows,
        positions,
        scaling,
        window=window_of_layer(module.config, module.layer_idx),
        sinks=s_aux,
        softcap=softcap,
        chunk=chunk_of_layer(module.config, module.layer_idx),
    )
    return output.unsqueeze(1), None


ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _attend)
