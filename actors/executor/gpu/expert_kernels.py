"""Triton kernels of the experts at decode: they read slots by id, without sorting or copying tokens or weights.

A *pair* is one (row, choice) of the router, numbered row * top_k + choice. Each program multiplies the pairs of one
expert by one tile of its weights, in tiles of 16 pairs whose sums always run in the same order: a pair's result depends
neither on the slot its expert lies in nor on the rest of the batch. Rounding follows the library's grouped forward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.executor.gpu.chained_launch import chained, wait_for_previous

_PAIRS_PER_TILE = tl.constexpr(16)  # the smallest tile of the tensor cores


@triton.jit  # type: ignore[untyped-decorator]
def _load_tile(pointer, lines, inner, num_lines, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """[lines, BLOCK] of a row-major matrix; masks only where the shape needs it."""
    offsets = lines[:, None].to(tl.int64) * stride + inner[None, :]
    mask = (lines < num_lines)[:, None]
    if SIZE % BLOCK != 0:
        mask = mask & (inner < SIZE)[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _pairs_of(expert, ids_ptr, num_pairs, first, PAIRS_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """The expert's pairs `first` to `first + 15` and whether there are so many; and how many it has in all."""
    pairs = tl.arange(0, PAIRS_P)
    chosen = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=-1) == expert
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1 - first
    lines = tl.arange(0, _PAIRS_PER_TILE)
    match = chosen[None, :] & (place[None, :] == lines[:, None])  # [16, pairs]
    found = tl.max(tl.where(match, pairs[None, :], -1), axis=1)
    return tl.maximum(found, 0), found >= 0, tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def _silu(x):  # type: ignore[no-untyped-def]
    return x / (1.0 + tl.exp(-x))


