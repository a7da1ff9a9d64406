"""Runs an all-resident library model over text and records what its routers decide. The teacher of the predictors."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.predictor.library_routing import intercepted_routing, recorded_router_logits
from actors.predictor.network import WeightRule
from actors.predictor.traces import Stack, Teacher, TraceBatch, TraceHeader
from common.architecture import MoeArchitecture
from common.checkpoint import Checkpoint
from common.errors import ConfigError, UnsupportedModelError, VocabularyError

SAMPLE_WINDOWS = 8  # show how the routers weight
MIN_AGREEMENT = (
    0.97  # of the routers' choices with the top k of their logits; rounding to 16 bits breaks some ties
)
MAX_SUM_SPREAD = 0.02  # weights whose sum varies less are renormalised ones

Source = tuple[Tensor, Tensor]  # token ids [windows, source tokens] int64 and their mask


@dataclass(frozen=True)
class _Routing:
    """Of one forward pass."""

    expert_ids: Tensor  # [layers, tokens, top_k] int64
    weights: Tensor  # [layers, tokens, top_k] float32
    logits: Tensor | None  # [layers, tokens, experts] float32


class RoutingTracer:
    """Traces of one model: what its experts are told, whatever its routers do, and the logits if the library has them."""

    def __init__(
        self, model: PreTrainedModel, folder: str | Path, num_kept: int = 30, stack: Stack | None = None
    ) -> None:
        """
        Args:
            num_kept: the T of truncated distillation: logits are kept of the T most likely experts.
            stack: whose layers are traced; by default the encoder's, if there is one.
        Raises:
            ConfigError: the model has no MoE layers in that stack.
        """
        checkpoint = Checkpoint.open(folder)
        self._model, self._architecture = model, checkpoint.architecture
        self._fingerprint = checkpoint.fingerprint
        self._stack, self._layers = _layers_of(self._architecture, stack)
        self._num_kept = max(min(num_kept, self._architecture.num_experts), self._architecture.top_k)
        self._has_logits = _exposes_logits(model)

    def header(self, token_ids: Tensor, mask: Tensor, source: Source | None = None) -> TraceHeader:
        """Describes the traces.

        Args: as for `trace`; a sample that shows how the routers decide and weight.
        """
        routing = self._route(token_ids, mask, source)
        inside = mask.flatten().to(routing.expert_ids.device)
        logits = None if routing.logits is None else routing.logits[:, inside]
        teacher, rule = find_teacher(logits, routing.expert_ids[:, inside], routing.weights[:, inside])
        return TraceHeader(
            model_fingerprint=self._fingerprint,
            num_layers=len(self._layers),
            num_experts=self._architecture.num_experts,
            top_k=self._architecture.top_k,
            num_kept=0 if routing.logits is None else self._num_kept,
            weight_rule=rule,
            teacher=teacher,
            stack=self._stack,
        )

    def trace(self, token_ids: Tensor, mask: Tensor, source: Source | None = None) -> TraceBatch:
        """
        Args:
            token_ids: [windows, tokens] int64, what the stack reads. mask: [windows, tokens] bool, False for padding on
                the right.
            source: the same two of what the encoder reads, where the decoder of an encoder-decoder model is traced.
        Returns:
            Routing on the model's device.
        Raises:
            VocabularyError: an id lies outside the model's vocabulary.
        """
        routing = self._route(token_ids, mask, source)

        def by_token(
            tensor: Tensor,
        ) -> Tensor:  # [layers, tokens of all windows, n] -> [windows, tokens, layers, n]
            return tensor.view(len(tensor), *token_ids.shape, -1).permute(1, 2, 0, 3)

        ids, weights = by_token(routing.expert_ids), by_token(routing.weights)
        if routing.logits is None:
            return TraceBatch(token_ids, mask, ids, weights)
        kept, kept_ids = routing.logits.topk(self._num_kept, dim=-1)
        return TraceBatch(token_ids, mask, ids, weights, by_token(kept_ids), by_token(kept))

    @torch.no_grad()  # not inference mode: a loss will use what comes out
    def _route(self, token_ids: Tensor, mask: Tensor, source: Source | None) -> _Routing:
        self._check_vocabulary(token_ids)
        decisions: dict[int, tuple[Tensor, Tensor]] = {}

        top_k = self._architecture.top_k

        def record(layer: int, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            # Where an expert's input is weighted, each choice of a token is a row of its own.
            decisions[layer] = ids.reshape(-1, top_k), weights.reshape(-1, top_k)
            return ids, weights

        recording: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self._has_logits:
            recording = recorded_router_logits(self._model)
        with intercepted_routing(self._model, record), recording as logits:
            self._forward(token_ids, mask, source)
        if sorted(decisions)[-len(self._layers) :] != list(self._layers) or len(logits) not in (
            0,
            len(decisions),
        ):
            problem = f"{len(decisions)} decisions and {len(logits)} router outputs of {len(self._layers)} MoE layers"
            raise UnsupportedModelError(self._architecture.model_type, problem)
        ids, weights = (
            torch.stack(part) for part in zip(*(decisions[layer] for layer in self._layers), strict=True)
        )
        own_logits = torch.stack(logits[-len(self._layers) :]).float() if logits else None
        return _Routing(ids, weights.float(), own_logits)

    def _forward(self, token_ids: Tensor, mask: Tensor, source: Source | None) -> None:
        device = self._model.device
        token_ids, mask = token_ids.to(device), mask.to(device)
        if self._stack == "encoder":
            self._model.get_encoder()(input_ids=token_ids, attention_mask=mask.long())
        elif source is not None:
            self._check_vocabulary(source[0])
            self._model.base_model(
                input_ids=source[0].to(device),
                attention_mask=source[1].to(device).long(),
                decoder_input_ids=token_ids,
                use_cache=False,
            )
        elif self._architecture.num_encoder_layers:
            raise ConfigError("source", None, "a text for the encoder, beside which the decoder works")
        else:
            self._model.base_model(input_ids=token_ids, use_cache=False)

    def _check_vocabulary(self, token_ids: Tensor) -> None:
        vocab_size = self._architecture.vocab_size
        outside = (token_ids < 0) | (token_ids >= vocab_size)
        if bool(outside.any()):
            raise VocabularyError(int(token_ids[outside][0]), vocab_size, "text")


def _layers_of(architecture: MoeArchitecture, stack: Stack | None) -> tuple[Stack, range]:
    """A stack and the numbers of its MoE layers; the encoder's come first."""
    chosen: Stack = stack or ("encoder" if architecture.num_encoder_layers else "decoder")
    encoder, decoder = (
        range(architecture.num_encoder_layers),
        range(architecture.num_encoder_layers, architecture.num_layers),
    )
    layers = encoder if chosen == "encoder" else decoder
    if not layers:
        raise ConfigError("stack", chosen, f"{architecture.model_type} has no MoE layers there")
    return chosen, layers


