"""What a prediction must beat: naming the experts that were most frequent in training, per layer or per token id."""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from actors.predictor.traces import TraceBatch, TraceHeader, TraceSource

Routed = tuple[
    Tensor, Tensor
]  # token ids [tokens] and the routers' choice [tokens, layers, top_k], without padding


class FrequentExperts:
    """Counts of the experts that were used in training."""

    def __init__(
        self,
        source: TraceSource,
        held_out: Sequence[TraceBatch],
        batch_size: int = 64,
        num_batches: int = 100,
    ) -> None:
        """Args: num_batches: of training data to count."""
        batches = islice(source.batches(batch_size, torch.Generator().manual_seed(0)), num_batches)
        seen = [_routed(batch) for batch in batches]
        self._top_k = source.header.top_k
        self._held_out = [_routed(batch) for batch in held_out]
        vocab = 1 + max(int(tokens.max()) for tokens, _ in (*seen, *self._held_out))
        counts = _count(source.header, seen, vocab)
        self._per_layer = counts.sum(0, keepdim=True)
        # A token id never seen in training falls back to its layer.
        self._per_token = counts + self._per_layer / self._per_layer.sum()

    def recall(self, num_named: int | None = None) -> dict[str, list[float]]:
        """Held-out recall of the true top k, [layers] for each baseline; padding does not count.

        Args:
            num_named: experts that are named, by default k.
        Returns:
            "layer": a layer's most frequent experts. "token": those of the token id, whatever came before it.
        """
        by_token = self._per_token.topk(num_named or self._top_k).indices
        by_layer = self._per_layer.topk(num_named or self._top_k).indices.expand_as(by_token)
        return {"layer": _recall(by_layer, self._held_out), "token": _recall(by_token, self._held_out)}


def _routed(batch: TraceBatch) -> Routed:
    mask = batch.mask.to(batch.expert_ids.device)
    return batch.token_ids.to(mask.device)[mask], batch.expert_ids[mask]


def _count(header: TraceHeader, seen: Sequence[Routed], vocab: int) -> Tensor:
    """[vocab, layers, experts] float32."""
    counts = torch.zeros(vocab, header.num_layers, header.num_experts, device=seen[0][0].device)
    for tokens, true in seen:
        hot = torch.zeros(len(tokens), header.num_layers, header.num_experts, device=counts.device)
        counts.index_add_(0, tokens, hot.scatter_(-1, true, 1.0))
    return counts


def _recall(named: Tensor, held_out: Sequence[Routed]) -> list[float]:
    """Args: named, [vocab, layers, named]."""
    found, total = torch.zeros(named.shape[1], device=named.device), 0
    for tokens, true in held_out:
        found += (true.unsqueeze(-1) == named[tokens].unsqueeze(-2)).any(-1).sum((0, 2))
        total += len(tokens) * true.shape[-1]
    recall: list[float] = (found / total).tolist()
    return recall
