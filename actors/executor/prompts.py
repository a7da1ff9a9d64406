"""What the engine asks of whoever reads its prompts, and the plainest such, whose passes the host pages."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.lookahead import Lookahead
from actors.executor.passes import Pass
from actors.executor.predicted_routing import PredictedRouting
from actors.executor.runner import ModelRunner, RowInput
from actors.executor.sequence import PromptChunk

# Called with -1 when a pass begins, then with each MoE layer's number when its experts are computed, or queued.
AfterLayer = Callable[[int], None]

_MAX_PADDING = 0.25  # of the tokens that a pass reads


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

    runs_ahead: bool  # decode steps under way need not be complete
    reads_whole: bool  # a prompt is one chunk, whatever its length

    def joins(self, chunk: PromptChunk, chunks: Sequence[PromptChunk]) -> bool:
        """Whether a pass over `chunks` may read one more; a first one always."""

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
    """Reads chunks of about the same length together on a CPU: the shorter ones are padded.

    Args:
        routing: replaces the routers' choice; None lets them decide.
        lookahead: learns from what is routed; tables prefetch for prompts.
    """

    runs_ahead = reads_whole = False

    def __init__(
        self,
        runner: ModelRunner,
        routing: PredictedRouting | None = None,
        lookahead: Lookahead | None = None,
    ) -> None:
        self._runner, self._routing, self._lookahead = runner, routing, lookahead
        # A GPU's memory was shared out for passes over one chunk.
        self._reads_together = routing is None and runner.device.type == "cpu"

    def joins(self, chunk: PromptChunk, chunks: Sequence[PromptChunk]) -> bool:
        if not self._reads_together:
            return not chunks
        lengths = [each.num_tokens for each in (*chunks, chunk)]
        return len(lengths) * max(lengths) <= (1 + _MAX_PADDING) * sum(lengths)

    def read(self, chunks: Sequence[PromptChunk], after_layer: AfterLayer, paced: bool) -> PromptResult:
        routing = self._routing.of_prompt(chunks[0]) if self._routing else None
        followed = None
        if self._lookahead is not None:
            requests = [chunk.sequence.request_id for chunk in chunks]
            lengths = [chunk.num_tokens for chunk in chunks]
            followed = self._lookahead.follow(requests, lengths, predicts=False)
        pass_ = Pass(
            len(chunks),
            routing,
            keep_choices=routing is None,
            after_layer=after_layer,
            after_routing=None if followed is None else followed.routed,
        )
        inputs = [RowInput(chunk.sequence.row, chunk.start, chunk.token_ids) for chunk in chunks]
        logits = self._runner.run(inputs, pass_)
        choices = None if pass_.choices is None else _of_chunks(pass_.choices, chunks)
        return PromptResult(logits, pass_.needed, pass_.missed, pass_.fetched, choices)

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        with self._runner.interrupted():
            yield


def _of_chunks(
    choices: Sequence[NDArray[np.int64]], chunks: Sequence[PromptChunk]
) -> list[list[NDArray[np.int64]]]:
    """A pass' choices, [padded tokens of all chunks, top_k] per layer, as those of each chunk without padding."""
    by_row = [layer.reshape(len(chunks), -1, layer.shape[1]) for layer in choices]
    return [[layer[row, -chunk.num_tokens :] for layer in by_row] for row, chunk in enumerate(chunks)]
