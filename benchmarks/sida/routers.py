"""What keeps routers balanced in training, and how balanced they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def balance_loss(logits: Sequence[Tensor]) -> Tensor:
    """Load balancing (arXiv 2101.03961, equation 4), summed over layers.

    Queues work alone: nothing waits for the device.

    Args:
        logits: [tokens, experts] of each layer, no token of which is padding.
    """
    losses = []
    for of_layer in logits:
        num_tokens, num_experts = of_layer.shape
        shares = of_layer.new_full((num_tokens,), 1 / num_tokens)
        chosen = of_layer.new_zeros(num_experts).index_add(0, of_layer.argmax(-1), shares)
        losses.append(num_experts * (chosen * of_layer.softmax(-1).mean(0)).sum())
    return torch.stack(losses).sum()


@dataclass(frozen=True)
class Skew:
    """How evenly the experts of each layer are used: what a hit rate is worth depends on it."""

    entropy: list[float]  # [layers], 1 where all experts are used alike, 0 where all tokens go to one
    busiest_share: list[float]  # [layers], of tokens
    top_probability: list[float]  # [layers], the routers' mean of their first choice
    experts_per_text: float  # distinct ones in a layer, mean


class SkewCounter:
    def __init__(self) -> None:
        self._counts: list[Tensor] = []  # per layer [experts]
        self._probabilities: list[float] = []
        self._tokens = 0
        self._distinct: list[float] = []  # per batch, weighted by its texts
        self._texts = 0

    def add(self, logits: Sequence[Tensor], mask: Tensor) -> None:
        """
        Args:
            logits: [texts * tokens, experts] of each layer.
            mask: [texts, tokens] bool.
        """
        for layer, of_layer in enumerate(logits):
            if layer == len(self._counts):
                self._counts.append(torch.zeros(of_layer.shape[-1]))
                self._probabilities.append(0.0)
            chosen = of_layer.argmax(-1).view(mask.shape)
            self._counts[layer] += chosen[mask].bincount(minlength=of_layer.shape[-1]).cpu()
            self._probabilities[layer] += float(of_layer.softmax(-1).amax(-1)[mask.flatten()].sum())
            used = torch.zeros(len(mask), of_layer.shape[-1], device=mask.device)
            used.scatter_add_(1, chosen, mask.float())
            self._distinct.append(float((used > 0).sum()) / len(logits))
        self._tokens += int(mask.sum())
        self._texts += len(mask)

    def skew(self) -> Skew:
        shares = [counts / counts.sum() for counts in self._counts]
        return Skew(
            [_entropy(share) for share in shares],
            [round(float(share.max()), 4) for share in shares],
            [round(total / self._tokens, 4) for total in self._probabilities],
            round(sum(self._distinct) / self._texts, 2),
        )


def _entropy(shares: Tensor) -> float:
    used = shares[shares > 0]
    return round(float(-(used * used.log()).sum() / torch.tensor(len(shares)).log()), 4)
