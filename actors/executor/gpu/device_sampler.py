"""Chooses each row's next token on the GPU, inside a CUDA graph. Computes no log probabilities and keeps no state.

The library's rules: temperature, then top-k, then top-p. Thresholds are found by bisection over the ordered bits of a
float, not by sorting. A draw is a Gumbel maximum whose noise depends on seed, position and token id alone, so a row's
token depends on neither the batch, nor the row, nor the shape of the graph. Sums always run in the same order.
"""

import secrets

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.generation import SamplingParams

_COLDEST = 1e-5  # below, the differences between logits / temperature drown the noise: greedy
_CHUNK = 4096  # logits per program of the scan: at batch size 1, about 40 programs share a row
_BLOCK = 4096  # logits that the one program of a row reads at once
_CHOOSE_WARPS = 16
_GROUP = tl.constexpr(32)  # neighbouring logits of which the scan reports the maximum
_DRAW_BLOCK = 1024  # candidates are few and their noise is the dearest part
_LOG2_E = tl.constexpr(1.4426950408889634)


class RowSampling:
    """How every cache row samples, as device arrays that captured graphs read.

    `set` only enqueues kernels on the current stream, which must be the one that replays the graphs.
    """

    def __init__(self, num_rows: int, device: torch.device | str) -> None:
        self.temperature = torch.zeros(num_rows, dtype=torch.float32, device=device)  # 0: greedy
        self.top_p = torch.ones(num_rows, dtype=torch.float32, device=device)  # 1: off
        self.top_k = torch.zeros(num_rows, dtype=torch.int32, device=device)  # 0: off
        self.seed = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def set(self, row: int, params: SamplingParams) -> None:
        self.temperature[row].fill_(params.temperature if params.temperature >= _COLDEST else 0.0)
        self.top_p[row].fill_(params.top_p)
        self.top_k[row].fill_(min(params.top_k, 2**31 - 1))
        self.seed[row].fill_(secrets.randbits(63) if params.seed is None else params.seed)


