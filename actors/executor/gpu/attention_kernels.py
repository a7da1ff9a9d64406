"""Triton kernels of attention at decode: rotary embedding, cache writes, attention over cache rows. Knows no model.

One token per row, inside a CUDA graph: row and position are read on the device, and launches cover the whole cache. A
row's keys are cut into splits at fixed positions, whose results are merged in their order, so a row's bits depend
neither on the number of rows nor on the other rows.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.executor.gpu.chained_launch import chained, wait_for_previous

_SPLIT_BYTES = 64 << 10  # keys and values of one split, held in shared memory at once
_MAX_SPLIT = 128  # keys
_HEADS_PER_PROGRAM = 16  # the smallest tile of the tensor cores
_MAX_PROGRAMS = 2048  # beyond it a program takes several splits: programs without work are cheap, not free
_MERGED_SPLITS = 64  # at once
_LOG2_E = math.log2(math.e)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    source, weight_ptr, cos_ptr, sin_ptr, eps,  # [D], [D] or None, [R], [R]
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head, normalised if there is a weight, its first R dims rotated; rounded after every step as the library does."""
    dtype = source.dtype.element_ty
    dims = tl.arange(0, BLOCK_D)
    in_first = dims < R // 2
    partners = tl.where(in_first, dims + R // 2, dims - R // 2)  # what rotate_half puts in each place
    x = tl.load(source + dims, mask=dims < D, other=0.0).to(tl.float32)
    y = tl.load(source + partners, mask=dims < R, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        x_weight = tl.load(weight_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)
        y_weight = tl.load(weight_ptr + partners, mask=dims < R, other=0.0).to(tl.float32)
        x = ((x * scale).to(dtype).to(tl.float32) * x_weight).to(dtype).to(tl.float32)
        y = ((y * scale).to(dtype).to(tl.float32) * y_weight).to(dtype).to(tl.float32)
    cos = tl.load(cos_ptr + dims, mask=dims < R, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + dims, mask=dims < R, other=0.0).to(tl.float32)
    turned = (x * cos).to(dtype).to(tl.float32) + (tl.where(in_first, -y, y) * sin).to(dtype).to(tl.float32)
    return tl.where(dims < R, turned, x).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_and_store_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # [batch, NUM_Q + 2 * NUM_KV, D]
    cos_ptr, sin_ptr, positions_ptr, rows_ptr,  # [batch, R], [batch, R], [batch], [batch]
    q_norm_ptr, k_norm_ptr, eps,  # [D] or None
    q_ptr, key_cache_ptr, value_cache_ptr,  # [batch, NUM_Q, D], [rows, NUM_KV, num_tokens, D], the same
    num_tokens,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    wait_for_previous(CHAINED)
    item = tl.program_id(0)
    head = tl.program_id(1)  # queries, then keys, then values
    dims = tl.arange(0, BLOCK_D)
    source = qkv_ptr + (item * (NUM_Q + 2 * NUM_KV) + head) * D
    cos_ptr += item * R
    sin_ptr += item * R
    if head < NUM_Q:
        q = _rotate(source, q_norm_ptr, cos_ptr, sin_ptr, eps, D, R, BLOCK_D)
        tl.store(q_ptr + (item * NUM_Q + head) * D + dims, q, mask=dims < D)
    else:
        kv_head = (head - NUM_Q) % NUM_KV
        line = (tl.load(rows_ptr + item) * NUM_KV + kv_head) * num_tokens + tl.load(positions_ptr + item)
        if head < NUM_Q + NUM_KV:
            k = _rotate(source, k_norm_ptr, cos_ptr, sin_ptr, eps, D, R, BLOCK_D)
            tl.store(key_cache_ptr + line * D + dims, k, mask=dims < D)
        else:
            v = tl.load(source + dims, mask=dims < D)
            tl.store(value_cache_ptr + line * D + dims, v, mask=dims < D)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    rows: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Split a fused projection, rotate queries and keys, write keys and values into the caches.

    Args:
        qkv: [batch, (q_heads + 2 * kv_heads) * head_dim]. All tensors contiguous; all but the indices of one dtype.
        cos, sin: [batch, rotary_dim], both halves, as the library's rotary modules return them; rotary_dim <= head_dim.
        positions, rows: [batch] int64, where in the caches each token goes.
        key_cache, value_cache: [num_rows, kv_heads, num_tokens, head_dim], written.
        q_norm_weight, k_norm_weight: [head_dim], RMSNorm of every head before the rotation.
    Returns:
        The queries, [batch, q_heads, head_dim].
    """
    batch, width = qkv.shape
    _, num_kv, num_tokens, head_dim = key_cache.shape
    assert key_cache.is_contiguous() and value_cache.is_contiguous() and key_cache.shape == value_cache.shape
    num_heads = width // head_dim
    q = qkv.new_empty(batch, num_heads - 2 * num_kv, head_dim)
    _rotate_and_store_kernel[(batch, num_heads)](
        qkv, cos, sin, positions, rows, q_norm_weight, k_norm_weight, eps, q, key_cache, value_cache, num_tokens,
        NUM_Q=num_heads - 2 * num_kv, NUM_KV=num_kv, D=head_dim, R=cos.shape[1],
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=1,
        enable_fp_fusion=False,  # the library rounds both products, also in fp32
        **chained(qkv.device),
    )  # fmt: skip
    return q


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    shrunk = tl.exp(-2 * tl.abs(x))
    magnitude = (1 - shrunk) / (1 + shrunk)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _first_visible(position, window, chunk):  # type: ignore[no-untyped-def]
    return tl.maximum(tl.maximum(position - window + 1, 0), position - position % chunk)


@triton.jit  # type: ignore[untyped-decorator]
def _range_of_splits(position, window, chunk, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The splits that hold a visible key: the first, and the one behind the last. Each holds at least one."""
    return _first_visible(position, window, chunk) // SPLIT, position // SPLIT + 1


@triton.jit  # type: ignore[untyped-decorator]
def _attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr, key_cache_ptr, value_cache_ptr,  # [batch, heads, D], [rows, kv_heads, num_tokens, D], the same of DV
    rows_ptr, positions_ptr,  # [batch]
    sums_ptr, maxima_ptr, totals_ptr,  # [batch, heads, num_splits, DV], [batch, heads, num_splits], the same; fp32
    num_tokens, num_splits, window, chunk,
    scale, softcap,  # scale leads to powers of two; with a softcap, into the tanh, and softcap to powers of two
    HAS_SOFTCAP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SPLIT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Every so many splits of one row and key/value head, for BLOCK_G of the query heads that share it."""
    wait_for_previous(CHAINED)
    dtype = q_ptr.dtype.element_ty
    item = tl.program_id(2)
    blocks_per_group: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    kv_head = tl.program_id(1) // blocks_per_group
    num_kv = tl.num_programs(1) // blocks_per_group
    position = tl.load(positions_ptr + item).to(tl.int32)
    row = tl.load(rows_ptr + item)
    first, end = _range_of_splits(position, window, chunk, SPLIT)
    first += tl.program_id(0)
    if first >= end:
        return
    cache_line = (row * num_kv + kv_head) * num_tokens
    key_cache_ptr += cache_line * D
    value_cache_ptr += cache_line * DV
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    in_group = tl.program_id(1) % blocks_per_group * BLOCK_G + tl.arange(0, BLOCK_G)
    is_head = in_group < GROUP
    heads = (item * num_kv + kv_head) * GROUP + in_group
    q_offsets = heads[:, None] * D + dims[None, :]
    q_mask = is_head[:, None] & (dims < D)[None, :]
    for split in range(first, end, tl.num_programs(0)):
        keys = split * SPLIT + tl.arange(0, SPLIT)
        is_visible = (keys <= position) & (keys >= _first_visible(position, window, chunk))
        k_mask = is_visible[:, None] & (dims < D)[None, :]
        v_mask = is_visible[:, None] & (value_dims < DV)[None, :]
        q = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0)  # here, so that k need not wait for it
        k = tl.load(key_cache_ptr + keys[:, None] * D + dims[None, :], mask=k_mask, other=0.0)
        v = tl.load(value_cache_ptr + keys[:, None] * DV + value_dims[None, :], mask=v_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_G, SPLIT]
        if HAS_SOFTCAP:
            scores = softcap * _tanh(scores)
        scores = tl.where(is_visible[None, :], scores, float("-inf"))
        maxima = tl.max(scores, axis=1)
        weights = tl.exp2(scores - maxima[:, None])
        sums = tl.dot(weights.to(dtype), v, input_precision="ieee")
        lines = heads.to(tl.int64) * num_splits + split
        sums_mask = is_head[:, None] & (value_dims < DV)[None, :]
        tl.store(sums_ptr + lines[:, None] * DV + value_dims[None, :], sums, mask=sums_mask)
        tl.store(maxima_ptr + lines, maxima, mask=is_head)
        tl.store(totals_ptr + lines, tl.sum(weights, axis=1), mask=is_head)


@triton.jit  # type: ignore[untyped-decorator]
def _merge_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, maxima_ptr, totals_ptr,  # as _attend_kernel left them
    positions_ptr, sinks_ptr,  # [batch], [heads] or None
    output_ptr,  # [batch, heads, DV]
    num_splits, window, chunk,
    LOG2_E: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """BLOCK_DV dims of one head: the splits' sums, brought to one maximum, over their total."""
    wait_for_previous(CHAINED)
    head = tl.program_id(1)
    line = tl.program_id(0) * tl.num_programs(1) + head
    dims = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    position = tl.load(positions_ptr + tl.program_id(0)).to(tl.int32)
    first, end = _range_of_splits(position, window, chunk, SPLIT)
    maximum = float("-inf")
    total = 0.0
    if sinks_ptr is not None:
        maximum = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        total = 1.0
    output = tl.zeros((BLOCK_DV,), tl.float32)
    for start in range(first, end, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        lines = line.to(tl.int64) * num_splits + splits
        mask = (splits < end)[:, None] & (dims < DV)[None, :]
        maxima = tl.load(maxima_ptr + lines, mask=splits < end, other=float("-inf"))
        totals = tl.load(totals_ptr + lines, mask=splits < end, other=0.0)
        sums = tl.load(sums_ptr + lines[:, None] * DV + dims[None, :], mask=mask, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(maxima, axis=0))
        factors = tl.exp2(maxima - new_maximum)
        kept = tl.exp2(maximum - new_maximum)
        total = total * kept + tl.sum(totals * factors, axis=0)
        output = output * kept + tl.sum(sums * factors[:, None], axis=0)
        maximum = new_maximum
    tl.store(output_ptr + line * DV + dims, (output / total).to(output_ptr.dtype.element_ty), mask=dims < DV)


def _split_size(padded_dims: int, itemsize: int) -> int:
    """How many keys a split has: a power of two from 16 up, by the size of a key and its value alone."""
    fitting = _SPLIT_BYTES // (padded_dims * itemsize)
    return max(16, min(_MAX_SPLIT, 1 << (fitting.bit_length() - 1)))


def decode_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rows: Tensor,
    positions: Tensor,
    scaling: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Attention of one query per row over that row's cache, up to its own position.

    Scores and softmax are fp32; its exponentials are rounded to the dtype before they weigh the values, as in
    FlashAttention (arXiv 2205.14135). What the caches hold beyond a row's position is never read.

    Args:
        q: [batch, q_heads, head_dim]. All tensors contiguous; all but the indices of one dtype.
        key_cache: [num_rows, kv_heads, num_tokens, head_dim].
        value_cache: [num_rows, kv_heads, num_tokens, value_dim].
        rows, positions: [batch] int64; row b sees positions 0 to positions[b].
        window: see only so many positions, the last ones.
        sinks: [q_heads], for each head a logit that takes part in the softmax and weighs no value.
        softcap: bound the scores by softcap * tanh(scores / softcap).
        chunk: see no position before the last multiple of it.
    Returns:
        [batch, q_heads, value_dim] of q's dtype.
    """
    batch, num_heads, head_dim = q.shape
    _, num_kv, num_tokens, value_dim = value_cache.shape
    assert q.is_contiguous() and key_cache.is_contiguous() and value_cache.is_contiguous()
    block_d, block_dv = (max(16, triton.next_power_of_2(dim)) for dim in (head_dim, value_dim))
    split = _split_size(block_d + block_dv, q.itemsize)
    num_splits = triton.cdiv(num_tokens, split)
    window = num_tokens if window is None else window
    chunk = num_tokens if chunk is None else chunk
    sums = q.new_empty(batch, num_heads, num_splits, value_dim, dtype=torch.float32)
    maxima, totals = q.new_empty(2, batch, num_heads, num_splits, dtype=torch.float32).unbind()
    num_blocks = num_kv * triton.cdiv(num_heads // num_kv, _HEADS_PER_PROGRAM)
    num_programs = min(num_splits, max(1, _MAX_PROGRAMS // (batch * num_blocks)))
    _attend_kernel[(num_programs, num_blocks, batch)](
        q, key_cache, value_cache, rows, positions, sums, maxima, totals, num_tokens, num_splits, window, chunk,
        scaling * _LOG2_E if softcap is None else scaling / softcap, 0.0 if softcap is None else softcap * _LOG2_E,
        HAS_SOFTCAP=softcap is not None, GROUP=num_heads // num_kv, D=head_dim, DV=value_dim,
        BLOCK_G=_HEADS_PER_PROGRAM, BLOCK_D=block_d, BLOCK_DV=block_dv, SPLIT=split,
        num_warps=8,
        num_stages=2,  # one buffer each, filled by asynchronous copies: keys and values are under way together
        **chained(q.device),
    )  # fmt: skip
    output = q.new_empty(batch, num_heads, value_dim)
    block_dv = min(block_dv, 64)
    _merge_kernel[(batch, num_heads, triton.cdiv(value_dim, block_dv))](
        sums, maxima, totals, positions, sinks, output, num_splits, window, chunk,
        LOG2_E=_LOG2_E, DV=value_dim, BLOCK_DV=block_dv, SPLIT=split, BLOCK_S=_MERGED_SPLITS,
        num_warps=4, **chained(q.device),
    )  # fmt: skip
    return output
