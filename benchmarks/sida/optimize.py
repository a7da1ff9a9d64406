"""Steps a model until its minutes are spent. Knows nothing of what it learns."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

_BETAS = (0.9, 0.98)
_MAX_GRADIENT_NORM = 1.0
_MIN_SCALE = 1e-3  # of a tensor that begins with zeros
_FINAL_LEARNING_RATE = 0.02  # of the peak
_LOGS = 10  # of a run


Speed = Callable[[str], float]


def _same_speed(_name: str) -> float:
    return 1.0


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine over the minutes or the steps, whichever end first."""

    minutes: float
    learning_rate: float  # relative to the size of a tensor's values
    warmup_steps: int
    steps: int = 10**9

    def scaled(self, share: float) -> "Schedule":
        return replace(self, minutes=share * self.minutes)


class RelativeAdam:
    """Adam on float32 copies of the parameters, with steps relative to the root mean square of each tensor at the start.

    T5 begins with embeddings of variance 1 and matrices of 1 / d_model, and was trained with such steps (Adafactor,
    arXiv 1804.04235, section 8); one learning rate for all is too small for the ones or too large for the others.
    """

    def __init__(self, model: nn.Module, speed: Speed = _same_speed) -> None:
        named = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self._params: list[Tensor] = list(named.values())
        self._masters = [param.detach().float().clone() for param in self._params]
        self._scales = [
            speed(name) * max(_MIN_SCALE, float(master.square().mean().sqrt()))
            for name, master in zip(named, self._masters, strict=True)
        ]
        self._adam = torch.optim.Adam(
            [{"params": [master]} for master in self._masters], betas=_BETAS, fused=True
        )

    def step(self, learning_rate: float) -> None:
        """Apply the parameters' gradients and clear them."""
        for master, param in zip(self._masters, self._params, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
            param.grad = None
        nn.utils.clip_grad_norm_(self._masters, _MAX_GRADIENT_NORM)
        for group, scale in zip(self._adam.param_groups, self._scales, strict=True):
            group["lr"] = learning_rate * scale
        self._adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self._params, self._masters)


@dataclass
class Curve:
    steps: int = 0
    seconds: float = 0.0
    points: list[dict[str, float]] = field(default_factory=list)


def optimize(
    model: nn.Module,
    schedule: Schedule,
    step_loss: Callable[[], Tensor],
    check: Callable[[float], dict[str, float]] = lambda progress: {},
    speed: Speed = _same_speed,
) -> Curve:
    """Minimise; the model is in training mode during steps and in evaluation mode in the end.

    Args:
        step_loss: the loss of the next batch.
        check: called some ten times with the share that is spent, the last time with 1; what it returns goes into
            the curve.
        speed: factors of the learning rate by a parameter's name.
    """
    optimizer = RelativeAdam(model, speed)
    curve, losses = Curve(), list[Tensor]()
    started, progress, next_log = time.monotonic(), 0.0, 0.0
    model.train()
    while progress < 1:
        loss = step_loss()
        loss.backward()
        optimizer.step(_learning_rate(schedule, curve.steps, progress))
        losses.append(loss.detach())
        curve.steps += 1
        curve.seconds = time.monotonic() - started
        progress = min(1.0, max(curve.seconds / 60 / schedule.minutes, curve.steps / schedule.steps))
        if progress >= next_log or progress == 1:
            next_log = progress + 1 / _LOGS
            model.eval()
            point = {"step": curve.steps, "loss": float(torch.stack(losses).mean()), **check(progress)}
            model.train()
            curve.points.append({name: round(value, 4) for name, value in point.items()})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in point.items())
            print(f"{curve.seconds:.1f} s  {shown}", flush=True)
            losses.clear()
    model.eval()
    return curve


def _learning_rate(schedule: Schedule, step: int, progress: float) -> float:
    warm = min(1.0, (step + 1) / schedule.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.learning_rate * warm * (_FINAL_LEARNING_RATE + (1 - _FINAL_LEARNING_RATE) * cosine)