def sample_tokens(logits: Tensor, rows: Tensor, positions: Tensor, sampling: RowSampling) -> Tensor:
    """One token per row of the batch, without waiting for the GPU.

    Args:
        logits: [batch, vocab] float32, contiguous.
        rows: [batch] int64, the cache row of each row of the batch.
        positions: [batch] int64 below 2**32, the position whose token is drawn.
    Returns:
        [batch] int64; -1 where the logits hold a NaN.
    """
    assert logits.is_contiguous() and logits.dtype == torch.float32
    batch, vocab = logits.shape
    vocab_p = max(triton.next_power_of_2(vocab), _GROUP.value)
    chunk = min(_CHUNK, vocab_p)
    num_chunks = triton.cdiv(vocab, chunk)
    best = logits.new_empty(batch, num_chunks)
    best_ids = rows.new_empty(batch, num_chunks, dtype=torch.int32)
    group_max = logits.new_empty(batch, num_chunks * chunk // _GROUP.value)
    candidates = torch.empty_like(logits)
    candidate_ids = torch.empty_like(logits, dtype=torch.int32)
    tokens = torch.empty_like(rows)
    params = (rows, positions, sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed)
    scan_kernel[(batch, num_chunks)](logits, *params, best, best_ids, group_max, vocab, chunk, num_warps=8)
    choose_kernel[(batch,)](
        logits, *params, best, best_ids, group_max, candidates, candidate_ids, tokens,
        vocab, chunk, triton.next_power_of_2(num_chunks), min(_BLOCK, vocab_p), min(_DRAW_BLOCK, vocab_p),
        num_warps=_CHOOSE_WARPS,
    )  # fmt: skip
    return tokens


@triton.jit
def _gumbel(seed, position, token_ids):  # type: ignore[no-untyped-def]
    """Standard Gumbel noise: -log(-log1p(-u)), whose likely winners are the small u, where floats are dense."""
    zeros = token_ids * 0
    bits, _, _, _ = tl.philox(seed, token_ids, zeros + position.to(tl.int32), zeros, zeros)
    u = tl.uint_to_uniform_float(bits) + 2.0**-32  # never 0
    series = u * (1.0 + u * (0.5 + u * (0.33333333 + u * 0.25)))
    return -tl.log(tl.where(u < 0.015625, series, -tl.log(1.0 - u)))


@triton.jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """The bits of a float as an integer of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _float_of(ordered):  # type: ignore[no-untyped-def]
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, peak, rate):  # type: ignore[no-untyped-def]
    """exp((x - peak) / temperature), also where both are infinite."""
    return tl.where(x < peak, tl.exp2((x - peak) * rate), 1.0)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_beyond(  # type: ignore[no-untyped-def]
    values_ptr, num, bound, peak, rate, inclusive: tl.constexpr, counting: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """The sum of the weights of the values above the bound, or their number (exact: fewer than 2**24)."""
    offsets = tl.arange(0, block)
    sums = tl.zeros((block,), tl.float32)
    for start in range(0, num, block):
        x = tl.load(values_ptr + start + offsets, mask=start + offsets < num, other=-float("inf"))
        is_beyond = x >= bound if inclusive else x > bound
        sums += tl.where(is_beyond, 1.0 if counting else _weight(x, peak, rate), 0.0)
    return tl.sum(sums, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _threshold(  # type: ignore[no-untyped-def]
    values_ptr, num, target, low, high, peak, rate, counting: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """The smallest float of [low, high] above which the values' weights sum to less than the target.

    Counting, with target k, that is the k-th largest value. `high` must fulfil the condition.
    """
    low = _ordered(low).to(tl.int64)
    high = _ordered(high).to(tl.int64)
    while low < high:
        middle = (low + high) >> 1
        bound = _float_of(middle.to(tl.int32))
        if _sum_beyond(values_ptr, num, bound, peak, rate, False, counting, block) < target:
            high = middle
        else:
            low = middle + 1
    return _float_of(low.to(tl.int32))


@triton.jit  # type: ignore[untyped-decorator]
def _collect(  # type: ignore[no-untyped-def]
    row_ptr, cut, peak, rate, values_ptr, ids_ptr, vocab: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """List the logits of at least `cut` in the order of their ids. Returns their number and the whole row's weight."""
    offsets = tl.arange(0, block)
    sums = tl.zeros((block,), tl.float32)
    num = 0
    for start in range(0, vocab, block):
        ids = start + offsets
        x = tl.load(row_ptr + start + offsets, mask=ids < vocab, other=-float("inf"))
        is_listed = (x >= cut) & (ids < vocab)
        sums += _weight(x, peak, rate)
        places = num + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
        tl.store(values_ptr + places, x, mask=is_listed)
        tl.store(ids_ptr + places, ids, mask=is_listed)
        num += tl.sum(is_listed.to(tl.int32), axis=0)
    tl.debug_barrier()  # other threads of this program read the list
    return num, tl.sum(sums, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _draw(values_ptr, ids_ptr, num, threshold, temperature, seed, position, block: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, block)
    best = tl.full((block,), -float("inf"), tl.float32)
    best_ids = tl.zeros((block,), tl.int32)
    for start in range(0, num, block):
        mask = start + offsets < num
        x = tl.load(values_ptr + start + offsets, mask=mask, other=-float("inf"))
        ids = tl.load(ids_ptr + start + offsets, mask=mask, other=0)
        scaled = tl.div_rn(x, temperature)  # rounded like the library's, which compares after dividing
        is_kept = mask & (scaled >= tl.div_rn(threshold, temperature))
        scores = tl.where(is_kept, scaled + _gumbel(seed, position, ids), -float("inf"))
        best_ids = tl.where(scores > best, ids, best_ids)
        best = tl.maximum(best, scores)
    return tl.min(tl.where(best == tl.max(best, axis=0), best_ids, 0x7FFFFFFF), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _cut(  # type: ignore[no-untyped-def]
    row_ptr, group_max_ptr, values_ptr, ids_ptr, peak, temperature, top_p, top_k,
    vocab: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """List what may be drawn. Returns the length of the list and the lowest logit that top-k and top-p keep.

    Bisecting a whole row reads it up to 32 times per threshold. So it first lists the logits that reach the median of
    the groups' maxima, typically a fortieth of the row, and bisects those, unless they hold too little.
    """
    lowest = tl.full((), -float("inf"), tl.float32)
    num_groups: tl.constexpr = (vocab + _GROUP - 1) // _GROUP
    rate = _LOG2_E / temperature
    # So many groups, and therefore logits, reach the cut: no fewer than top_k.
    num_sought = tl.maximum(top_k, (num_groups + 1) // 2)
    cut = lowest
    if num_sought <= num_groups:
        cut = _threshold(group_max_ptr, num_groups, num_sought, lowest, peak, peak, rate, True, block)
    num, total, is_short = 0, 0.0, True
    while is_short:
        num, total = _collect(row_ptr, cut, peak, rate, values_ptr, ids_ptr, vocab, block)
        listed = _sum_beyond(values_ptr, num, cut, peak, rate, True, False, block)
        is_short = (top_k == 0) & (cut > lowest) & (listed < top_p * total)
        cut = tl.where(is_short, lowest, cut)
    threshold = cut
    if top_k > 0:
        threshold = _threshold(values_ptr, num, top_k, cut, peak, peak, rate, True, block)
        total = _sum_beyond(values_ptr, num, threshold, peak, rate, True, False, block)
    if top_p < 1:
        threshold = _threshold(values_ptr, num, top_p * total, threshold, peak, peak, rate, False, block)
    return num, threshold


@triton.jit  # type: ignore[untyped-decorator]
def scan_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [batch, vocab] float32
    rows_ptr, positions_ptr,  # int64 [batch]
    temperature_ptr, top_p_ptr, top_k_ptr, seed_ptr,  # [cache rows]
    best_ptr, best_ids_ptr,  # [batch, chunks] float32 and int32: the highest score; a negative id says NaN
    group_max_ptr,  # [batch, chunks * groups per chunk] float32
    vocab: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Every chunk's best token, noise included where nothing is cut off, and the maxima of its groups."""
    batch = tl.program_id(0)
    place = batch * tl.num_programs(1) + tl.program_id(1)
    row = tl.load(rows_ptr + batch)
    temperature = tl.load(temperature_ptr + row)
    is_cut = (tl.load(top_k_ptr + row) > 0) | (tl.load(top_p_ptr + row) < 1)
    ids = tl.program_id(1) * chunk + tl.arange(0, chunk)
    x = tl.load(logits_ptr + batch.to(tl.int64) * vocab + ids, mask=ids < vocab, other=-float("inf"))
    has_nan = tl.max((x != x).to(tl.int32), axis=0) > 0
    scores = x
    if temperature > 0:
        if is_cut:
            groups: tl.constexpr = chunk // _GROUP
            maxima = tl.max(tl.reshape(x, [groups, _GROUP]), axis=1)
            tl.store(group_max_ptr + place * groups + tl.arange(0, groups), maxima)
        else:
            noise = _gumbel(tl.load(seed_ptr + row), tl.load(positions_ptr + batch), ids)
            scores = tl.div_rn(x, temperature) + noise
    best, index = tl.max(scores, axis=0, return_indices=True)
    tl.store(best_ptr + place, best)
    tl.store(best_ids_ptr + place, tl.where(has_nan, -1, tl.program_id(1) * chunk + index))


@triton.jit  # type: ignore[untyped-decorator]
def choose_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, rows_ptr, positions_ptr, temperature_ptr, top_p_ptr, top_k_ptr, seed_ptr,
    best_ptr, best_ids_ptr, group_max_ptr,  # as the scan left them; the scores of a cut row are its logits
    candidates_ptr, candidate_ids_ptr,  # [batch, vocab] float32 and int32: room to work in
    tokens_ptr,  # int64 [batch]
    vocab: tl.constexpr, chunk: tl.constexpr, chunks_p: tl.constexpr,
    block: tl.constexpr, draw_block: tl.constexpr,
):  # fmt: skip
    """A row's token: the best of its chunks or, where top-k or top-p cut it, a draw from what they keep."""
    batch = tl.program_id(0)
    num_chunks: tl.constexpr = (vocab + chunk - 1) // chunk
    row = tl.load(rows_ptr + batch)
    temperature = tl.load(temperature_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    top_k = tl.minimum(tl.load(top_k_ptr + row), vocab)
    chunks = tl.arange(0, chunks_p)
    best = tl.load(best_ptr + batch * num_chunks + chunks, mask=chunks < num_chunks, other=-float("inf"))
    ids = tl.load(best_ids_ptr + batch * num_chunks + chunks, mask=chunks < num_chunks, other=vocab)
    peak = tl.max(best, axis=0)
    is_broken = tl.min(ids, axis=0) < 0
    if is_broken | (temperature == 0) | ((top_k == 0) & (top_p >= 1)):
        token = tl.min(tl.where(best == peak, ids, vocab), axis=0)
        tl.store(tokens_ptr + batch, tl.where(is_broken, -1, token))
        return
    line = batch.to(tl.int64) * vocab
    num, threshold = _cut(
        logits_ptr + line, group_max_ptr + batch * num_chunks * (chunk // _GROUP),
        candidates_ptr + line, candidate_ids_ptr + line, peak, temperature, top_p, top_k, vocab, block,
    )  # fmt: skip
    token = _draw(
        candidates_ptr + line, candidate_ids_ptr + line, num, threshold, temperature,
        tl.load(seed_ptr + row), tl.load(positions_ptr + batch), draw_block,
    )  # fmt: skip
    tl.store(tokens_ptr + batch, token)
