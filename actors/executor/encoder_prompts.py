"""Reads prompts that an encoder takes whole, several in one pass; and what a classifier makes of them."""

from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.decoder import Decoder, Drawn, HostDecoder, PendingStep
from actors.executor.encoder_decoder import EncoderDecoderRunner
from actors.executor.lookahead import Lookahead
from actors.executor.packed_encoder import ClassifierRunner, EncoderRunner, SourcePass
from actors.executor.passes import Routing
from actors.executor.predicted_routing import PredictedRouting
from actors.executor.prompts import AfterLayer, PromptReader, PromptResult
from actors.executor.sequence import PromptChunk, Sequence


class EncoderPrompts:
    """
    Args:
        max_tokens: of a pass over several prompts; a longer one has a pass of its own.
        routing: routes the encoder; None lets the routers decide, as a decoder's always do.
        lookahead: learns from what is routed; tables prefetch for prompts.
    """

    runs_ahead = False
    reads_whole = True

    def __init__(
        self,
        runner: EncoderRunner,
        max_tokens: int,
        routing: PredictedRouting | None = None,
        lookahead: Lookahead | None = None,
    ) -> None:
        self._runner, self._max_tokens, self._routing = runner, max_tokens, routing
        self._lookahead = lookahead

    def joins(self, chunk: PromptChunk, chunks: SequenceOf[PromptChunk]) -> bool:
        return not chunks or sum(each.num_tokens for each in (*chunks, chunk)) <= self._max_tokens

    def read(self, chunks: SequenceOf[PromptChunk], after_layer: AfterLayer, paced: bool) -> PromptResult:
        lengths = [chunk.num_tokens for chunk in chunks]
        routing = (
            None if self._routing is None else joined_routing([self._routing.of_source(c) for c in chunks])
        )
        followed = None
        if self._lookahead is not None:
            followed = self._lookahead.follow([c.sequence.request_id for c in chunks], predicts=False)
        pass_ = SourcePass(
            lengths,
            routing,
            keep_choices=routing is None,
            after_layer=after_layer,
            after_routing=None if followed is None else followed.routed,
        )
        rows = [chunk.sequence.row for chunk in chunks]
        logits = self._runner.read(rows, [chunk.token_ids for chunk in chunks], pass_)
        if routing is not None:
            for chunk, needed in zip(chunks, pass_.source_needed.tolist(), strict=True):
                chunk.sequence.num_table_routed = needed
        choices = None if pass_.source_choices is None else _of_sources(pass_.source_choices, lengths)
        return PromptResult(logits, pass_.needed, pass_.missed, pass_.fetched, choices)

    def interrupted(self) -> AbstractContextManager[None]:
        raise NotImplementedError("no decoder of a model with an encoder runs ahead")


class Classifier:
    """In the place of a decoder: a sequence ends with its prompt."""

    runs_ahead = False

    def first(self, sequences: SequenceOf[Sequence], logits: Tensor) -> SequenceOf[Drawn]:
        return [
            Drawn(None, label_logits=tuple(row.tolist())) if bool(row.isfinite().all()) else Drawn(None)
            for row in logits.cpu()
        ]

    def launch(self, batch: SequenceOf[Sequence]) -> PendingStep:
        raise NotImplementedError("a classifier generates nothing")

    def idle(self) -> None:
        pass


def encoder_passes(
    runner: EncoderDecoderRunner | ClassifierRunner,
    max_tokens: int,
    routing: PredictedRouting | None,
    lookahead: Lookahead | None,
) -> tuple[PromptReader, Decoder]:
    """Args: as `EncoderPrompts`; the lookahead prefetches for decode steps."""
    decoder = (
        HostDecoder(runner, lookahead=lookahead) if isinstance(runner, EncoderDecoderRunner) else Classifier()
    )
    return EncoderPrompts(runner, max_tokens, routing, lookahead), decoder


def joined_routing(routings: SequenceOf[Routing]) -> Routing:
    """Of packed sources."""
    return Routing(
        torch.cat([routing.expert_ids for routing in routings], dim=1),
        torch.cat([routing.weights for routing in routings], dim=1),
    )


def _of_sources(
    choices: SequenceOf[NDArray[np.int64]], lengths: SequenceOf[int]
) -> list[list[NDArray[np.int64]]]:
    """A pass' choices, [tokens of all sources, top_k] per layer, as those of each source."""
    by_layer = [np.split(layer, np.cumsum(lengths)[:-1]) for layer in choices]
    return [list(source) for source in zip(*by_layer, strict=True)]
