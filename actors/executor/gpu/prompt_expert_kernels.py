"""Triton kernels of the experts of prompts: many pairs per expert, brought into the order of their experts.

A *pair* is one (token, choice) of the router, numbered token * top_k + choice. Experts are read from slots by id. Tiles have
one size and sums one order, so a pair's result depends neither on its slot nor on the other pairs. Rounding follows
the library's grouped forward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.executor.gpu.expert_kernels import activate

_PAIRS_AT_ONCE = 1024  # of the loops over all pairs
# Pairs of a tile, by the size of an element in bytes: without tensor cores, empty places take as long as others.
_BLOCK_M = {2: 64, 4: 16}


@triton.jit(do_not_specialize=["num_pairs"])  # type: ignore[untyped-decorator]
def _sort_pairs_kernel(  # type: ignore[no-untyped-def]
    ids_ptr,  # [pairs] integers
    order_ptr, starts_ptr,  # int32 [pairs], [experts + 1]
    num_pairs,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per expert, and one that only counts all pairs."""
    expert = tl.program_id(0)
    start = 0
    for first in range(0, num_pairs, BLOCK):
        pairs = first + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=expert)
        start += tl.sum((ids < expert).to(tl.int32), axis=0)
    tl.store(starts_ptr + expert, start)
    for first in range(0, num_pairs, BLOCK):
        pairs = first + tl.arange(0, BLOCK)
        chosen = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=-1) == expert
        place = start + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(order_ptr + place, pairs, mask=chosen)
        start += tl.sum(chosen.to(tl.int32), axis=0)


