"""Triton kernels of the dense parts of a decode step: norm, linear layers, router. Not attention, not the experts.

For up to 32 rows, one token each, inside a CUDA graph. A row's bits depend neither on the number of rows nor on the other
rows: every sum runs in an order that the layer's shape alone fixes. Sums are fp32, rounded where the library's modules
round.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.executor.gpu.chained_launch import chained, wait_for_previous

MAX_ROWS = 32

_NUM_LANES = 8  # warps of a program; each adds up its own part of K
_STEP_BYTES = 16 << 10  # weights that a program reads in one step
_WIDE_FROM = 6400  # outputs that 132 SMs with 3 programs of 16 each hold at once, roughly


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, delta_ptr, weight_ptr,  # [rows, HIDDEN], the same or None, [HIDDEN]
    normed_ptr, sum_ptr,  # [rows, HIDDEN]
    eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    wait_for_previous(CHAINED)
    dtype = x_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    mask = columns < HIDDEN
    offsets = tl.program_id(0) * HIDDEN + columns
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        x = (x + tl.load(delta_ptr + offsets, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(sum_ptr + offsets, x, mask=mask)
        x = x.to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)).to(dtype).to(tl.float32)
    tl.store(normed_ptr + offsets, (weight * normed).to(dtype), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Add `delta` to the residual stream and normalise the sum, as Llama's RMSNorm and its copies do.

    Args:
        x: [rows, hidden]. All tensors contiguous and of one dtype.
        weight: [hidden].
        delta: [rows, hidden], what the last sublayer adds.
    Returns:
        The normalised rows, and x + delta rounded to the dtype (x itself without a delta), both [rows, hidden].
    """
    rows, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    normed = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    _rms_norm_kernel[(rows,)](
        x,
        delta,
        weight,
        normed,
        total,
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 16),
        **chained(x.device),
    )
    return normed, total


