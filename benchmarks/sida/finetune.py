"""Fine-tunes the encoder of a pretrained Switch Transformer as a classifier of one task. Routers stay as they are: in minutes
they would learn noise.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from actors.predictor.library_routing import find_routers, recorded_router_logits
from benchmarks.sida.batches import Batch, batches
from benchmarks.sida.data.build import TaskPart, read_task
from benchmarks.sida.data.tasks import TaskName
from benchmarks.sida.data.tokens import Vocabulary
from benchmarks.sida.fused_norms import fuse_norms
from benchmarks.sida.optimize import optimize
from benchmarks.sida.routers import SkewCounter
from benchmarks.sida.sizes import Size
from common.own_experts.switch_transformers import SwitchTransformersForSequenceClassification

_DROPOUT = 0.1
_CHECKED = 1000  # examples, while it trains


def finetune(
    folder: Path,
    pretrained: Path,
    data: Path,
    task: TaskName,
    size: Size,
    vocabulary: Vocabulary,
    device: torch.device,
    seed: int,
) -> dict[str, Any]:
    """Write the checkpoint with the best score on the validation part into the folder; returns what happened."""
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    parts = {part: read_task(data, task, part) for part in ("train", "validation", "test")}
    model = SwitchTransformersForSequenceClassification.from_pretrained(
        pretrained, dtype=dtype, num_labels=2, dropout_rate=_DROPOUT
    ).to(device)
    fuse_norms(model)
    for router in find_routers(model)[0]:
        router.requires_grad_(False)
    drawn = _endless(parts["train"], size.finetuning_batch_tokens, device, seed)
    best = _Best(model, parts["validation"].first(_CHECKED), size.finetuning_batch_tokens)

    def step_loss() -> Tensor:
        batch = next(drawn)
        logits = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        return functional.cross_entropy(logits.float(), batch.labels)

    curve = optimize(model, size.finetuning[task], step_loss, best.check)
    best.restore()
    record = {
        "task": task,
        "steps": curve.steps,
        "seconds": round(curve.seconds, 1),
        "validation_accuracy": round(best.accuracy, 4),
        "accuracy": round(accuracy(model, parts["test"], size.finetuning_batch_tokens), 4),
        "skew": task_skew(model, parts["test"], size.finetuning_batch_tokens),
        "curve": curve.points,
    }
    model.save_pretrained(folder)
    vocabulary.save(folder)
    return record


class _Best:
    """Keeps the weights that did best on the validation part."""

    def __init__(self, model: PreTrainedModel, part: TaskPart, batch_tokens: int) -> None:
        self._model, self._part, self._batch_tokens = model, part, batch_tokens
        self.accuracy, self._weights = -1.0, model.state_dict()

    def check(self, _progress: float) -> dict[str, float]:
        found = accuracy(self._model, self._part, self._batch_tokens)
        if found > self.accuracy:
            self.accuracy, self._weights = found, deepcopy(self._model.state_dict())
        return {"accuracy": found}

    def restore(self) -> None:
        self._model.load_state_dict(self._weights)


@torch.no_grad()
def accuracy(model: PreTrainedModel, part: TaskPart, batch_tokens: int) -> float:
    right = sum(
        int(
            (
                model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits.argmax(-1) == batch.labels
            ).sum()
        )
        for batch in batches(part, batch_tokens, model.device)
    )
    return right / len(part.labels)


@torch.no_grad()
def task_skew(model: PreTrainedModel, part: TaskPart, batch_tokens: int) -> dict[str, Any]:
    counter = SkewCounter()
    for batch in batches(part, batch_tokens, model.device):
        with recorded_router_logits(model) as logits:
            model(input_ids=batch.ids, attention_mask=batch.mask.long())
        counter.add(logits, batch.mask)
    return asdict(counter.skew())


def _endless(part: TaskPart, batch_tokens: int, device: torch.device, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from batches(part, batch_tokens, device, generator)
