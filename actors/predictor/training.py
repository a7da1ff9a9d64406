"""Trains a hash function on traces (SiDA-MoE, arXiv 2310.18859, section 3.5). Knows neither text nor files."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from actors.predictor.network import HashFunction
from actors.predictor.traces import TraceBatch, TraceSource

MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainingOptions:
    """The defaults are the paper's, for its long fine-tuning; `actors.predictor.train` says what works sooner."""

    learning_rate: float = 5e-5
    batch_size: int = 64  # windows
    ce_weight: float = 0.005  # lambda
    steps: int = 10_000
    minutes: float = math.inf
    warmup_steps: int = 0
    cosine: bool = False  # decay to zero over the steps or the minutes, whichever end first
    evaluate_every: int = 200  # steps
    patience: int = 10  # evaluations without a better recall
    seed: int = 0


@dataclass
class TrainingRecord:
    """What happened. Recall is on held-out text, of the true top k, without padding."""

    best_step: int = 0
    best_recall: list[float] = field(default_factory=list)  # [layers]
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0

    @property
    def best_mean_recall(self) -> float:
        return sum(self.best_recall) / len(self.best_recall) if self.best_recall else 0.0


def distillation_loss(logits: Tensor, batch: TraceBatch, ce_weight: float) -> Tensor:
    """lambda * CE(the router's first choice) + KD over the teacher's kept experts; the mean over tokens and layers.

    Args:
        logits: [windows, tokens, layers, experts].
        batch: with logits.
    """
    assert batch.kept_ids is not None and batch.logits is not None, "the teacher is its logits"
    student, kept_ids, teacher = logits[batch.mask], batch.kept_ids[batch.mask], batch.logits[batch.mask]
    hard = functional.cross_entropy(student.flatten(0, 1), kept_ids[..., 0].flatten())
    soft = functional.cross_entropy(
        student.gather(-1, kept_ids).flatten(0, 1), teacher.softmax(-1).flatten(0, 1)
    )
    return ce_weight * hard + soft


@torch.no_grad()
def recall_per_layer(function: HashFunction, batches: Sequence[TraceBatch]) -> list[float]:
    """Share of the routers' true top k among the predicted top k; [layers]. Padding does not count."""
    top_k, device = function.spec.top_k, next(function.parameters()).device
    found, total = torch.zeros(function.spec.num_layers, device=device), 0
    for batch in batches:
        mask = batch.mask.to(device)
        predicted = function(batch.token_ids.to(device))[mask].topk(top_k).indices  # [tokens, layers, top_k]
        true = batch.expert_ids.to(device)[mask]
        found += (true.unsqueeze(-1) == predicted.unsqueeze(-2)).any(-1).sum((0, 2))
        total += len(true) * top_k
    recall: list[float] = (found / total).tolist()
    return recall


def train(
    function: HashFunction,
    source: TraceSource,
    held_out: Sequence[TraceBatch],
    options: TrainingOptions,
    report: Callable[[dict[str, float]], None],
) -> TrainingRecord:
    """Train in place; the function ends with the weights of the best evaluation.

    Args:
        report: called at each evaluation with step, loss, recall and tokens_seen.
    """
    return _Trainer(function, source, held_out, options, report).run()


class _Trainer:
    def __init__(
        self,
        function: HashFunction,
        source: TraceSource,
        held_out: Sequence[TraceBatch],
        options: TrainingOptions,
        report: Callable[[dict[str, float]], None],
    ) -> None:
        self._function, self._source, self._held_out = function, source, held_out
        self._options, self._report = options, report
        self._optimizer = torch.optim.AdamW(function.parameters(), lr=options.learning_rate)
        self._device = next(function.parameters()).device
        self._record = TrainingRecord()
        self._best = deepcopy(function.state_dict())
        self._began = time.monotonic()

    def run(self) -> TrainingRecord:
        losses: list[Tensor] = []
        for batch in self._endless_batches():
            losses.append(self._step(batch))
            last = self._progress() >= 1
            if last or self._record.steps % self._options.evaluate_every == 0:
                self._evaluate(float(torch.stack(losses).mean()))
                losses = []
            if last or self._is_stuck():
                break
        self._function.load_state_dict(self._best)
        return self._record

    def _endless_batches(self) -> Iterator[TraceBatch]:
        generator = torch.Generator().manual_seed(self._options.seed)
        while True:
            yield from self._source.batches(self._options.batch_size, generator)

    def _step(self, batch: TraceBatch) -> Tensor:
        batch = batch.to(self._device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.zero_grad()
        loss = distillation_loss(self._function(batch.token_ids), batch, self._options.ce_weight)
        loss.backward()
        clip_grad_norm_(self._function.parameters(), MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._record.steps += 1
        self._record.tokens_seen += batch.token_ids.numel()
        return loss.detach()

    def _progress(self) -> float:
        """Share of the steps or of the minutes that is spent, whichever is larger."""
        self._record.seconds = time.monotonic() - self._began
        return max(
            self._record.steps / self._options.steps, self._record.seconds / 60 / self._options.minutes
        )

    def _learning_rate(self) -> float:
        warmup = min(1.0, (self._record.steps + 1) / max(1, self._options.warmup_steps))
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, self._progress()))) if self._options.cosine else 1.0
        return self._options.learning_rate * warmup * decay

    def _evaluate(self, loss: float) -> None:
        recall = recall_per_layer(self._function, self._held_out)
        mean = sum(recall) / len(recall)
        if mean > self._record.best_mean_recall or not self._record.best_recall:
            self._record.best_recall, self._record.best_step = recall, self._record.steps
            self._best = deepcopy(self._function.state_dict())
        row = {
            "step": float(self._record.steps),
            "loss": loss,
            "recall": mean,
            "tokens_seen": float(self._record.tokens_seen),
            "seconds": self._record.seconds,
        }
        self._record.history.append(row)
        self._report(row)

    def _is_stuck(self) -> bool:
        waited = self._record.steps - self._record.best_step
        return bool(self._record.history) and waited >= self._options.patience * self._options.evaluate_every
