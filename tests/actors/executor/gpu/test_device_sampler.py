"""The GPU sampler against the library's logits processors and the noise's distribution."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.executor.gpu import device_sampler
from actors.executor.gpu.device_sampler import RowSampling, sample_tokens
from actors.executor.sampler import _warpers
from common.generation import SamplingParams

_gumbel = device_sampler._gumbel


@triton.jit
def _noise_kernel(noise_ptr, seed, first, num, vocab, BLOCK: tl.constexpr):  # noqa: N803
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    noise = _gumbel(tl.zeros((), tl.int64) + seed, (first + places // vocab).to(tl.int64), places % vocab)
    tl.store(noise_ptr + places, noise, mask=places < num)


def noise(seed: int, first: int, num_positions: int, vocab: int, device: str) -> Tensor:
    """[positions, vocab]: the sampler's own noise."""
    out = torch.empty(num_positions, vocab, device=device)
    _noise_kernel[(triton.cdiv(out.numel(), 4096),)](out, seed, first, out.numel(), vocab, BLOCK=4096)
    return out


def params(**given_params: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 11, **given_params})


def draw(
    logits: Tensor, all_params: list[SamplingParams], positions: list[int], rows: list[int]
) -> list[int]:
    sampling = RowSampling(16, logits.device)
    for row, row_params in zip(rows, all_params, strict=True):
        sampling.set(row, row_params)
    device = logits.device
    tokens = sample_tokens(
        logits, torch.tensor(rows, device=device), torch.tensor(positions, device=device), sampling
    )
    assert tokens.dtype == torch.int64
    return tokens.tolist()


def draw_at(logits: Tensor, row_params: SamplingParams, positions: range) -> list[int]:
    """One row of logits at many positions."""
    sampling = RowSampling(1, logits.device)
    sampling.set(0, row_params)
    at = torch.tensor(positions, device=logits.device)
    repeated = logits.expand(len(positions), -1).contiguous()
    return sample_tokens(repeated, torch.zeros_like(at), at, sampling).tolist()


def kept(logits: Tensor, row_params: SamplingParams) -> Tensor:
    """[vocab] bool: what the library's processors keep, and what ties with the least of it."""
    logits = logits.cpu()
    scores = _warpers(row_params)(torch.empty(1, 0, dtype=torch.int64), logits[None].clone())[0]
    scaled = logits / row_params.temperature
    return scaled >= scaled[scores > -torch.inf].min()


def expected(logits: Tensor, row_params: SamplingParams, position: int) -> set[int]:
    """The library's processors and the sampler's noise; two tokens where the sums' rounding may decide."""
    [gumbel] = noise(row_params.seed or 0, position, 1, len(logits), str(logits.device)).cpu()
    tokens = set()
    for shift in (-1e-5, 1e-5) if row_params.top_p < 1 else (0.0,):
        shifted = SamplingParams(
            temperature=row_params.temperature, top_k=row_params.top_k, top_p=row_params.top_p + shift
        )
        scores = (logits.cpu() / row_params.temperature + gumbel).where(kept(logits, shifted), -torch.inf)
        tokens.add(int(scores.argmax()))
    return tokens


def normal_logits(vocab: int, spread: float, seed: int, device: str) -> Tensor:
    return (torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread).to(device)


