"""Triton kernels of the dense parts of prompts: linear layers and attention, over the tokens of several rows packed together.

A token's bits depend neither on the other prompts of a pass nor on where its own was cut into chunks: tiles have one size
whatever the number of tokens, and sums run in an order that the layer's shape and the token's position fix. Sums are
fp32, rounded where the library's modules round.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS = 16  # consecutive tokens of one row that a program of the attention takes
_HEADS_PER_PROGRAM = 8
_LOG2_E = math.log2(math.e)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr,  # [num_rows, num_inputs], [num_outputs, num_inputs], [num_outputs] or None
    output_ptr,  # [num_rows, num_outputs]
    num_rows, num_outputs, num_inputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = rows < num_rows, columns < num_outputs
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        inside = (inner < num_inputs)[None, :]
        x = tl.load(
            x_ptr + rows[:, None] * num_inputs + inner[None, :], mask=is_row[:, None] & inside, other=0.0
        )
        weight_ptrs = weight_ptr + columns[:, None].to(tl.int64) * num_inputs + inner[None, :]
        weight = tl.load(weight_ptrs, mask=is_column[:, None] & inside, other=0.0)
        total = tl.dot(x, weight.T, total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None].to(tl.int64) * num_outputs + columns[None, :]
    tl.store(
        output_ptr + offsets, total.to(output_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :]
    )


def prompt_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, for any number of rows.

    Args:
        x: [rows, num_inputs]. All tensors contiguous and of one dtype.
        weight: [num_outputs, num_inputs]. bias: [num_outputs], added before the only rounding.
    Returns:
        [rows, num_outputs] of x's dtype.
    """
    (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
    assert weight.is_contiguous() and x.is_contiguous()
    output = x.new_empty(num_rows, num_outputs)
    wide = x.itemsize == 2
    block_m, block_n, block_k = 64, 128 if wide else 64, 64 if wide else 32
    _linear_kernel[(triton.cdiv(num_rows, block_m), triton.cdiv(num_outputs, block_n))](
        x, weight, bias, output, num_rows, num_outputs, num_inputs,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=4 if wide else 3,
    )  # fmt: skip
    return output


@triton.jit  # type: ignore[untyped-decorator]
def _attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr, key_cache_ptr, value_cache_ptr,  # [tokens, heads, D], [rows, kv_heads, max_tokens, D], the same
    rows_ptr, positions_ptr,  # [tokens] int64
    blocks_ptr,  # int32 [blocks, 2]: first token and number of tokens
    output_ptr,  # [tokens, heads, D]
    max_tokens, window, scale,  # scale leads to powers of two
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of one row, for BLOCK_G of the query heads that share a key/value head.

    Keys are read in blocks that begin at multiples of BLOCK_KEYS, and one in which a token sees nothing leaves its sums
    as they were (FlashAttention, arXiv 2205.14135).
    """
    dtype = q_ptr.dtype.element_ty
    blocks_per_group: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    kv_head = tl.program_id(1) // blocks_per_group
    first = tl.load(blocks_ptr + 2 * tl.program_id(0))
    count = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1)
    lines = tl.arange(0, BLOCK_T * BLOCK_G)
    place = lines // BLOCK_G
    in_group = tl.program_id(1) % blocks_per_group * BLOCK_G + lines % BLOCK_G
    is_line = (place < count) & (in_group < GROUP)
    start = tl.load(positions_ptr + first).to(tl.int32)
    position = start + place
    cache_line = (tl.load(rows_ptr + first) * NUM_KV + kv_head) * max_tokens
    key_cache_ptr += cache_line * D
    value_cache_ptr += cache_line * D
    dims = tl.arange(0, BLOCK_D)
    q_offsets = ((first + place) * NUM_KV * GROUP + kv_head * GROUP + in_group)[:, None] * D + dims[None, :]
    q_mask = is_line[:, None] & (dims < D)[None, :]
    q = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0)
    maxima = tl.full((BLOCK_T * BLOCK_G,), float("-inf"), tl.float32)
    totals = tl.zeros((BLOCK_T * BLOCK_G,), tl.float32)
    sums = tl.zeros((BLOCK_T * BLOCK_G, BLOCK_D), tl.float32)
    from_key = tl.maximum(start - window + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    for block in range(from_key, start + count, BLOCK_KEYS):
        keys = block + tl.arange(0, BLOCK_KEYS)
        mask = (keys < start + count)[:, None] & (dims < D)[None, :]
        k = tl.load(key_cache_ptr + keys[:, None] * D + dims[None, :], mask=mask, other=0.0)
        v = tl.load(value_cache_ptr + keys[:, None] * D + dims[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        is_visible = (keys[None, :] <= position[:, None]) & (keys[None, :] > position[:, None] - window)
        scores = tl.where(is_visible, scores, float("-inf"))
        new_maxima = tl.maximum(maxima, tl.max(scores, axis=1))
        finite = tl.where(new_maxima == float("-inf"), 0.0, new_maxima)
        kept = tl.exp2(maxima - finite)
        weights = tl.exp2(scores - finite[:, None])
        totals = totals * kept + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(dtype), v, sums * kept[:, None], input_precision="ieee")
        maxima = new_maxima
    tl.store(output_ptr + q_offsets, (sums / totals[:, None]).to(dtype), mask=q_mask)


def prompt_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rows: Tensor,
    positions: Tensor,
    blocks: Tensor,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of prompt tokens over the cache rows that hold their own and all earlier keys and values.

    Args:
        q: [tokens, q_heads, head_dim]. All tensors contiguous; all but the indices of one dtype.
        key_cache, value_cache: [num_rows, kv_heads, max_tokens, head_dim].
        rows, positions: [tokens] int64.
        blocks: [blocks, 2] int32, first token and number of tokens: each token in one block; a block has at most
            BLOCK_TOKENS, of one row and consecutive positions.
        window: see only so many positions, the last ones.
    Returns:
        [tokens, q_heads, head_dim] of q's dtype.
    """
    _, num_heads, head_dim = q.shape
    _, num_kv, max_tokens, _ = key_cache.shape
    assert q.is_contiguous() and key_cache.is_contiguous() and value_cache.is_contiguous()
    group = num_heads // num_kv
    block_g = min(_HEADS_PER_PROGRAM, triton.next_power_of_2(group))
    output = torch.empty_like(q)
    _attend_kernel[(len(blocks), num_kv * triton.cdiv(group, block_g))](
        q, key_cache, value_cache, rows, positions, blocks, output, max_tokens,
        max_tokens if window is None else window, scaling * _LOG2_E,
        NUM_KV=num_kv, GROUP=group, D=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_T=BLOCK_TOKENS, BLOCK_G=block_g, BLOCK_KEYS=64 if q.itemsize == 2 else 32,
        num_warps=8 if block_g == _HEADS_PER_PROGRAM else 4, num_stages=2,
    )  # fmt: skip
    return output
