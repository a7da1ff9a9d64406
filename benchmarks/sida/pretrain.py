"""Trains a Switch Transformer from scratch on corrupted source text."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from actors.predictor.library_routing import find_routers, recorded_router_logits
from benchmarks.sida.corruption import Corrupted, SpanCorruption
from benchmarks.sida.data.build import read_text
from benchmarks.sida.data.sources import Part
from benchmarks.sida.data.tokens import Vocabulary
from benchmarks.sida.fused_norms import fuse_norms
from benchmarks.sida.models import trained_config
from benchmarks.sida.optimize import optimize
from benchmarks.sida.routers import SkewCounter, balance_loss
from benchmarks.sida.sizes import Size
from common.own_experts.switch_transformers import OwnSwitchTransformersForConditionalGeneration

_CHECKED_WINDOWS = 64  # while it trains


class TextWindows:
    """Corrupted windows of the text of each part, on a device."""

    def __init__(self, data: Path, size: Size, vocabulary: Vocabulary, device: torch.device) -> None:
        self._data, self._size, self._vocabulary, self._device = data, size, vocabulary, device

    def corruption(self, part: Part) -> SpanCorruption:
        text = torch.from_numpy(read_text(self._data, part)).to(self._device)
        return SpanCorruption(self._vocabulary, text, self._size.window_tokens)

    def evaluated(self, part: Part, num_windows: int) -> list[Corrupted]:
        """The same batches whenever asked for."""
        generator = torch.Generator(self._device).manual_seed(0)
        corruption, most = self.corruption(part), self._size.pretraining_batch
        counts = [min(most, num_windows - start) for start in range(0, num_windows, most)]
        return [corruption.draw(count, generator) for count in counts]


def pretrain(
    folder: Path,
    windows: TextWindows,
    size: Size,
    num_experts: int,
    vocabulary: Vocabulary,
    device: torch.device,
    seed: int,
) -> dict[str, Any]:
    """Write a checkpoint with its tokenizer into the folder; returns what happened."""
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    routers = size.routers
    config = trained_config(size.shape, num_experts, vocabulary, routers.aux_loss)
    with device:  # where a billion random numbers take no time
        model = OwnSwitchTransformersForConditionalGeneration(config)
    for router in find_routers(model)[0]:
        router.get_parameter("classifier.weight").data *= routers.scale
    model.to(dtype)
    fuse_norms(model)
    corruption = windows.corruption("train")
    generator = torch.Generator(device).manual_seed(seed)
    checked = windows.evaluated("validation", _CHECKED_WINDOWS)

    def step_loss() -> Tensor:
        batch = corruption.draw(size.pretraining_batch, generator)
        with recorded_router_logits(model) as logits:
            loss = target_loss(model, batch)
        return loss + routers.aux_loss * balance_loss(logits)

    curve = optimize(
        model,
        size.pretraining,
        step_loss,
        lambda _: {"perplexity": perplexity(model, checked)},
        lambda name: routers.speed if ".router." in name else 1.0,
    )
    tested = windows.evaluated("test", size.evaluated_windows)
    record = {
        "experts": num_experts,
        "parameters": model.num_parameters(),
        "shape": asdict(size.shape),
        "routers": asdict(routers),
        "steps": curve.steps,
        "seconds": round(curve.seconds, 1),
        "tokens_seen": curve.steps * size.pretraining_batch * size.window_tokens,
        "perplexity": round(perplexity(model, tested), 4),
        "skew": text_skew(model, tested),
        "curve": curve.points,
    }
    model.save_pretrained(folder)
    vocabulary.save(folder)
    return record


def target_loss(model: PreTrainedModel, batch: Corrupted) -> Tensor:
    """Mean cross entropy of the spans' tokens."""
    logits = model(input_ids=batch.inputs, labels=batch.labels, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    batches: list[Corrupted],
    routing: Callable[[Corrupted], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> float:
    """Args: routing: a context for the forward over a batch."""
    total = 0.0
    for batch in batches:
        with routing(batch):
            total += float(target_loss(model, batch)) * len(batch.inputs)
    return math.exp(total / sum(len(batch.inputs) for batch in batches))


@torch.no_grad()
def text_skew(model: PreTrainedModel, batches: list[Corrupted]) -> dict[str, Any]:
    """Of the encoder's routers."""
    counter = SkewCounter()
    for batch in batches:
        with recorded_router_logits(model) as logits:
            model.get_encoder()(input_ids=batch.inputs)
        counter.add(logits, torch.ones_like(batch.inputs, dtype=torch.bool))
    return asdict(counter.skew())