@pytest.mark.parametrize("vocab", [1, 50, 5000])
def test_greedy_takes_the_first_maximum(device: str, vocab: int) -> None:
    logits = normal_logits(4 * vocab, 1.0, 0, device).view(4, vocab)
    logits[1, vocab // 3 :: 3] = 9.0  # ties within chunks and between them
    logits[2] = -torch.inf
    logits[3, vocab // 2] = torch.inf
    tokens = draw(logits, [params(temperature=0.0, top_p=0.5)] * 4, [0, 1, 2, 3], [3, 2, 1, 0])
    assert tokens == [int(logits[0].argmax()), vocab // 3, 0, vocab // 2]


def test_a_row_with_a_nan_is_broken_alone(device: str) -> None:
    logits = normal_logits(6 * 5000, 1.0, 1, device).view(6, 5000)
    all_params = [params(temperature=0.0), params(temperature=1.0), params(temperature=1.0, top_k=3)] * 2
    whole = draw(logits, all_params, [5] * 6, [0, 1, 2, 3, 4, 5])
    assert -1 not in whole
    for row, column in ((0, 4999), (1, 0), (2, 77)):
        logits[row, column] = torch.nan
    assert draw(logits, all_params, [5] * 6, [0, 1, 2, 3, 4, 5]) == [-1, -1, -1, *whole[3:]]


def test_top_k_of_one_is_greedy(device: str) -> None:
    logits = normal_logits(120, 0.1, 2, device)
    assert draw_at(logits, params(temperature=2.0, top_k=1), range(2)) == [int(logits.argmax())] * 2


def test_a_tiny_top_p_keeps_one_token(device: str) -> None:
    logits = normal_logits(120, 0.1, 2, device)
    assert draw_at(logits, params(temperature=2.0, top_p=1e-6), range(2)) == [int(logits.argmax())] * 2


@given(
    seed=st.integers(0, 2**31),
    vocab=st.integers(2, 300),
    spread=st.floats(0.0, 5.0),
    has_ties=st.booleans(),
    temperature=st.floats(0.1, 2.0),
    top_k=st.just(0) | st.integers(1, 310),
    top_p=st.floats(0.01, 0.999) | st.just(1.0),
)
@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_draws_from_what_the_library_keeps(
    device: str,
    seed: int,
    vocab: int,
    spread: float,
    has_ties: bool,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    logits = normal_logits(vocab, spread, seed, device)
    logits = (2 * logits).round() / 2 if has_ties else logits
    row_params = params(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
    [token] = draw_at(logits, row_params, range(1))
    assert token in expected(logits, row_params, 0)


@pytest.mark.parametrize(
    ("spread", "cut"),
    [
        (3.0, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}),  # the list of candidates suffices
        (3.0, {"temperature": 1.0, "top_p": 0.8}),
        (0.3, {"temperature": 1.0, "top_p": 0.97}),  # it does not
        (1.0, {"temperature": 1.5, "top_k": 200}),  # more than there are groups
        (1.0, {"temperature": 1.5, "top_k": 2**40, "top_p": 0.5}),
        (1.0, {"temperature": 1.0}),
    ],
)
def test_several_chunks_are_cut_as_one(device: str, spread: float, cut: dict[str, float]) -> None:
    logits = normal_logits(5000, spread, 3, device)
    [token] = draw_at(logits, params(**cut), range(9, 10))
    clamped = params(**{**cut, "top_k": min(int(cut.get("top_k", 0)), 5000)})
    assert token in expected(logits, clamped, 9)


def test_every_likely_token_that_is_kept_appears(device: str) -> None:
    logits = normal_logits(40, 0.2, 4, device)
    row_params = params(temperature=0.9, top_k=5, top_p=0.5)
    [support] = kept(logits, row_params).nonzero(as_tuple=True)
    assert len(support) == 3
    assert set(draw_at(logits, row_params, range(14))) == set(support.tolist())


def test_excluded_tokens_are_never_drawn(device: str) -> None:
    logits = torch.full((100,), -torch.inf, device=device)
    logits[[7, 70]] = 0.0
    for cut in ({}, {"top_k": 5}, {"top_p": 0.9}):
        assert set(draw_at(logits, params(temperature=1.0, **cut), range(6))) == {7, 70}


def test_frequencies_are_the_probabilities(device: str) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, 1.5, 0.5, -2.0], device=device)
    num = 2048
    tokens = (logits / 0.8 + noise(11, 0, num, 8, device)).argmax(dim=-1)
    assert draw_at(logits, params(temperature=0.8), range(60)) == tokens[:60].tolist()
    counts = tokens.bincount(minlength=8).cpu().double()
    means = num * (logits.cpu().double() / 0.8).softmax(dim=-1)
    chi_square = float(((counts - means) ** 2 / means).sum())
    assert chi_square < 18.5  # 99th percentile at 7 degrees of freedom


@pytest.mark.parametrize("by_token", [True, False])
def test_noise_is_gumbel_over_tokens_and_over_positions(device: str, by_token: bool) -> None:
    num = 4096
    values = noise(5, 3, 1, num, device) if by_token else noise(5, 3, num, 1, device)
    uniform = torch.exp(-torch.exp(-values.double().cpu().flatten())).sort().values
    distance = (uniform - (torch.arange(num) + 0.5) / num).abs().max()
    assert float(distance) < 1.63 / num**0.5  # Kolmogorov and Smirnov, 99 %


def test_a_draw_depends_on_neither_batch_nor_row(device: str) -> None:
    logits = normal_logits(5 * 300, 1.0, 6, device).view(5, 300)
    all_params = [
        params(temperature=1.0, seed=-(2**63)),
        params(temperature=0.0),
        params(temperature=1.0, top_k=20, seed=2**63 - 1),
        params(temperature=1.2, top_p=0.9),
        params(temperature=0.7, seed=3),
    ]
    positions = [1, 2, 30_000, 2**31 + 5, 5]
    batch = draw(logits, all_params, positions, [0, 1, 2, 3, 4])
    order = [3, 0, 4, 2]
    shuffled = draw(
        logits[order], [all_params[i] for i in order], [positions[i] for i in order], [9, 8, 2, 5]
    )
    assert shuffled == [batch[i] for i in order]
    alone = [draw(logits[i : i + 1], all_params[i : i + 1], positions[i : i + 1], [7]) for i in range(5)]
    assert alone == [[token] for token in batch]


def test_seeds_and_positions_give_other_draws(device: str) -> None:
    logits = torch.zeros(300, device=device)
    first = draw_at(logits, params(temperature=1.0, seed=1), range(12))
    assert len(set(first)) > 6
    for seed in (2, 1 + 2**32, None):
        other = draw_at(logits, params(temperature=1.0, seed=seed), range(12))
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 3


def test_a_row_set_again_forgets_what_it_was(device: str) -> None:
    sampling = RowSampling(3, device)
    sampling.set(1, SamplingParams(temperature=1.0, top_p=0.5, top_k=2**40, seed=-3))
    assert (sampling.top_k[1], sampling.seed[1], sampling.top_p[1]) == (2**31 - 1, -3, 0.5)
    sampling.set(1, SamplingParams(temperature=1e-9, seed=4))
    assert sampling.temperature.tolist() == [0, 0, 0]
    assert sampling.top_p.tolist() == [1, 1, 1]
    assert sampling.top_k.tolist() == [0, 0, 0]
    assert sampling.seed.tolist() == [0, 4, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_follows_its_inputs() -> None:
    logits = normal_logits(3 * 151_936, 2.0, 8, "cuda").view(3, -1)
    rows, positions = torch.arange(3, device="cuda"), torch.arange(3, device="cuda")
    sampling = RowSampling(3, "cuda")
    sample_tokens(logits, rows, positions, sampling)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample_tokens(logits, rows, positions, sampling)
    for cut in ({}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.999}):
        sampling.set(1, params(temperature=1.0, **cut))
        positions += 1
        graph.replay()
        assert tokens.tolist() == sample_tokens(logits, rows, positions, sampling).tolist()
        assert tokens[[0, 2]].tolist() == logits[[0, 2]].argmax(dim=-1).tolist()
        assert int(tokens[1]) in expected(logits[1], params(temperature=1.0, **cut), int(positions[1]))
