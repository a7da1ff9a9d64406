"""Copies the experts of coming layers while a pass computes: a decoding predictor names them, a thread copies them.

The pass' thread only leaves word of what was routed. A prediction moves experts earlier and no more: whatever is late,
wrong or given up, the pager fetches on demand.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.pager import Pager
from actors.executor.passes import PassClock
from actors.predictor.decoding import DecodingPredictor, by_proximity, most_wanted

logger = logging.getLogger(__name__)

COPIES_AHEAD = 2  # per layer
_MAX_PASSES_BEHIND = 4  # before a pass goes unnoticed


class FollowedPass:
    """One pass, as the lookahead hears of it."""

    def __init__(
        self, lookahead: "Lookahead", number: int, lengths: Sequence[int] | None, predicts: bool
    ) -> None:
        self.number, self.predicts = number, predicts
        self.num_copied = 0  # experts so far
        self._lookahead, self._lengths = lookahead, lengths

    def routed(self, layer: int, expert_ids: Sequence[NDArray[np.int64]]) -> None:
        """For `Pass.after_routing`."""
        if self._lengths is not None:
            expert_ids = [ids[-length:] for ids, length in zip(expert_ids, self._lengths, strict=True)]
        self._lookahead.leave_word(self, layer, expert_ids)


@dataclass(frozen=True)
class _Begun:
    pass_: FollowedPass
    requests: Sequence[str]


@dataclass(frozen=True)
class _Routed:
    pass_: FollowedPass
    layer: int
    expert_ids: Sequence[NDArray[np.int64]]
    hidden: Tensor | None


@dataclass(frozen=True)
class _Ended:
    request: str


class Lookahead:
    """
    Args:
        name: of the predictor, under which copies are counted.
        last_read: gives what the router of a layer has just read, [tokens, hidden], to predictors that ask for it.
        copies: experts per layer and pass that are copied ahead, at most.
    """

    def __init__(
        self,
        predictor: DecodingPredictor,
        name: str,
        pager: Pager,
        clock: PassClock,
        last_read: Callable[[int], Tensor] | None = None,
        copies: int = COPIES_AHEAD,
    ) -> None:
        self.name = name
        self._predictor, self._pager, self._clock = predictor, pager, clock
        self._last_read, self._copies = last_read, copies
        self._words: queue.SimpleQueue[_Begun | _Routed | _Ended | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lookahead", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Twice is fine."""
        self._words.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def follow(
        self, requests: Sequence[str], lengths: Sequence[int] | None = None, predicts: bool = True
    ) -> FollowedPass | None:
        """The coming pass carries tokens of these requests.

        Args:
            lengths: of each request its tokens, where shorter ones begin with padding.
            predicts: whether to copy for it; what it routes is learned from in any case.
        Returns:
            None where the predictor is so far behind that it leaves this pass out.
        """
        if self._words.qsize() > _MAX_PASSES_BEHIND * self._clock.num_layers:
            return None
        pass_ = FollowedPass(self, self._clock.passes_begun, lengths, predicts)
        self._words.put(_Begun(pass_, requests))
        return pass_

    def leave_word(self, pass_: FollowedPass, layer: int, expert_ids: Sequence[NDArray[np.int64]]) -> None:
        hidden = None if self._last_read is None else self._last_read(layer)
        self._words.put(_Routed(pass_, layer, expert_ids, hidden))

    def end_request(self, request: str) -> None:
        """The request was finished, failed or cancelled."""
        self._words.put(_Ended(request))

    def _run(self) -> None:
        while (word := self._words.get()) is not None:
            try:
                self._take(word)
            except Exception:  # what was not copied is fetched on demand, where errors are answered
                logger.warning("Copying ahead was given up for a layer", exc_info=True)

    def _take(self, word: _Begun | _Routed | _Ended) -> None:
        if isinstance(word, _Ended):
            self._predictor.end_request(word.request)
        elif isinstance(word, _Begun):
            self._predictor.begin_pass(word.requests)
            self._copy(word.pass_, self._clock.num_encoder_layers)
        else:
            self._predictor.observe(word.layer, word.expert_ids, word.hidden)
            self._copy(word.pass_, word.layer + 1)

    def _copy(self, pass_: FollowedPass, first_layer: int) -> None:
        """Copy for the coming layers, until there is newer word of what they will need."""
        num_layers = self._clock.num_layers
        if not pass_.predicts or first_layer == num_layers or self._has_word():
            return
        priority = by_proximity(self._predictor.predict(first_layer), num_layers)
        if not priority.any():
            return
        absent = np.stack([~self._pager.resident(layer) for layer in range(first_layer, num_layers)])
        for row, expert_id, keep in most_wanted(priority, absent, self._pager.num_slots, self._copies):
            layer = first_layer + row
            if self._has_word():
                return
            if not self._clock.is_over(pass_.number, layer):
                pass_.num_copied += self._pager.prefetch(layer, expert_id, keep, self.name)

    def _has_word(self) -> bool:
        return not self._words.empty()
