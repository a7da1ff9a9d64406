"""Calibrates a trained hash function on text that it was not trained on, and measures how far it can be believed.

Two things are predicted of an expert: its scaling factor, if it is used (fitted: a scale per layer, and an offset per expert
where routers choose by more than they weight by), and the probability that it is used (fitted: a temperature per layer).
Temperature scaling is Guo et al., arXiv 1706.04599. No choice of experts changes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from actors.predictor.network import HashFunction, use_probabilities
from actors.predictor.traces import TraceBatch

MAX_TOKENS = 8192  # to fit on
FIT_STEPS = 100
LEARNING_RATE = 0.05
TEMPERATURES = [0.002 * 1.2**number for number in range(49)]  # up to 13
NUM_BINS = 20  # of predicted probabilities, equally wide


@dataclass(frozen=True)
class CalibrationScores:
    """Each per layer, padding left out."""

    # Mean |predicted - true| scaling factor of experts that both name, over the mean true one.
    weight_error: list[float]
    weight_error_uncalibrated: list[float]  # with the scales and offsets of a new function
    weight_moved: list[
        float
    ]  # share of the scaling factors that lies on other experts than the routers put it
    use_ece: list[float]  # expected calibration error of the probability that an expert is used
    use_ece_uncalibrated: list[float]  # the same at temperature 1


def calibrate(function: HashFunction, held_out: Sequence[TraceBatch], by_expert: bool) -> None:
    """Fit in place.

    Args:
        by_expert: fit an offset of each expert, too.
    """
    logits, ids, weights = _sample(function, held_out)
    _fit_weights(function, logits, ids, weights, by_expert)
    _fit_temperatures(function, logits, ids)


def score_calibration(function: HashFunction, held_out: Sequence[TraceBatch]) -> CalibrationScores:
    weights, plain_weights = [], []
    uses, plain_uses = _Reliability(function), _Reliability(function)
    for logits, true_ids, true_weights in _predictions(function, held_out):
        num_experts = logits.shape[-1]
        true, used = _dense(true_ids, true_weights, num_experts), _used(true_ids, num_experts)
        ids, calibrated = function.route(logits)
        weights.append(_weight_sums(_dense(ids, calibrated, num_experts), true, used))
        plain = _dense(ids, function.weights_of(logits, ids), num_experts)
        plain_weights.append(_weight_sums(plain, true, used))
        uses.add(function.use_probabilities(logits), used)
        ones = torch.ones_like(function.use_temperature)
        plain_uses.add(use_probabilities(logits, function.spec.top_k, ones), used)
    error, named, moved, all_weights = torch.stack(weights).sum(0)
    plain_error, *_ = torch.stack(plain_weights).sum(0)
    return CalibrationScores(
        weight_error=(error / named).tolist(),
        weight_error_uncalibrated=(plain_error / named).tolist(),
        weight_moved=(moved / all_weights).tolist(),
        use_ece=uses.error(),
        use_ece_uncalibrated=plain_uses.error(),
    )


def _weight_sums(predicted: Tensor, true: Tensor, used: Tensor) -> Tensor:
    """[4, layers], sums over tokens: error and true weight of experts that both name, error and weight of all.

    Args: [tokens, layers, experts] each, 0 for experts that are not named.
    """
    error, both = (predicted - true).abs(), (predicted > 0) & used
    return torch.stack([error * both, true * both, error, predicted + true]).sum((1, 3))


class _Reliability:
    """Predicted probabilities and outcomes, counted in bins."""

    def __init__(self, function: HashFunction) -> None:
        device = function.use_temperature.device
        # [count, sum of probabilities, number used]
        self._bins = torch.zeros(3, function.spec.num_layers, NUM_BINS, device=device, dtype=torch.float64)

    def add(self, probabilities: Tensor, used: Tensor) -> None:
        """Args: [tokens, layers, experts] each."""
        values = torch.stack([torch.ones_like(probabilities), probabilities, used.float()]).double()
        bins = (probabilities * NUM_BINS).long().clamp(max=NUM_BINS - 1).transpose(0, 1).flatten(1)
        self._bins.scatter_add_(-1, bins.expand(3, -1, -1), values.transpose(1, 2).flatten(2))

    def error(self) -> list[float]:
        count, predicted, used = self._bins
        errors: list[float] = ((predicted - used).abs().sum(-1) / count.sum(-1)).tolist()
        return errors


@torch.no_grad()
def _predictions(
    function: HashFunction, batches: Sequence[TraceBatch]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per batch: logits [tokens, layers, experts], true ids and weights [tokens, layers, top_k], without padding."""
    device = function.use_temperature.device
    for batch in batches:
        batch = batch.to(device)
        logits = function(batch.token_ids, batch.mask)
        yield logits[batch.mask], batch.expert_ids[batch.mask], batch.weights[batch.mask]


def _sample(function: HashFunction, batches: Sequence[TraceBatch]) -> tuple[Tensor, Tensor, Tensor]:
    parts, num_tokens = [], 0
    for part in _predictions(function, batches):
        parts.append(part)
        num_tokens += len(part[0])
        if num_tokens >= MAX_TOKENS:
            break
    logits, ids, weights = (torch.cat(tensors)[:MAX_TOKENS] for tensors in zip(*parts, strict=True))
    return logits, ids, weights


def _fit_weights(
    function: HashFunction, logits: Tensor, ids: Tensor, weights: Tensor, by_expert: bool
) -> None:
    """Smallest mean absolute error of the scaling factors of the experts that are predicted and used."""
    function.weight_scale.fill_(1.0)
    function.weight_offset.zero_()
    true = _dense(ids, weights, logits.shape[-1])
    scale = function.weight_scale.clone().requires_grad_()
    offset = function.weight_offset.clone().requires_grad_(by_expert)
    chosen = logits.topk(function.spec.top_k).indices
    target = true.gather(-1, chosen)
    optimizer = torch.optim.Adam([scale, *([offset] if by_expert else [])], lr=LEARNING_RATE)
    for _ in range(FIT_STEPS):
        optimizer.zero_grad()
        predicted = function.weights_of(logits * scale[:, None] + offset, chosen)
        ((predicted - target).abs() * (target > 0)).mean().backward()
        optimizer.step()
    function.weight_scale.copy_(scale.detach())
    function.weight_offset.copy_(offset.detach())


def _fit_temperatures(function: HashFunction, logits: Tensor, ids: Tensor) -> None:
    """Largest likelihood of which experts were used, of some temperatures."""
    used = _used(ids, logits.shape[-1]).float()
    losses = []
    for temperature in TEMPERATURES:
        everywhere = torch.full_like(function.use_temperature, temperature)
        probabilities = use_probabilities(logits, function.spec.top_k, everywhere).clamp(1e-6, 1 - 1e-6)
        losses.append(functional.binary_cross_entropy(probabilities, used, reduction="none").mean((0, 2)))
    best = torch.stack(losses).argmin(0)  # [layers]
    function.use_temperature.copy_(torch.tensor(TEMPERATURES)[best.cpu()])


def _dense(ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """[tokens, layers, experts], 0 for the others."""
    zeros = torch.zeros(*ids.shape[:-1], num_experts, dtype=weights.dtype, device=ids.device)
    return zeros.scatter(-1, ids, weights)


def _used(ids: Tensor, num_experts: int) -> Tensor:
    return _dense(ids, torch.ones_like(ids, dtype=torch.float32), num_experts) > 0
