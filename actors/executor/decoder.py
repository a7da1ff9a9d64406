"""What the engine asks of whoever runs its decode steps, and the plainest such: one pass at a time, sampled on the host."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.lookahead import Lookahead
from actors.executor.passes import Pass
from actors.executor.predicted_routing import PredictedRouting
from actors.executor.runner import RowInput
from actors.executor.sampler import sample
from actors.executor.sequence import Sequence
from common.generation import TokenLogprobs


@dataclass(frozen=True)
class Drawn:
    """A sequence's next token, or a classifier's logits; neither where the model's logits were not numbers."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    label_logits: tuple[float, ...] | None = None


@dataclass(frozen=True)
class StepResult:
    """One decode step over some sequences. The arrays are [sequences] int64, as `Pass` counts them."""

    drawn: SequenceOf[Drawn]
    needed: NDArray[np.int64]
    missed: NDArray[np.int64]
    fetched: NDArray[np.int64]


class PendingStep(Protocol):
    def result(self) -> StepResult:
        """Wait for the step. To be called once, in the order of the launches."""


class Decoder(Protocol):
    """Runs decode steps. Every call comes from the engine's thread."""

    runs_ahead: bool  # a step may be launched before the result of the one before is known

    def first(self, sequences: SequenceOf[Sequence], logits: Tensor) -> SequenceOf[Drawn]:
        """Draw the tokens after some prompts, and get the sequences' rows ready for decoding.

        Args:
            logits: [sequences, vocab] float32, of each prompt's last token.
        """

    def launch(self, batch: SequenceOf[Sequence]) -> PendingStep:
        """Queue a step: the last token of each sequence goes in, its next one comes out."""

    def idle(self) -> None:
        """The engine has nothing to launch."""


@dataclass(frozen=True)
class _Finished:
    outcome: StepResult

    def result(self) -> StepResult:
        return self.outcome


class StepRunner(Protocol):
    def run(self, inputs: SequenceOf[RowInput], pass_: Pass) -> Tensor:
        """As `ModelRunner.run`, for one token of each row."""


class HostDecoder:
    """Steps that the host drives layer by layer.

    Args:
        routing: replaces the routers' choice; None lets them decide.
        lookahead: copies experts of coming layers meanwhile.
    """

    runs_ahead = False

    def __init__(
        self,
        runner: StepRunner,
        routing: PredictedRouting | None = None,
        lookahead: Lookahead | None = None,
    ) -> None:
        self._runner, self._routing, self._lookahead = runner, routing, lookahead

    def first(self, sequences: SequenceOf[Sequence], logits: Tensor) -> SequenceOf[Drawn]:
        return _draw(sequences, logits)

    def launch(self, batch: SequenceOf[Sequence]) -> PendingStep:
        followed = None if self._lookahead is None else self._lookahead.follow([s.request_id for s in batch])
        pass_ = Pass(
            len(batch),
            self._routing.of_batch(batch) if self._routing else None,
            after_routing=None if followed is None else followed.routed,
        )
        inputs = [RowInput(s.row, s.num_computed, (s.generated[-1],)) for s in batch]
        logits = self._runner.run(inputs, pass_)
        fetched = pass_.fetched if followed is None else pass_.fetched + followed.num_copied
        return _Finished(StepResult(_draw(batch, logits), pass_.needed, pass_.missed, fetched))

    def idle(self) -> None:
        pass


def _draw(batch: SequenceOf[Sequence], logits: Tensor) -> list[Drawn]:
    broken = logits.isnan().any(dim=-1).tolist()
    tokens = sample([s.sampler for s in batch], logits.nan_to_num() if any(broken) else logits)
    return [
        Drawn(None if is_broken else token_id, logprobs)
        for (token_id, logprobs), is_broken in zip(tokens, broken, strict=True)
    ]
