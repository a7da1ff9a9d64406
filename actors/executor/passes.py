"""One forward of the model, a *pass*: whose tokens it carries, which routing it is given, which experts it used; and
the clock by which the prefetcher knows how far the passes are.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """Expert ids and weights that replace the routers' (SiDA-MoE, arXiv 2310.18859, algorithm 1)."""

    expert_ids: Tensor  # [layers, tokens, top_k] int64
    weights: Tensor  # [layers, tokens, top_k] float32

    def of_layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights of one layer, on the device and in the dtype of `like`."""
        return self.expert_ids[layer].to(like.device), self.weights[layer].to(like)


class DevicePass(Protocol):
    """A forward that is queued without the host looking at its routing."""

    def run_experts(
        self, layer: int, experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        """Queue one layer's experts. Args and result as `SlotExperts.forward`."""


# Called with the layer and, of each sequence, [its tokens, top_k] expert ids.
AfterRouting = Callable[[int, Sequence[NDArray[np.int64]]], None]


class Pass:
    """A forward over as many tokens of each of some sequences: of prompt chunks, or one token of each.

    Args:
        routing: replaces the routers' choice; None lets them decide.
        keep_choices: keep every layer's expert ids, for scoring a prediction later.
        after_routing: called when the routers of a layer have decided, before its experts are computed.
        after_layer: called with -1 when the pass begins, then with each MoE layer's number when its experts are
            computed, or queued.
    """

    def __init__(
        self,
        num_sequences: int,
        routing: Routing | None = None,
        keep_choices: bool = False,
        after_layer: Callable[[int], None] | None = None,
        after_routing: AfterRouting | None = None,
    ) -> None:
        self.num_sequences = num_sequences
        self.routing = routing
        self.after_layer, self.after_routing = after_layer, after_routing
        # [sequences] each. What is not in a slot when its layer begins is missed; of that, what is not on its way
        # there already is fetched by this pass.
        self.needed, self.missed, self.fetched = np.zeros((3, num_sequences), np.int64)
        # Per layer [tokens, top_k].
        self.choices: list[NDArray[np.int64]] | None = [] if keep_choices else None

    def record(self, ids: NDArray[np.int64], resident: NDArray[np.bool_], loading: NDArray[np.bool_]) -> None:
        """Account for one layer before it is computed.

        Args:
            ids: [tokens, top_k] chosen experts, sequence by sequence.
            resident, loading: [experts]; one and the same where nothing is missed.
        """
        needed = np.zeros((self.num_sequences, len(resident)), np.bool_)
        self._mark_needed(needed, ids)
        self.needed += needed.sum(axis=1)
        if loading is not resident:
            self.missed += (needed & ~resident).sum(axis=1)
            self.fetched += (needed & ~(resident | loading)).sum(axis=1)
        if self.choices is not None:
            self.choices.append(ids)

    def by_sequence(self, ids: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
        """[its tokens, top_k] of each sequence, padding included. Args: ids: [tokens, top_k] of one layer."""
        return list(ids.reshape(self.num_sequences, -1, ids.shape[1]))

    def _mark_needed(self, needed: NDArray[np.bool_], ids: NDArray[np.int64]) -> None:
        """Set those of needed [sequences, experts] that a sequence's ids [its tokens, top_k] name."""
        needed[np.arange(self.num_sequences)[:, None], ids.reshape(self.num_sequences, -1)] = True


class PassClock:
    """Counts MoE layers over all passes: layer l of pass p is at time p * num_layers + l.

    Args:
        num_encoder_layers: the first so many belong to an encoder, which passes over generated tokens leave out.
    """

    def __init__(self, num_layers: int, num_encoder_layers: int = 0) -> None:
        self.num_layers, self.num_encoder_layers = num_layers, num_encoder_layers
        self.passes_begun = 0
        self.running: Pass | DevicePass | None = None
        self._entered = -1  # the latest time whose layer has begun
        self._left = 0  # every earlier time's layer is over
        self._changed = threading.Condition()

    def begin_pass(self, begun: Pass | DevicePass) -> None:
        with self._changed:
            self.passes_begun += 1
            self.running = begun

    @property
    def num_predicted_layers(self) -> int:
        """The layers that a hash table tells of: an encoder's, whose tokens are known before, else all."""
        return self.num_encoder_layers or self.num_layers

    def skip_encoder(self) -> None:
        """The running pass, which has just begun, leaves the encoder out: its slots may be taken at once."""
        with self._changed:
            self._entered = (self.passes_begun - 1) * self.num_layers + self.num_encoder_layers - 1
            self._left = self._entered + 1
            self._changed.notify_all()

    def end_pass(self) -> None:
        """The pass is over, whether or not it reached its last layer."""
        with self._changed:
            self.running = None
            self._entered = self.passes_begun * self.num_layers - 1
            self._left = self.passes_begun * self.num_layers
            self._changed.notify_all()

    def enter(self, layer: int) -> None:
        with self._changed:
            self._entered = (self.passes_begun - 1) * self.num_layers + layer
            self._changed.notify_all()

    def leave(self, layer: int) -> None:
        with self._changed:
            self._left = (self.passes_begun - 1) * self.num_layers + layer + 1
            self._changed.notify_all()

    def is_over(self, pass_number: int, layer: int) -> bool:
        """Whether the layer has begun in that pass: too late to prefetch for it."""
        return self._entered >= pass_number * self.num_layers + layer

    def wait_for_turn(self, pass_number: int, layer: int, cancelled: threading.Event) -> bool:
        """Wait until the pass before has finished the layer (SiDA-MoE, section 3.4: only then may its slots be taken).

        Returns:
            Whether prefetching for it still makes sense.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: cancelled.is_set() or self._left > (pass_number - 1) * self.num_layers + layer
            )
            return not cancelled.is_set() and not self.is_over(pass_number, layer)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def to_routing(expert_ids: NDArray[np.uint16], weights: NDArray[np.float16]) -> Routing:
    """Args: both [layers, tokens, k], of a hash table."""
    return Routing(
        torch.from_numpy(expert_ids.astype(np.int64)), torch.from_numpy(weights.astype(np.float32))
    )
