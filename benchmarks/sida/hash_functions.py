"""Trains hash functions for the models of the work folder, on a task or on corrupted text: the paper's network with its loss, and
ours with the likelihood of the routers' choices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from actors.predictor.calibration import calibrate
from actors.predictor.hash_function import WEIGHTS_FILE, find_embedding_key, read_embedding
from actors.predictor.network import HashFunction, HashFunctionSpec
from actors.predictor.traces import Stack, TraceBatch, TraceHeader
from actors.predictor.tracing import SAMPLE_WINDOWS, RoutingTracer, decoder_inputs
from actors.predictor.training import Evaluated, Objective, Trainer, TrainingOptions
from benchmarks.sida.batches import batches
from benchmarks.sida.corruption import Corrupted, SpanCorruption
from benchmarks.sida.data.build import TaskPart


@dataclass(frozen=True)
class Network:
    """A kind of hash function and how it is trained; learning rates that get there within minutes."""

    changes: dict[str, Any]  # to a spec
    objective: Objective
    learning_rate: float


NETWORKS = {
    "paper": Network({"network": "paper"}, "distillation", 1e-2),
    "ours": Network({"network": "filters"}, "choices", 4e-3),
}
_NEVER = 10**9


@dataclass(frozen=True)
class HashTraining:
    minutes: float  # of each function of text
    task_minutes: float  # of each function of a task, which begins as that of the text
    warmup_steps: int
    evaluate_every: int  # steps
    batch_tokens: int
    hidden_size: int
    held_out_batches: int
    steps: int = _NEVER

    def scaled(self, share: float) -> "HashTraining":
        return replace(self, minutes=share * self.minutes, task_minutes=share * self.task_minutes)

    def options(self, network: Network, minutes: float, seed: int) -> TrainingOptions:
        return TrainingOptions(
            objective=network.objective,
            learning_rate=network.learning_rate,
            warmup_steps=self.warmup_steps,
            cosine=True,
            steps=self.steps,
            minutes=minutes,
            evaluate_every=self.evaluate_every,
            patience=_NEVER,
            seed=seed,
        )


class Traced(Protocol):
    """Batches of what a stack reads, traced when they are asked for."""

    def header(self) -> TraceHeader: ...

    def traces(self, generator: torch.Generator | None) -> Iterator[TraceBatch]:
        """Args: generator: draws them, or their order; None: the same ones each time."""


class TracedTask:
    """A task's examples through the encoder of its classifier.

    Args:
        text: [tokens] int64; windows of it, as long as the examples, come between those that are drawn. A hash function needs
            no labels, and examples are few.
    """

    def __init__(
        self, tracer: RoutingTracer, part: TaskPart, batch_tokens: int, text: Tensor | None = None
    ) -> None:
        self._tracer, self._part, self._batch_tokens, self._text = tracer, part, batch_tokens, text
        self._lengths = torch.from_numpy(part.lengths)

    def header(self) -> TraceHeader:
        sample = next(batches(self._part, self._batch_tokens, torch.device("cpu")))
        return self._tracer.header(sample.ids[:SAMPLE_WINDOWS], sample.mask[:SAMPLE_WINDOWS])

    def traces(self, generator: torch.Generator | None) -> Iterator[TraceBatch]:
        for batch in batches(self._part, self._batch_tokens, torch.device("cpu"), generator):
            yield self._tracer.trace(batch.ids, batch.mask)
            if generator is not None and self._text is not None:
                yield self._tracer.trace(*self._windows(self._text, generator))

    def _windows(self, text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids and mask [windows, tokens]."""
        count = max(1, int(self._batch_tokens / float(self._lengths.float().mean())))
        lengths = self._lengths[torch.randint(len(self._lengths), (count,), generator=generator)]
        places = torch.arange(int(lengths.max()))
        starts = torch.randint(len(text) - len(places) + 1, (count,), generator=generator)
        mask = places < lengths[:, None]
        return text[starts[:, None] + places].masked_fill(~mask, 0), mask


