"""Trains a hash function on traces (SiDA-MoE, arXiv 2310.18859, section 3.5). Knows neither text nor files."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from actors.predictor.network import HashFunction
from actors.predictor.traces import TraceBatch, TraceSource

MAX_GRADIENT_NORM = 1.0
# What is tried: the paper's distillation of the router's logits, or the likelihood of its weighted choices.
Objective = Literal["distillation", "choices"]


@dataclass(frozen=True)
class TrainingOptions:
    """The defaults are the paper's, for its long fine-tuning; `actors.predictor.train` says what works sooner."""

    objective: Objective = "distillation"
    learning_rate: float = 5e-5
    batch_size: int = 64  # windows
    ce_weight: float = 0.005  # lambda, of distillation
    steps: int = 10_000
    minutes: float = math.inf
    warmup_steps: int = 0
    cosine: bool = False  # decay to zero over the steps or the minutes, whichever end first
    evaluate_every: int = 200  # steps
    patience: int = 10  # evaluations without a better recall
    seed: int = 0


@dataclass(frozen=True)
class Evaluated:
    """A look at the held-out text during training."""

    step: int
    loss: float  # in training, since the look before
    recall: list[float]  # [layers]
    tokens_seen: int
    seconds: float

    @property
    def mean_recall(self) -> float:
        return sum(self.recall) / len(self.recall)


@dataclass
class TrainingRecord:
    """What happened. Recall is on held-out text, of the true top k, without padding."""

    best_step: int = 0
    best_recall: list[float] = field(default_factory=list)  # [layers]
    history: list[Evaluated] = field(default_factory=list)
    steps: int = 0
    epochs: int = 0  # whole passes over the traces
    batches_of_epoch: int = 0  # seen of the pass that was begun
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


def choices_loss(logits: Tensor, batch: TraceBatch) -> Tensor:
    """Cross entropy with the scaling factors that the router gave the experts it chose, over their sum. Not in the paper.

    Needs no logits, so it serves every router. And the chosen experts have all the probability of the target, also of
    routers that hardly prefer them: from the nearly even probabilities of those, distillation learns slowly.

    Args:
        logits: [windows, tokens, layers, experts].
    """
    weights = batch.weights[batch.mask]  # [tokens, layers, top_k]
    chosen = logits[batch.mask].log_softmax(-1).gather(-1, batch.expert_ids[batch.mask])
    return -(weights / weights.sum(-1, keepdim=True) * chosen).sum(-1).mean()


@torch.no_grad()
def recall_per_layer(
    function: HashFunction, batches: Sequence[TraceBatch], num_named: int | None = None
) -> list[float]:
    """Share of the routers' true top k among the first `num_named` predicted, by default k; [layers], without padding."""
    device = next(function.parameters()).device
    found, total = torch.zeros(function.spec.num_layers, device=device), 0
    for batch in batches:
        batch = batch.to(device)
        logits = function(batch.token_ids, batch.mask)[batch.mask]
        named = logits.topk(num_named or function.spec.top_k).indices  # [tokens, layers, named]
        true = batch.expert_ids[batch.mask]
        found += (true.unsqueeze(-1) == named.unsqueeze(-2)).any(-1).sum((0, 2))
        total += len(true) * true.shape[-1]
    recall: list[float] = (found / total).tolist()
    return recall


class Trainer:
    """Trains in place; the function ends with the weights of the best evaluation."""

    def __init__(
        self,
        function: HashFunction,
        source: TraceSource,
        held_out: Sequence[TraceBatch],
        options: TrainingOptions,
        report: Callable[[Evaluated], None],
    ) -> None:
        """
        Args:
            report: called at each evaluation; `state` is then one to resume from.
        """
        self._function, self._source, self._held_out = function, source, held_out
        self._options, self._report = options, report
        self._optimizer = torch.optim.AdamW(function.parameters(), lr=options.learning_rate)
        self._device = next(function.parameters()).device
        self._record = TrainingRecord()
        self._best = deepcopy(function.state_dict())
        self._began = time.monotonic()

    def state(self) -> dict[str, Any]:
        """Tensors and plain values; with it, another trainer of the same arguments goes on where this one is."""
        return {
            "function": self._function.state_dict(),
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
            "record": asdict(self._record),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Args: state: what `state` gave."""
        self._function.load_state_dict(state["function"])
        self._best = state["best"]
        self._optimizer.load_state_dict(state["optimizer"])
        history = [Evaluated(**row) for row in state["record"]["history"]]
        self._record = TrainingRecord(**{**state["record"], "history": history})
        self._began = time.monotonic() - self._record.seconds

    def run(self) -> TrainingRecord:
        losses: list[Tensor] = []
        ended = self._progress() >= 1 or self._is_stuck()
        batches = self._endless_batches()
        while not ended:
            losses.append(self._step(next(batches)))
            last = self._progress() >= 1
            if last or self._record.steps % self._options.evaluate_every == 0:
                self._evaluate(float(torch.stack(losses).mean()))
                losses = []
            ended = last or self._is_stuck()
        self._function.load_state_dict(self._best)
        return self._record

    def _endless_batches(self) -> Iterator[TraceBatch]:
        """From where the record is; every pass in an order of its own."""
        record = self._record
        while True:
            generator = torch.Generator().manual_seed(self._options.seed + record.epochs)
            for batch in self._source.batches(
                self._options.batch_size, generator, first=record.batches_of_epoch
            ):
                record.batches_of_epoch += 1
                yield batch
            record.epochs, record.batches_of_epoch = record.epochs + 1, 0

    def _step(self, batch: TraceBatch) -> Tensor:
        batch = batch.to(self._device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.zero_grad()
        loss = self._loss(self._function(batch.token_ids, batch.mask), batch)
        loss.backward()
        clip_grad_norm_(self._function.parameters(), MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._record.steps += 1
        self._record.tokens_seen += batch.token_ids.numel()
        return loss.detach()

    def _loss(self, logits: Tensor, batch: TraceBatch) -> Tensor:
        if self._options.objective == "choices":
            return choices_loss(logits, batch)
        return distillation_loss(logits, batch, self._options.ce_weight)

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
        record = self._record
        recall = recall_per_layer(self._function, self._held_out)
        row = Evaluated(record.steps, loss, recall, record.tokens_seen, record.seconds)
        if row.mean_recall > record.best_mean_recall or not record.best_recall:
            record.best_recall, record.best_step = recall, record.steps
            self._best = deepcopy(self._function.state_dict())
        record.history.append(row)
        self._report(row)

    def _is_stuck(self) -> bool:
        waited = self._record.steps - self._record.best_step
        return bool(self._record.history) and waited >= self._options.patience * self._options.evaluate_every