@triton.jit  # type: ignore[untyped-decorator]
def activate(gate, up, dtype: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu(gate) * up, or relu(up) without a gate, rounded as the library's modules round."""
    up = up.to(dtype).to(tl.float32)
    if GATED:
        product = _silu(gate.to(dtype).to(tl.float32)).to(dtype).to(tl.float32) * up
    else:
        product = tl.where(up > 0, up, tl.where(up == up, 0.0, up))  # NaN stays NaN
    return product.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def up_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,  # [rows, HIDDEN]
    ids_ptr, num_active_ptr,  # [rows, TOP_K] integers; int32
    slots_ptr, experts_ptr, num_ptr,  # int32: the experts of this wave
    up_ptr,  # [slots, INTERMEDIATE, HIDDEN], or with a gate [slots, 2 * INTERMEDIATE, HIDDEN]; SLOT_STRIDE elements apart
    output_ptr,  # [rows * TOP_K, INTERMEDIATE]
    GATED: tl.constexpr,
    SLOT_STRIDE: tl.constexpr, HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr,
    PAIRS_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """silu(x @ gate.T) * (x @ up.T), or relu(x @ up.T), for every pair of the wave's experts."""
    wait_for_previous(CHAINED)
    group = tl.program_id(1)
    if group >= tl.load(num_ptr):
        return
    dtype = hidden_ptr.dtype.element_ty
    expert = tl.load(experts_ptr + group)
    gate_ptr = up_ptr + tl.load(slots_ptr + group).to(tl.int64) * SLOT_STRIDE
    weight_ptr = gate_ptr + (INTERMEDIATE * HIDDEN if GATED else 0)
    num_pairs = tl.load(num_active_ptr) * TOP_K
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = 0
    count = 1
    while first < count:
        pairs, is_pair, count = _pairs_of(expert, ids_ptr, num_pairs, first, PAIRS_P)
        gate = tl.zeros((_PAIRS_PER_TILE, BLOCK_N), tl.float32)
        up = tl.zeros((_PAIRS_PER_TILE, BLOCK_N), tl.float32)
        for start in range(0, HIDDEN, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            x_mask = is_pair[:, None] & (inner < HIDDEN)[None, :]
            x = tl.load(
                hidden_ptr + (pairs // TOP_K)[:, None] * HIDDEN + inner[None, :], mask=x_mask, other=0.0
            )
            w_up = _load_tile(weight_ptr, columns, inner, INTERMEDIATE, HIDDEN, HIDDEN, BLOCK_K)
            if GATED:
                w_gate = _load_tile(gate_ptr, columns, inner, INTERMEDIATE, HIDDEN, HIDDEN, BLOCK_K)
                gate = tl.dot(x, w_gate.T, gate, input_precision="ieee")
            up = tl.dot(x, w_up.T, up, input_precision="ieee")
        mask = is_pair[:, None] & (columns < INTERMEDIATE)[None, :]
        target = output_ptr + pairs[:, None] * INTERMEDIATE + columns[None, :]
        tl.store(target, activate(gate, up, dtype, GATED), mask=mask)
        first += _PAIRS_PER_TILE


@triton.jit  # type: ignore[untyped-decorator]
def down_kernel(  # type: ignore[no-untyped-def]
    input_ptr,  # [rows * TOP_K, INTERMEDIATE]
    ids_ptr, num_active_ptr, slots_ptr, experts_ptr, num_ptr,  # as in `up_kernel`
    down_ptr,  # [slots, HIDDEN, INTERMEDIATE], SLOT_STRIDE elements apart
    output_ptr,  # [rows * TOP_K, HIDDEN]
    SLOT_STRIDE: tl.constexpr, HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr,
    PAIRS_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """x @ down.T for every pair of the wave's experts, not yet weighted."""
    wait_for_previous(CHAINED)
    group = tl.program_id(1)
    if group >= tl.load(num_ptr):
        return
    expert = tl.load(experts_ptr + group)
    weight_ptr = down_ptr + tl.load(slots_ptr + group).to(tl.int64) * SLOT_STRIDE
    num_pairs = tl.load(num_active_ptr) * TOP_K
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = 0
    count = 1
    while first < count:
        pairs, is_pair, count = _pairs_of(expert, ids_ptr, num_pairs, first, PAIRS_P)
        total = tl.zeros((_PAIRS_PER_TILE, BLOCK_N), tl.float32)
        for start in range(0, INTERMEDIATE, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            x_mask = is_pair[:, None] & (inner < INTERMEDIATE)[None, :]
            x = tl.load(input_ptr + pairs[:, None] * INTERMEDIATE + inner[None, :], mask=x_mask, other=0.0)
            weight = _load_tile(weight_ptr, columns, inner, HIDDEN, INTERMEDIATE, INTERMEDIATE, BLOCK_K)
            total = tl.dot(x, weight.T, total, input_precision="ieee")
        mask = is_pair[:, None] & (columns < HIDDEN)[None, :]
        target = output_ptr + pairs[:, None] * HIDDEN + columns[None, :]
        tl.store(target, total.to(output_ptr.dtype.element_ty), mask=mask)
        first += _PAIRS_PER_TILE


@triton.jit  # type: ignore[untyped-decorator]
def combine_kernel(  # type: ignore[no-untyped-def]
    pairs_ptr,  # [rows * TOP_K, HIDDEN]
    weights_ptr,  # [rows, TOP_K]
    output_ptr,  # [rows, HIDDEN]
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PRODUCT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Weighted sum over each row's choices, in their order."""
    wait_for_previous(CHAINED)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < HIDDEN
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = row * TOP_K + choice
        value = tl.load(pairs_ptr + pair * HIDDEN + columns, mask=mask, other=0.0).to(tl.float32)
        product = value * tl.load(weights_ptr + pair).to(tl.float32)
        total += product.to(PRODUCT).to(tl.float32)
    tl.store(output_ptr + row * HIDDEN + columns, total.to(output_ptr.dtype.element_ty), mask=mask)


def combine(pair_outputs: Tensor, weights: Tensor) -> Tensor:
    """Args: pair_outputs: [rows * top_k, hidden]; weights: [rows, top_k]. Returns: [rows, hidden] in the former's dtype."""
    rows, top_k = weights.shape
    hidden = pair_outputs.shape[-1]
    output = pair_outputs.new_empty(rows, hidden)
    product = torch.promote_types(pair_outputs.dtype, weights.dtype)
    combine_kernel[(rows, triton.cdiv(hidden, 512))](
        pair_outputs, weights, output,
        HIDDEN=hidden, TOP_K=top_k, BLOCK=512, PRODUCT=getattr(tl, str(product).removeprefix("torch.")), num_warps=4,
        **chained(pair_outputs.device),
    )  # fmt: skip
    return output