class TracedText:
    """Corrupted windows through one stack of a text-to-text model.

    Args:
        folder: of the model.
        corruption: draws without end. fixed: what is traced without a generator.
        num_windows: of a batch that is drawn.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path,
        stack: Stack,
        corruption: SpanCorruption,
        fixed: Sequence[Corrupted],
        num_windows: int,
    ) -> None:
        self._model, self._tracer, self._stack = model, RoutingTracer(model, folder, stack=stack), stack
        self._corruption, self._fixed, self._num_windows = corruption, fixed, num_windows

    def header(self) -> TraceHeader:
        return self._tracer.header(*self._read_by_stack(self._fixed[0]))

    def traces(self, generator: torch.Generator | None) -> Iterator[TraceBatch]:
        for batch in self._fixed if generator is None else self._drawn(generator):
            yield self._tracer.trace(*self._read_by_stack(batch))

    def _drawn(self, generator: torch.Generator) -> Iterator[Corrupted]:
        drawing = torch.Generator(self._fixed[0].inputs.device)
        drawing.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        while True:
            yield self._corruption.draw(self._num_windows, drawing)

    def _read_by_stack(self, batch: Corrupted) -> tuple[Any, ...]:
        """The arguments of a tracer."""
        source = (batch.inputs, torch.ones_like(batch.inputs, dtype=torch.bool))
        if self._stack == "encoder":
            return source
        ids = decoder_inputs(self._model, batch.labels)
        return ids, torch.ones_like(ids, dtype=torch.bool), source


class _Source:
    """A `TraceSource`; sizes of batches are the traced ones' own."""

    def __init__(self, traced: Traced) -> None:
        self._traced, self.header = traced, traced.header()

    def batches(
        self, batch_size: int, generator: torch.Generator | None, first: int = 0
    ) -> Iterator[TraceBatch]:
        yield from islice(self._traced.traces(generator), first, None)


def train_hash_function(
    folder: Path,
    traced: Traced,
    held_out: Sequence[TraceBatch],
    network: str,
    training: HashTraining,
    seed: int,
    device: torch.device,
    start: Path | None = None,
) -> HashFunction:
    """
    Args:
        folder: of the traced model.
        network: in NETWORKS.
        start: a hash function of the same network to begin with; for a model that was trained from that one's.
    """
    torch.manual_seed(seed)
    source, key = _Source(traced), find_embedding_key(folder)
    embedding, header = read_embedding(folder, key), source.header
    spec = HashFunctionSpec(
        model_fingerprint=header.model_fingerprint,
        embedding_key=key,
        vocab_size=embedding.shape[0],
        embedding_size=embedding.shape[1],
        num_layers=header.num_layers,
        num_experts=header.num_experts,
        top_k=header.top_k,
        weight_rule=header.weight_rule,
        compressed_size=training.hidden_size,
        hidden_size=training.hidden_size,
        bidirectional=header.stack == "encoder",
    )
    function = HashFunction(replace(spec, **NETWORKS[network].changes), embedding).to(device)
    if start is None:
        function.prepare_training()
    else:
        weights = load_file(start / WEIGHTS_FILE)
        function.load_state_dict({name: weight.float() for name, weight in weights.items()})
    minutes = training.minutes if start is None else training.task_minutes
    print(f"{network} network, {header.stack}:", flush=True)
    Trainer(function, source, held_out, training.options(NETWORKS[network], minutes, seed), _report).run()
    function.eval().requires_grad_(False)
    calibrate(function, held_out, by_expert=False)
    return function


def _report(row: Evaluated) -> None:
    print(
        f"{row.seconds:.1f} s  step {row.step}  loss {row.loss:.4f}  recall {row.mean_recall:.4f}", flush=True
    )


def naming(function: HashFunction, num_named: int) -> HashFunction:
    """The same function, set to route by that many experts per token."""
    function.spec = replace(function.spec, top_k=num_named)
    return function
