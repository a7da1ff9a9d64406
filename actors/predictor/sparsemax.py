"""SparseMax (Martins and Astudillo, arXiv 1602.02068): the projection onto the simplex, a softmax with true zeros."""

from typing import Any

import torch
from torch import Tensor


def sparsemax(scores: Tensor) -> Tensor:
    """Rows of the last dimension sum to 1; small scores become exactly 0. Differentiable (their section 2.5).

    Args:
        scores: [..., n]; -inf excludes an entry, at least one of each row is finite.
    """
    projected: Tensor = _SparseMax.apply(scores)  # type: ignore[no-untyped-call]
    return projected


class _SparseMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        scores = scores - scores.amax(-1, keepdim=True)  # the same projection, and exact for large scores
        projected = (scores - _threshold(scores)).clamp_(min=0)
        ctx.save_for_backward(projected > 0)
        return projected

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The Jacobian is the centring matrix of the support (their equation 12)."""
        (support,) = ctx.saved_tensors
        inside = gradients[0] * support
        mean = inside.sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        gradient: Tensor = (inside - mean) * support
        return gradient


def _threshold(scores: Tensor) -> Tensor:
    """The tau of their equation 4, [..., 1], of scores whose largest is 0, without sorting (Michelot 1986).

    The support lies among the scores less than 1 below the largest; dropping those that are under the threshold of
    the rest only ever shrinks the set, so it ends, after a handful of rounds, at the exact support.
    """
    support = scores > -1
    while True:
        total = torch.where(support, scores, 0).sum(-1, keepdim=True)
        threshold = (total - 1) / support.sum(-1, keepdim=True)
        remaining = support & (scores > threshold)
        if torch.equal(remaining, support):
            return threshold
        support = remaining
