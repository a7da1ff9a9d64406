"""Forwards whose experts a hash function chooses, and what they are worth beside the routers' own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.predictor.library_routing import intercepted_routing
from actors.predictor.network import HashFunction
from actors.predictor.traces import TraceBatch
from actors.predictor.tracing import decoder_inputs
from actors.predictor.training import recall_per_layer
from benchmarks.sida.batches import Batch, batches
from benchmarks.sida.corruption import Corrupted
from benchmarks.sida.data.build import TaskPart
from benchmarks.sida.hash_functions import naming

NAMED = (1, 3)  # experts per token


@dataclass(frozen=True)
class Answers:
    """A classifier's on one part, in an order that is the same each time."""

    logits: Tensor  # [examples, 2] float32 on the CPU
    labels: Tensor  # [examples]

    @property
    def accuracy(self) -> float:
        return float((self.logits.argmax(-1) == self.labels).float().mean())

    def agreement(self, other: "Answers") -> float:
        return float((self.logits.argmax(-1) == other.logits.argmax(-1)).float().mean())


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    part: TaskPart,
    batch_tokens: int,
    routing: Callable[[Batch], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Answers:
    """Args: routing: a context for the forward over a batch."""
    logits, labels = [], []
    for batch in batches(part, batch_tokens, model.device):
        with routing(batch):
            output = model(input_ids=batch.ids, attention_mask=batch.mask.long())
        logits.append(output.logits.float().cpu())
        labels.append(batch.labels.cpu())
    return Answers(torch.cat(logits), torch.cat(labels))


def routed_batch(
    model: PreTrainedModel, batch: Batch, function: HashFunction, num_named: int
) -> AbstractContextManager[None]:
    """By what a hash function names of each token, weights included (SiDA-MoE, algorithm 1)."""
    return routed([_table(function, batch.ids, batch.mask, num_named)], model)


def routed_at_random(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Any expert for each token, the same ones each time, with the weight that the router gives its own choice."""

    def intercept(layer: int, ids: Tensor, weights: Tensor) -> _Table:
        generator = torch.Generator(ids.device).manual_seed(layer)
        num_experts = model.config.num_experts
        return torch.randint(num_experts, ids.shape, generator=generator, device=ids.device), weights

    return intercepted_routing(model, intercept)


def routed_text(
    model: PreTrainedModel,
    batch: Corrupted,
    encoder: HashFunction,
    decoder: HashFunction | None,
    num_named: int,
) -> AbstractContextManager[None]:
    """A context for the forward over a batch: the encoder is routed by its hash function, and the decoder if it has one."""
    tables = [_table(encoder, batch.inputs, torch.ones_like(batch.inputs, dtype=torch.bool), num_named)]
    if decoder is not None:
        ids = decoder_inputs(model, batch.labels)
        tables.append(_table(decoder, ids, torch.ones_like(ids, dtype=torch.bool), num_named))
    return routed(tables, model)


_Table = tuple[Tensor, Tensor]  # ids and weights, [layers, tokens, named] each


def routed(tables: Sequence[_Table], model: PreTrainedModel) -> AbstractContextManager[None]:
    """The first layers by the first table, the following ones by the next; those behind the last decide by themselves."""
    by_layer = [layer for ids, weights in tables for layer in zip(ids, weights, strict=True)]

    def intercept(layer: int, ids: Tensor, weights: Tensor) -> _Table:
        if layer >= len(by_layer):
            return ids, weights
        named, factors = by_layer[layer]
        return named, factors.half().to(weights.dtype)  # through float16, as tables travel

    return intercepted_routing(model, intercept)


def _table(function: HashFunction, ids: Tensor, mask: Tensor, num_named: int) -> _Table:
    named, weights = naming(function, num_named).route(function(ids, mask))  # [texts, tokens, layers, named]
    return tuple(part.permute(2, 0, 1, 3).flatten(1, 2) for part in (named, weights))  # type: ignore[return-value]


@torch.no_grad()
def token_hit_rate(
    train: Sequence[TraceBatch], test: Sequence[TraceBatch], num_experts: int, vocab_size: int, num_named: int
) -> float:
    """What naming the experts that were most frequent for a token id in training hits; mean over layers."""
    num_layers = train[0].expert_ids.shape[2]
    counts = torch.zeros(num_layers, vocab_size * num_experts)
    for batch in train:
        tokens, chosen = _chosen(batch)
        counts.scatter_add_(1, tokens * num_experts + chosen, torch.ones_like(chosen, dtype=counts.dtype))
    table = counts.view(num_layers, vocab_size, num_experts)
    named = (table + 1e-3 * table.mean(1, keepdim=True)).topk(num_named).indices  # [layers, vocab, named]
    found = total = 0
    for batch in test:
        tokens, chosen = _chosen(batch)
        hits = named.gather(1, tokens[..., None].expand(-1, -1, num_named)) == chosen[..., None]
        found, total = found + int(hits.any(-1).sum()), total + chosen.numel()
    return found / total


def _chosen(batch: TraceBatch) -> tuple[Tensor, Tensor]:
    """Token ids and the first expert, [layers, tokens] int64 on the CPU, without padding."""
    mask = batch.mask.cpu()
    chosen = batch.expert_ids.cpu()[mask][..., 0].T
    return batch.token_ids.cpu()[mask].expand(len(chosen), -1), chosen


def hit_rates(function: HashFunction, test: Sequence[TraceBatch]) -> dict[str, Any]:
    """`top_1` and `top_3`, means over layers, and the latter by layer."""
    by_layer = {count: recall_per_layer(function, test, num_named=count) for count in NAMED}
    means = {f"top_{count}": round(sum(rates) / len(rates), 4) for count, rates in by_layer.items()}
    return {**means, "top_3_by_layer": [round(rate, 4) for rate in by_layer[3]]}