@triton.jit  # type: ignore[untyped-decorator]
def _add_lanes(sums, LANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr):  # type: ignore[no-untyped-def]
    """[LANES, BLOCK_N, BLOCK_B] summed over the lanes in a tree: tl.sum's order would be the compiler's, by BLOCK_B."""
    if LANES == 1:
        total = tl.reshape(sums, (BLOCK_N, BLOCK_B))
    else:
        halves = tl.reshape(sums, (2, LANES // 2, BLOCK_N, BLOCK_B))
        low, high = tl.split(tl.permute(halves, (1, 2, 3, 0)))
        total = _add_lanes(low + high, LANES // 2, BLOCK_N, BLOCK_B)
    return total


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr,  # [num_rows, num_inputs], [num_outputs, num_inputs], [num_outputs] or None
    output_ptr,  # [num_rows, num_outputs]
    num_rows, num_outputs, num_inputs,
    EVEN: tl.constexpr,  # no tile hangs over the edge of the weight
    LANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all rows.

    The tensor cores get the weight as their left operand, so that a batch is padded to 8 and not to 16. A batched product
    puts one warp on each lane: the warps share K, not outputs, and 16 outputs are enough work for a program.
    """
    wait_for_previous(CHAINED)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_B)
    inner = tl.arange(0, LANES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # [LANES, BLOCK_K]
    weight_ptrs = weight_ptr + columns.to(tl.int64)[None, :, None] * num_inputs + inner[:, None, :]
    x_ptrs = x_ptr + rows[None, :, None] * num_inputs + inner[:, None, :]
    x_mask = (rows < num_rows)[None, :, None]
    sums = tl.zeros((LANES, BLOCK_N, BLOCK_B), tl.float32)
    for start in range(0, num_inputs, LANES * BLOCK_K):
        if EVEN:
            weight = tl.load(weight_ptrs + start)
            x = tl.load(x_ptrs + start, mask=x_mask, other=0.0)
        else:
            inside = (start + inner < num_inputs)[:, None, :]
            weight = tl.load(
                weight_ptrs + start, mask=inside & (columns < num_outputs)[None, :, None], other=0.0
            )
            x = tl.load(x_ptrs + start, mask=inside & x_mask, other=0.0)
        sums = tl.dot(weight, tl.permute(x, (0, 2, 1)), sums, input_precision="ieee")
    output = _add_lanes(sums, LANES, BLOCK_N, BLOCK_B)
    if bias_ptr is not None:
        output += tl.load(bias_ptr + columns, mask=columns < num_outputs, other=0.0).to(tl.float32)[:, None]
    output = output.to(x_ptr.dtype.element_ty).to(output_ptr.dtype.element_ty)
    mask = (columns < num_outputs)[:, None] & (rows < num_rows)[None, :]
    tl.store(output_ptr + rows[None, :] * num_outputs + columns[:, None], output, mask=mask)


def _tile(num_outputs: int, itemsize: int) -> tuple[int, int]:
    """BLOCK_N and BLOCK_K: small programs fill the GPU, larger ones of large layers spend less on their start."""
    block_n = 16 if num_outputs <= _WIDE_FROM else 32
    return block_n, _STEP_BYTES // (block_n * itemsize * _NUM_LANES)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x @ weight.T + bias, at the speed of reading the weight once.

    Args:
        x: [rows, num_inputs], at most MAX_ROWS rows. All tensors contiguous and of one dtype.
        weight: [num_outputs, num_inputs].
        bias: [num_outputs], added before the only rounding.
        out_dtype: what the result, already rounded to x's dtype, is stored as.
    Returns:
        [rows, num_outputs] of out_dtype, or of x's dtype.
    """
    (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
    assert num_rows <= MAX_ROWS and weight.is_contiguous() and x.is_contiguous()
    block_n, block_k = _tile(num_outputs, weight.itemsize)
    block_b = min(size for size in (8, 16, MAX_ROWS) if size >= num_rows)
    output = x.new_empty(num_rows, num_outputs, dtype=out_dtype or x.dtype)
    _linear_kernel[(triton.cdiv(num_outputs, block_n),)](
        x, weight, bias, output, num_rows, num_outputs, num_inputs,
        EVEN=num_outputs % block_n == 0 and num_inputs % (_NUM_LANES * block_k) == 0,
        LANES=_NUM_LANES, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_B=block_b,
        num_warps=_NUM_LANES,
        num_stages=4 if block_b == 8 else 3,  # so that an SM holds three programs, two of 32 rows
        **chained(x.device),
    )  # fmt: skip
    return output


@triton.jit  # type: ignore[untyped-decorator]
def _route_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, ids_ptr, weights_ptr,  # [rows, STRIDE], [rows, TOP_K] int32, [rows, TOP_K]
    STRIDE: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The experts of one row, taken one by one.

    A probability's bits sort like the number. Beside them in one integer, the complement of the id lets the lower of two
    equal experts win.
    """
    wait_for_previous(CHAINED)
    row = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    is_expert = experts < NUM_EXPERTS
    logits = tl.load(logits_ptr + row * STRIDE + experts, mask=is_expert, other=float("-inf")).to(tl.float32)
    exponentials = tl.exp(logits - tl.max(logits, axis=0))
    probabilities = tl.div_rn(exponentials, tl.sum(exponentials, axis=0))
    bits = probabilities.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # a NaN must not make a key negative
    keys = tl.where(is_expert, (bits.to(tl.int64) << 32) | (0x7FFFFFFF - experts).to(tl.int64), -1)
    ranks = tl.arange(0, BLOCK_K)
    chosen = tl.zeros((BLOCK_K,), tl.int64)
    for rank in tl.static_range(TOP_K):
        best = tl.max(keys, axis=0)
        chosen = tl.where(ranks == rank, best, chosen)
        keys = tl.where(keys == best, -1, keys)
    ids = 0x7FFFFFFF - (chosen & 0x7FFFFFFF).to(tl.int32)
    weights = (chosen >> 32).to(tl.int32).to(tl.float32, bitcast=True)  # 0 beyond TOP_K
    if RENORMALIZE:
        weights = tl.div_rn(weights, tl.sum(weights, axis=0))
    offsets = row * TOP_K + ranks
    tl.store(ids_ptr + offsets, ids, mask=ranks < TOP_K)
    tl.store(weights_ptr + offsets, weights.to(weights_ptr.dtype.element_ty), mask=ranks < TOP_K)


def route(
    logits: Tensor, num_experts: int, top_k: int, renormalize: bool, weights_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Choose each row's experts by the softmax of its logits, computed in fp32.

    Args:
        logits: [rows, num_experts or more], contiguous; columns from num_experts on are not looked at.
        renormalize: divide the chosen probabilities by their sum.
    Returns:
        ids: [rows, top_k] int32, most likely first; of equally likely experts the lowest first.
        weights: [rows, top_k] of weights_dtype.
    """
    rows, stride = logits.shape
    assert top_k <= num_experts <= stride and logits.is_contiguous()
    ids = logits.new_empty(rows, top_k, dtype=torch.int32)
    weights = logits.new_empty(rows, top_k, dtype=weights_dtype)
    _route_kernel[(rows,)](
        logits, ids, weights, STRIDE=stride, NUM_EXPERTS=num_experts, TOP_K=top_k, RENORMALIZE=renormalize,
        BLOCK_E=triton.next_power_of_2(num_experts), BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=1, **chained(logits.device),
    )  # fmt: skip
    return ids, weights
