"""SparseMax against the definition: the sorted form of the paper, its gradient, and the simplex."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from actors.predictor.sparsemax import sparsemax


def reference(scores: list[float]) -> list[float]:
    """Algorithm 1 of arXiv 1602.02068, on one row."""
    finite = sorted((score for score in scores if score > -float("inf")), reverse=True)
    size = max(k for k in range(1, len(finite) + 1) if 1 + k * finite[k - 1] > sum(finite[:k]))
    threshold = (sum(finite[:size]) - 1) / size
    return [max(0.0, score - threshold) for score in scores]


def rows(*shape: int, spread: float, seed: int = 0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 100.0])
def test_equals_the_papers_sorted_form(spread: float) -> None:
    scores = rows(7, 50, spread=spread)
    expected = torch.tensor([reference(row) for row in scores.tolist()], dtype=torch.float64)
    torch.testing.assert_close(sparsemax(scores), expected, rtol=0, atol=1e-12)


def test_excluded_entries_get_nothing() -> None:
    scores = rows(5, 20, spread=1.0).masked_fill(torch.rand(5, 20) < 0.5, -torch.inf)
    scores[:, 3] = 0.3
    expected = torch.tensor([reference(row) for row in scores.tolist()], dtype=torch.float64)
    torch.testing.assert_close(sparsemax(scores), expected, rtol=0, atol=1e-12)


@settings(deadline=None)  # shared machines stall
@given(
    arrays(
        "float32", array_shapes(min_dims=1, max_dims=3, max_side=12), elements=st.floats(-1e4, 1e4, width=32)
    )
)
def test_every_row_lies_on_the_simplex(scores: object) -> None:
    projected = sparsemax(torch.tensor(scores))
    assert bool((projected >= 0).all())
    torch.testing.assert_close(projected.sum(-1), torch.ones(projected.shape[:-1]), rtol=0, atol=1e-5)


def test_gives_true_zeros_where_softmax_does_not() -> None:
    assert sparsemax(torch.tensor([2.0, 0.0, 1.5])).tolist() == [0.75, 0.0, 0.25]


def test_gradient_is_that_of_finite_differences() -> None:
    scores = rows(4, 9, spread=0.7, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(sparsemax, (scores,))
