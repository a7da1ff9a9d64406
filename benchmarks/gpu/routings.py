"""Expert choices for measurements: drawn from a distribution or read from a trace, given to captured steps.

A table names the experts of every step, layer and row beforehand, so that decoding at every number of slots
needs the same experts in the same order. Weights stay the routers' own.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.executor.gpu.captured_pass import Foresee
from benchmarks.gpu.routing_trace import RoutingTrace

NATURAL = "natural"  # the routers decide: no table


@dataclass(frozen=True)
class TableShape:
    """Steps after which a table begins again, and the sizes of the model and of the largest batch."""

    layers: int
    steps: int
    rows: int
    top_k: int
    num_experts: int


@dataclass(frozen=True)
class Table:
    """What every row chooses in every step, and perhaps a guess of it."""

    ids: Tensor  # [layers, steps, rows, top_k] int32, distinct within a row
    scores: Tensor | None = (
        None  # [layers, steps, rows, experts] float16: the guessed experts' are the highest
    )


class TableRouting:
    """Gives captured passes a table step by step. It is read in place, so another table needs no new graph.

    Args:
        step: int64 [1] on the device, the pager's count of passes.
        foresees: whether tables come with guesses.
    """

    def __init__(self, shape: TableShape, step: Tensor, foresees: bool) -> None:
        size = (shape.layers, shape.steps, shape.rows)
        self._ids = torch.zeros(*size, shape.top_k, dtype=torch.int32, device=step.device)
        self._scores: Tensor | None = None
        if foresees:
            self._scores = torch.zeros(*size, shape.num_experts, dtype=torch.float16, device=step.device)
        self._step, self._start = step, torch.zeros_like(step)
        self._index, self._rows = torch.zeros_like(step), 0

    def load(self, table: Table) -> None:
        """The next pass takes the table's first step."""
        self._ids.copy_(table.ids)
        if self._scores is not None and table.scores is not None:
            self._scores.copy_(table.scores)
        self._start.copy_(self._step)

    def reroute(self, layer: int, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """A `captured_pass.Reroute`."""
        if layer == 0:
            self._index, self._rows = (self._step - self._start - 1) % self._ids.shape[1], len(ids)
        return self._of_step(self._ids[layer]), weights

    @property
    def foresee(self) -> Foresee | None:
        """A `captured_pass.Foresee`; None where nothing is guessed."""
        scores = self._scores
        return None if scores is None else lambda layer: self._of_step(scores[layer])

    def _of_step(self, steps: Tensor) -> Tensor:
        return steps[:, : self._rows].index_select(0, self._index)[0]


def new_table(
    name: str, shape: TableShape, seed: int, device: torch.device, foresight: float | None = None
) -> Table | None:
    """The table of a routing; None for `natural`.

    Args:
        name: natural, uniform, zipf<exponent>, or trace:<file of benchmarks.gpu.routing_trace>.
        device: draws the table.
        foresight: share of each row's experts that a guess names.
    Raises:
        ValueError: an unknown name, or a trace of another model.
    """
    if name == NATURAL:
        return None
    if name == "uniform":
        ids = zipf_table(0.0, shape, seed, device)
    elif name.startswith("zipf"):
        ids = zipf_table(float(name.removeprefix("zipf")), shape, seed, device)
    elif name.startswith("trace:"):
        ids = trace_table(RoutingTrace.load(Path(name.removeprefix("trace:"))), shape).to(device)
    else:
        raise ValueError(f"routing {name!r}: natural, uniform, zipf<exponent> or trace:<file>")
    scores = None if foresight is None else guess_scores(ids, shape.num_experts, foresight, seed)
    return Table(ids.cpu(), scores)


def guess_scores(ids: Tensor, num_experts: int, foresight: float, seed: int) -> Tensor:
    """Guesses of top_k experts a row, each right with the probability `foresight`, else one it does not use.

    Returns:
        [layers, steps, rows, experts] float16 on the host: top_k down to 1 for the guessed experts, else 0.
    """
    generator = torch.Generator(ids.device).manual_seed(seed)
    *size, top_k = ids.shape
    levels = torch.arange(top_k, 0, -1, dtype=torch.float16, device=ids.device).expand(*size[1:], top_k)
    scores = torch.empty(*size, num_experts, dtype=torch.float16)
    for layer, used in enumerate(ids.long()):
        noise = torch.rand(*size[1:], num_experts, generator=generator, device=ids.device)
        others = noise.scatter(-1, used, -1.0).topk(top_k).indices
        right = torch.rand(used.shape, generator=generator, device=ids.device) < foresight
        guessed = torch.where(right, used, others)
        scores[layer] = torch.zeros_like(noise, dtype=torch.float16).scatter(-1, guessed, levels)
    return scores


def zipf_table(exponent: float, shape: TableShape, seed: int, device: torch.device) -> Tensor:
    """Each row draws top_k experts without replacement, the r-th most popular with weight r ** -exponent.

    Which experts are popular differs from layer to layer. Draws are Gumbel maxima: the top_k largest of log
    weight plus noise are distributed like draws one after the other.
    """
    generator = torch.Generator(device).manual_seed(seed)
    ranks = torch.arange(1, shape.num_experts + 1, device=device)
    log_weights = -exponent * ranks.log()  # [experts] by popularity
    table = torch.empty(shape.layers, shape.steps, shape.rows, shape.top_k, dtype=torch.int32, device=device)
    noise = torch.empty(shape.steps, shape.rows, shape.num_experts, device=device)
    for layer in table:
        by_popularity = torch.randperm(shape.num_experts, generator=generator, device=device)
        noise.exponential_(generator=generator)
        layer.copy_(by_popularity[(log_weights - noise.log()).topk(shape.top_k).indices])
    return table


def trace_table(trace: RoutingTrace, shape: TableShape) -> Tensor:
    """Every row decodes its own stretch of the trace; a short trace begins again.

    Raises:
        ValueError: the trace is of a model of another shape, or has fewer tokens than there are rows.
    """
    layers, tokens, top_k = trace.ids.shape
    traced, wanted = (
        (layers, top_k, trace.num_experts),
        (shape.layers, shape.top_k, shape.num_experts),
    )
    if traced != wanted:
        raise ValueError(f"the trace has {traced} layers, top k and experts, the model {wanted}")
    if tokens < shape.rows:
        raise ValueError(f"the trace has {tokens} tokens, fewer than the {shape.rows} rows")
    stretches = np.arange(shape.rows) * (tokens // shape.rows)
    at = (stretches + np.arange(shape.steps)[:, None]) % tokens  # [steps, rows]
    return torch.from_numpy(trace.ids[:, at].astype(np.int32))
