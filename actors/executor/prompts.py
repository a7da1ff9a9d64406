"""What the engine asks of whoever reads its prompts, and the plainest such: one chunk at a time, paged by the host."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.passes import Pass
from actors.executor.predicted_routing import PredictedRouting
from actors.executor.runner import ModelRunner, RowInput
from actors.executor.sequence import PromptChunk

# Called with -1 when a pass begins, then with each MoE layer's number when its experts are computed, or queued.
AfterLayer = Callable[[int], None]


@dataclass(frozen=True)
class PromptResult:
    """One pass over prompt chunks, complete. The arrays are [chunks] int64, as `Pass` counts them."""

    logits: Tensor  # [chunks, vocab] float32, of each chunk's last token, on the model's device
    needed: NDArray[np.int64]
    missed: NDArray[np.int64]
    fetched: NDArray[np.int64]
    # Per chunk and layer what the routers chose, [tokens, top_k]; None where a table routed.
    choices: Sequence[Sequence[NDArray[np.int64]]] | None


class PromptReader(Protocol):
    """Computes prompts into cache rows. Every call comes from the engine's thread."""

    max_chunks: int  # of one pass
    runs_ahead: bool  # decode steps under way need not be complete

    def read(self, chunks: Sequence[PromptChunk], after_layer: AfterLayer, paced: bool) -> PromptResult:
        """
        Args:
            chunks: of different sequences, whose earlier chunks were read.
            after_layer: may launch decode steps, within `interrupted`.
            paced: call it at about the time at which the device is done with the layer.
        """

    def interrupted(self) -> AbstractContextManager[None]:
        """Within `after_layer`: a decode step may be launched in the body."""


class HostPrompts:
    """
    Args:
        routing: replaces the routers' choice; None lets them decide.
    """

    max_chunks = 1
    runs_ahead = False

    def __init__(self, runner: ModelRunner, routing: PredictedRouting | None = None) -> None:
        self._runner, self._routing = runner, routing

    def read(self, chunks: Sequence[PromptChunk], after_layer: AfterLayer, paced: bool) -> PromptResult:
        (chunk,) = chunks
        routing = self._routing.of_prompt(chunk) if self._routing else None
        pass_ = Pass(1, routing, keep_choices=routing is None, after_layer=after_layer)
        logits = self._runner.run([RowInput(chunk.sequence.row, chunk.start, chunk.token_ids)], pass_)
        choices = None if pass_.choices is None else [pass_.choices]
        return PromptResult(logits, pass_.needed, pass_.missed, pass_.fetched, choices)

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        with self._runner.interrupted():
            yield