def sort_pairs(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """
    Args:
        ids: [tokens, top_k] integers.
    Returns:
        order: [tokens * top_k] int32, pairs by expert; those of one expert as they were.
        starts: [num_experts + 1] int32, where in it each expert's begin.
    """
    num_pairs = ids.numel()
    order, starts = (ids.new_empty(size, dtype=torch.int32) for size in (num_pairs, num_experts + 1))
    _sort_pairs_kernel[(num_experts + 1,)](ids, order, starts, num_pairs, BLOCK=_PAIRS_AT_ONCE, num_warps=4)
    return order, starts


@triton.jit  # type: ignore[untyped-decorator]
def _tile_of_pairs(starts_ptr, order_ptr, expert, tile, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs of one tile of an expert, which of them there are, and their number."""
    first = tl.load(starts_ptr + expert) + tile * BLOCK_M
    lines = first + tl.arange(0, BLOCK_M)
    end = tl.load(starts_ptr + expert + 1)
    is_pair = lines < end
    return tl.load(order_ptr + lines, mask=is_pair, other=0), is_pair, end - first


@triton.jit  # type: ignore[untyped-decorator]
def _up_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,  # [tokens, HIDDEN]
    order_ptr, starts_ptr,  # as `sort_pairs` returns them
    slots_ptr, experts_ptr, num_ptr,  # int32: the experts of this wave
    up_ptr,  # [slots, INTERMEDIATE, HIDDEN], or with a gate [slots, 2 * INTERMEDIATE, HIDDEN]; SLOT_STRIDE elements apart
    output_ptr,  # [pairs, INTERMEDIATE]
    GATED: tl.constexpr,
    SLOT_STRIDE: tl.constexpr, HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """silu(x @ gate.T) * (x @ up.T), or relu(x @ up.T), for one tile of pairs of one of the wave's experts."""
    group = tl.program_id(1)
    if group >= tl.load(num_ptr):
        return
    expert = tl.load(experts_ptr + group)
    pairs, is_pair, left = _tile_of_pairs(starts_ptr, order_ptr, expert, tl.program_id(2), BLOCK_M)
    if left <= 0:
        return
    dtype = hidden_ptr.dtype.element_ty
    gate_ptr = up_ptr + tl.load(slots_ptr + group).to(tl.int64) * SLOT_STRIDE
    weight_ptr = gate_ptr + (INTERMEDIATE * HIDDEN if GATED else 0)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = (columns < INTERMEDIATE)[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        inside = (inner < HIDDEN)[None, :]
        x_ptrs = hidden_ptr + (pairs // TOP_K)[:, None] * HIDDEN + inner[None, :]
        x = tl.load(x_ptrs, mask=is_pair[:, None] & inside, other=0.0)
        offsets = columns[:, None] * HIDDEN + inner[None, :]
        w_up = tl.load(weight_ptr + offsets, mask=is_column & inside, other=0.0)
        if GATED:
            w_gate = tl.load(gate_ptr + offsets, mask=is_column & inside, other=0.0)
            gate = tl.dot(x, w_gate.T, gate, input_precision="ieee")
        up = tl.dot(x, w_up.T, up, input_precision="ieee")
    target = output_ptr + pairs[:, None].to(tl.int64) * INTERMEDIATE + columns[None, :]
    mask = is_pair[:, None] & (columns < INTERMEDIATE)[None, :]
    tl.store(target, activate(gate, up, dtype, GATED), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _down_kernel(  # type: ignore[no-untyped-def]
    input_ptr,  # [pairs, INTERMEDIATE]
    order_ptr, starts_ptr, slots_ptr, experts_ptr, num_ptr,  # as in `_up_kernel`
    down_ptr,  # [slots, HIDDEN, INTERMEDIATE], SLOT_STRIDE elements apart
    output_ptr,  # [pairs, HIDDEN]
    SLOT_STRIDE: tl.constexpr, HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x @ down.T for one tile of pairs of one of the wave's experts, not yet weighted."""
    group = tl.program_id(1)
    if group >= tl.load(num_ptr):
        return
    expert = tl.load(experts_ptr + group)
    pairs, is_pair, left = _tile_of_pairs(starts_ptr, order_ptr, expert, tl.program_id(2), BLOCK_M)
    if left <= 0:
        return
    weight_ptr = down_ptr + tl.load(slots_ptr + group).to(tl.int64) * SLOT_STRIDE
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = (columns < HIDDEN)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, INTERMEDIATE, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        inside = (inner < INTERMEDIATE)[None, :]
        x_ptrs = input_ptr + pairs[:, None].to(tl.int64) * INTERMEDIATE + inner[None, :]
        x = tl.load(x_ptrs, mask=is_pair[:, None] & inside, other=0.0)
        weight = tl.load(
            weight_ptr + columns[:, None] * INTERMEDIATE + inner[None, :], mask=is_column & inside, other=0.0
        )
        total = tl.dot(x, weight.T, total, input_precision="ieee")
    target = output_ptr + pairs[:, None].to(tl.int64) * HIDDEN + columns[None, :]
    mask = is_pair[:, None] & (columns < HIDDEN)[None, :]
    tl.store(target, total.to(output_ptr.dtype.element_ty), mask=mask)


def compute_pairs(
    hidden: Tensor,
    order: Tensor,
    starts: Tensor,
    wave: tuple[Tensor, Tensor, Tensor],
    max_experts: int,
    up: Tensor,
    down: Tensor,
    activated: Tensor,
    outputs: Tensor,
) -> None:
    """Fill in the outputs of the pairs whose experts are in slots.

    Args:
        hidden: [tokens, hidden]. order, starts: of `sort_pairs`.
        wave: slots, experts [max_experts] and their number [1], int32 on the device.
        up: [slots, intermediate, hidden] of experts with ReLU, or [slots, 2 * intermediate, hidden], gate and up, of those
            with a SiLU gate. down: [slots, hidden, intermediate]. Both contiguous but for the slots.
        activated: [pairs, intermediate], scratch. outputs: [pairs, hidden].
    """
    hidden_size, intermediate = outputs.shape[1], activated.shape[1]
    num_tokens = len(hidden)
    block_m = _BLOCK_M[hidden.itemsize]
    tiles = triton.cdiv(num_tokens, block_m)  # of an expert: a token chooses it once
    wide = hidden.itemsize == 2
    tile = {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 64 if wide else 32, "num_warps": 4}
    _up_kernel[(triton.cdiv(intermediate, 64), max_experts, tiles)](
        hidden, order, starts, *wave, up, activated,
        GATED=up.shape[1] == 2 * intermediate, SLOT_STRIDE=up.stride(0), HIDDEN=hidden_size, INTERMEDIATE=intermediate,
        TOP_K=len(order) // num_tokens, num_stages=3, **tile,
    )  # fmt: skip
    _down_kernel[(triton.cdiv(hidden_size, 64), max_experts, tiles)](
        activated, order, starts, *wave, down, outputs,
        SLOT_STRIDE=down.stride(0), HIDDEN=hidden_size, INTERMEDIATE=intermediate, num_stages=4, **tile,
    )  # fmt: skip
