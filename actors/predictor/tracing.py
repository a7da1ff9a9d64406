"""Runs an all-resident library model over text and records what its routers decide. The teacher of the predictors."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.predictor.library_routing import intercepted_routing, recorded_router_logits
from actors.predictor.network import WeightRule
from actors.predictor.traces import TraceBatch, TraceHeader
from common.checkpoint import Checkpoint
from common.errors import UnsupportedModelError

MIN_AGREEMENT = (
    0.97  # of the routers' choices with the top k of their logits; rounding to 16 bits breaks some ties
)
MAX_SUM_SPREAD = 0.02  # weights whose sum varies less are renormalised ones


class RoutingTracer:
    """Traces of one model. Checks on its first batch that logits and decisions belong together."""

    def __init__(self, model: PreTrainedModel, folder: str | Path, num_kept: int = 30) -> None:
        """
        Args:
            num_kept: the T of truncated distillation: logits are kept of the T most likely experts.
        """
        checkpoint = Checkpoint.open(folder)
        self._model, self._architecture = model, checkpoint.architecture
        self._fingerprint = checkpoint.fingerprint
        self._num_kept = max(min(num_kept, self._architecture.num_experts), self._architecture.top_k)
        self._rule: WeightRule | None = None

    def header(self, sample: Tensor) -> TraceHeader:
        """Describes the traces; `sample`, [windows, tokens] int64, shows how the routers weight.

        Raises:
            UnsupportedModelError: the routers' decisions do not follow from their logits by softmax and top k.
        """
        return TraceHeader(
            model_fingerprint=self._fingerprint,
            num_layers=self._architecture.num_layers,
            num_experts=self._architecture.num_experts,
            top_k=self._architecture.top_k,
            num_kept=self._num_kept,
            weight_rule=self._weight_rule(sample),
        )

    def trace(self, token_ids: Tensor, mask: Tensor) -> TraceBatch:
        """
        Args:
            token_ids: [windows, tokens] int64. mask: [windows, tokens] bool, False for padding on the right.
        """
        logits = self._router_logits(token_ids)  # [layers, windows * tokens, experts]
        kept, expert_ids = logits.topk(self._num_kept, dim=-1)
        shape = (len(kept), *token_ids.shape, self._num_kept)
        return TraceBatch(
            token_ids, mask, expert_ids.view(shape).permute(1, 2, 0, 3), kept.view(shape).permute(1, 2, 0, 3)
        )

    @torch.no_grad()  # not inference mode: a loss will use what comes out
    def _router_logits(self, token_ids: Tensor) -> Tensor:
        with recorded_router_logits(self._model) as recorded:
            self._model.base_model(input_ids=token_ids.to(self._model.device), use_cache=False)
        if len(recorded) != self._architecture.num_layers:
            raise UnsupportedModelError(
                self._architecture.model_type,
                f"{len(recorded)} router outputs for {self._architecture.num_layers} MoE layers",
            )
        return torch.stack(recorded).float()

    def _weight_rule(self, sample: Tensor) -> WeightRule:
        ids: list[Tensor] = []
        weights: list[Tensor] = []

        def record(_layer: int, layer_ids: Tensor, layer_weights: Tensor) -> tuple[Tensor, Tensor]:
            ids.append(layer_ids)
            weights.append(layer_weights)
            return layer_ids, layer_weights

        with intercepted_routing(self._model, record):
            logits = self._router_logits(sample)
        return find_weight_rule(
            logits, torch.stack(ids), torch.stack(weights).float(), self._architecture.model_type
        )


def find_weight_rule(logits: Tensor, ids: Tensor, weights: Tensor, model_type: str) -> WeightRule:
    """How a model's scaling factors follow from its router logits.

    Args:
        logits: [layers, tokens, experts]. ids, weights: [layers, tokens, top_k], what the routers decided.
    Raises:
        UnsupportedModelError: the decisions are not the top k of the logits, or the weights not their softmax.
    """
    agreement = (
        (ids.unsqueeze(-1) == logits.topk(ids.shape[-1]).indices.unsqueeze(-2)).any(-1).float().mean().item()
    )
    if agreement < MIN_AGREEMENT:
        raise UnsupportedModelError(
            model_type,
            f"only {agreement:.0%} of its routers' choices are the top {ids.shape[-1]} of their logits; "
            "the hash function learns routers that choose by their logits alone",
        )
    chosen = logits.softmax(-1).gather(-1, ids)
    sums = weights.sum(-1)
    if float(sums.max() - sums.min()) < MAX_SUM_SPREAD * float(sums.mean()):
        rule = WeightRule(sum=round(float(sums.mean()), 3))
        expected = chosen * (sums / chosen.sum(-1)).unsqueeze(-1)
    else:
        rule = WeightRule(sum=None, scale=round(float((weights / chosen).median()), 3))
        expected = chosen * rule.scale
    error = float((weights - expected).abs().mean() / weights.abs().mean())
    if error > 1 - MIN_AGREEMENT:
        raise UnsupportedModelError(
            model_type, f"its routers do not weight by softmax (mean difference {error:.0%})"
        )
    return rule


class LiveTraces:
    """A trace source that runs the model whenever a batch is asked for: nothing is stored, the text may be long."""

    def __init__(self, tracer: RoutingTracer, token_ids: Tensor, mask: Tensor) -> None:
        """
        Args:
            token_ids: [windows, tokens] int64. mask: [windows, tokens] bool.
        """
        self._tracer, self._token_ids, self._mask = tracer, token_ids, mask
        self.header = tracer.header(token_ids[:8])

    def batches(self, batch_size: int, generator: torch.Generator | None) -> Iterator[TraceBatch]:
        count = len(self._token_ids)
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for rows in order.split(batch_size):
            yield self._tracer.trace(self._token_ids[rows], self._mask[rows])
