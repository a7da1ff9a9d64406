"""What a prediction must beat: naming the experts that were most frequent in training, per layer or per token id."""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from actors.predictor.traces import TraceBatch, TraceHeader, TraceSource

MAX_BATCHES = 100  # of training data to count


def score_baselines(
    source: TraceSource, held_out: Sequence[TraceBatch], batch_size: int = 64
) -> dict[str, list[float]]:
    """Held-out recall of the true top k, [layers] for each baseline; padding does not count.

    Returns:
        "layer": a layer's most frequent experts. "token": those of the token id, whatever came before it.
    """
    header = source.header
    batches = source.batches(batch_size, torch.Generator().manual_seed(0))
    per_token = _count(header, list(islice(batches, MAX_BATCHES)), held_out)  # [vocab, layers, experts]
    per_layer = per_token.sum(0, keepdim=True)
    # A token id never seen in training falls back to its layer.
    named_by_token = (per_token + per_layer / per_layer.sum()).topk(header.top_k).indices
    named_by_layer = per_layer.topk(header.top_k).indices.expand_as(named_by_token)
    return {"layer": _recall(named_by_layer, held_out), "token": _recall(named_by_token, held_out)}


def _count(header: TraceHeader, batches: Sequence[TraceBatch], held_out: Sequence[TraceBatch]) -> Tensor:
    vocab = 1 + max(int(batch.token_ids.max()) for batch in (*batches, *held_out))
    counts = torch.zeros(vocab, header.num_layers, header.num_experts, device=batches[0].expert_ids.device)
    for batch in batches:
        tokens, true = _true(batch, header.top_k)
        hot = torch.zeros(len(tokens), header.num_layers, header.num_experts, device=counts.device)
        counts.index_add_(0, tokens, hot.scatter_(-1, true, 1.0))
    return counts


def _recall(named: Tensor, held_out: Sequence[TraceBatch]) -> list[float]:
    """Args: named, [vocab, layers, top_k]."""
    found, total = torch.zeros(named.shape[1], device=named.device), 0
    for batch in held_out:
        tokens, true = _true(batch, named.shape[-1])
        found += (true.unsqueeze(-1) == named[tokens].unsqueeze(-2)).any(-1).sum((0, 2))
        total += len(tokens) * named.shape[-1]
    recall: list[float] = (found / total).tolist()
    return recall


def _true(batch: TraceBatch, top_k: int) -> tuple[Tensor, Tensor]:
    """Token ids [tokens] and the routers' choice [tokens, layers, top_k], without padding."""
    mask = batch.mask.to(batch.expert_ids.device)
    return batch.token_ids.to(mask.device)[mask], batch.expert_ids[mask][..., :top_k]