def decoder_inputs(model: PreTrainedModel, targets: Tensor) -> Tensor:
    """What a decoder reads to write the targets, [windows, tokens]: its start token, and all but the last of them."""
    start = torch.full_like(targets[:, :1], model.config.decoder_start_token_id)
    return torch.cat([start, targets[:, :-1]], dim=1)


def _exposes_logits(model: PreTrainedModel) -> bool:
    try:
        with recorded_router_logits(model):
            return True
    except UnsupportedModelError:
        return False


def find_teacher(logits: Tensor | None, ids: Tensor, weights: Tensor) -> tuple[Teacher, WeightRule]:
    """What a hash function of these routers can learn from, and how scaling factors follow from what it predicts.

    Args:
        logits: [layers, tokens, experts]. ids, weights: [layers, tokens, top_k], what the routers decided.
    """
    if logits is not None and (rule := find_softmax_rule(logits, ids, weights)) is not None:
        return "logits", rule
    total = _constant_sum(weights)
    gates = WeightRule(sum=None, scale=round(float(weights.max()), 3), gates=True)
    return "choices", WeightRule(sum=total) if total is not None else gates


def find_softmax_rule(logits: Tensor, ids: Tensor, weights: Tensor) -> WeightRule | None:
    """None where the decisions are not the top k of the logits, or the weights not their softmax.

    Args: as for `find_teacher`.
    """
    largest = logits.topk(ids.shape[-1]).indices
    agreement = (ids.unsqueeze(-1) == largest.unsqueeze(-2)).any(-1).float().mean().item()
    chosen = logits.softmax(-1).gather(-1, ids)
    total = _constant_sum(weights)
    if total is not None:
        rule = WeightRule(sum=total)
        expected = chosen * (weights.sum(-1) / chosen.sum(-1)).unsqueeze(-1)
    else:
        rule = WeightRule(sum=None, scale=round(float((weights / chosen).median()), 3))
        expected = chosen * rule.scale
    error = float((weights - expected).abs().mean() / weights.abs().mean())
    return rule if agreement >= MIN_AGREEMENT and error <= 1 - MIN_AGREEMENT else None


def _constant_sum(weights: Tensor) -> float | None:
    sums = weights.sum(-1)
    if float(sums.max() - sums.min()) < MAX_SUM_SPREAD * float(sums.mean()):
        return round(float(sums.mean()), 3)
    return None


class LiveTraces:
    """A trace source that runs the model whenever a batch is asked for: nothing is stored, the text may be long."""

    def __init__(
        self, tracer: RoutingTracer, token_ids: Tensor, mask: Tensor, source: Source | None = None
    ) -> None:
        """Args: as for `RoutingTracer.trace`, of all windows."""
        self._tracer, self._token_ids, self._mask, self._source = tracer, token_ids, mask, source
        self.header = tracer.header(*self._rows(torch.arange(min(SAMPLE_WINDOWS, len(token_ids)))))

    def batches(
        self, batch_size: int, generator: torch.Generator | None, first: int = 0
    ) -> Iterator[TraceBatch]:
        count = len(self._token_ids)
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for rows in order.split(batch_size)[first:]:
            yield self._tracer.trace(*self._rows(rows))

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Source | None]:
        source = None if self._source is None else (self._source[0][rows], self._source[1][rows])
        return self._token_ids[rows], self._mask[rows], source
