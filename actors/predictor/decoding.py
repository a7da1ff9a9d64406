"""Which experts the coming layers of a decode step will need, from what was routed so far: one interface, four answers.

Numpy only. Nothing here moves an expert, and nothing looks at hidden states or at tokens (`predictor` does).
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Shares = NDArray[np.float32]

_TINY = np.finfo(np.float32).tiny
DEFAULT_CAPACITY = 120  # entries, as many as MoE-Infinity found enough


class DecodingPredictor(Protocol):
    """Follows one request after the other through their passes. Not thread safe."""

    def predict(self, layer: int) -> Shares:
        """Before a layer is routed: what it and the layers after it will need in this pass.

        Returns:
            [layers - layer, experts] float32: of each of these layers the share of its activations that an expert is
            expected to get; 0 names nobody.
        """

    def observe(self, layer: int, expert_ids: NDArray[np.int64]) -> None:
        """A layer has been routed; every layer of a pass in its order, pass after pass.

        Args:
            expert_ids: [tokens, top_k].
        """

    def end_request(self) -> None:
        """What is observed from now on is another request's."""


def by_proximity(shares: Shares, num_layers: int) -> Shares:
    """What to copy first: shares, and the nearer layer before the later one.

    The factor is 1 - (i - l) / L for layer i of L, with layer l the next (MoE-Infinity, arXiv 2401.14361, on its
    prefetching priority).

    Args:
        shares: [coming layers, experts], as `DecodingPredictor.predict` gives them.
    """
    nearness = 1 - np.arange(len(shares), dtype=np.float32) / np.float32(num_layers)
    return shares * nearness[:, None]


class NoPredictor:
    """Names nobody: every expert is fetched on demand."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._nothing = np.zeros((num_layers, num_experts), np.float32)

    def predict(self, layer: int) -> Shares:
        return self._nothing[layer:]

    def observe(self, layer: int, expert_ids: NDArray[np.int64]) -> None:
        pass

    def end_request(self) -> None:
        pass


class FrequencyPredictor:
    """Names what a recorded trace used most, whatever the request: a resident set per layer.

    A task needs few of the experts (task-specific expert pruning, arXiv 2206.00277); here the others stay available.
    """

    def __init__(self, counts: NDArray[np.int64]) -> None:
        """Args: counts: [layers, experts], activations in the trace."""
        self._shares = _shares(counts.astype(np.float32))

    def predict(self, layer: int) -> Shares:
        return self._shares[layer:]

    def observe(self, layer: int, expert_ids: NDArray[np.int64]) -> None:
        pass

    def end_request(self) -> None:
        pass


class ActivationTracePredictor:
    """Names what the most similar earlier request used: request-level tracing (MoE-Infinity, arXiv 2401.14361).

    A request's activation matrix counts, per layer and expert, the tokens that were routed there. Those of ended
    requests are kept in a bounded collection, as shares of each layer. The match has the largest cosine to the running
    request's matrix, over the layers that this one has seen so far. A full collection gives up the entry most similar
    to the new one.
    """

    def __init__(self, num_layers: int, num_experts: int, capacity: int = DEFAULT_CAPACITY) -> None:
        self._capacity = capacity
        self._nothing = np.zeros((num_layers, num_experts), np.float32)
        self._running = self._nothing.copy()  # activations so far
        self._entries = np.zeros((0, num_layers, num_experts), np.float32)  # shares

    @property
    def num_entries(self) -> int:
        return len(self._entries)

    def predict(self, layer: int) -> Shares:
        if not len(self._entries) or not self._running.any():
            return self._nothing[layer:]
        shares: Shares = self._entries[self._nearest(), layer:]
        return shares

    def observe(self, layer: int, expert_ids: NDArray[np.int64]) -> None:
        self._running[layer] += np.bincount(expert_ids.reshape(-1), minlength=self._running.shape[1])

    def end_request(self) -> None:
        if not self._running.any():
            return
        entry = _shares(self._running)
        if len(self._entries) < self._capacity:
            self._entries = np.concatenate([self._entries, entry[None]])
        else:
            self._entries[self._nearest()] = entry
        self._running[:] = 0

    def _nearest(self) -> int:
        running = _shares(self._running)
        seen = running.any(axis=1)  # [layers]
        entries = self._entries[:, seen].reshape(len(self._entries), -1)
        lengths = np.maximum(np.linalg.norm(entries, axis=1), _TINY)  # 0 where a request ended within a pass
        cosines = (
            entries @ running[seen].reshape(-1) / lengths
        )  # the running request's length is the same for all
        return int(cosines.argmax())


class OraclePredictor:
    """Names exactly what each pass will need; for comparison only."""

    def __init__(self, passes: Iterable[NDArray[np.int64]], num_experts: int) -> None:
        """Args: passes: [tokens, layers, top_k] each, all that will be observed, in their order."""
        self._passes, self._num_experts = iter(passes), num_experts
        self._advance()

    def predict(self, layer: int) -> Shares:
        return self._shares[layer:]

    def observe(self, layer: int, expert_ids: NDArray[np.int64]) -> None:
        if layer == len(self._shares) - 1:
            self._advance()

    def end_request(self) -> None:
        pass

    def _advance(self) -> None:
        if (coming := next(self._passes, None)) is not None:
            self._shares = _shares(count_activations(coming, self._num_experts).astype(np.float32))


def count_activations(expert_ids: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """[layers, experts]: tokens that chose each expert. Args: expert_ids: [tokens, layers, top_k]."""
    by_layer = expert_ids.swapaxes(0, 1).reshape(expert_ids.shape[1], -1)
    return np.stack([np.bincount(ids, minlength=num_experts) for ids in by_layer])


def _shares(counts: Shares) -> Shares:
    """Of each layer's sum; 0 where nothing was counted. Args: counts: [layers, experts]."""
    shares: Shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares
