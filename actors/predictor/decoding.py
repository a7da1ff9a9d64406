"""Which experts the coming layers of a pass will need, from what was routed so far: one interface, several answers.

Numpy only; nothing here moves an expert. What the tokens alone tell before a pass is `predictor`'s; the answer from hidden
states is in `next_gate`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Shares = NDArray[np.float32]

_TINY = np.finfo(np.float32).tiny
DEFAULT_CAPACITY = 120  # entries, as many as MoE-Infinity found enough


class DecodingPredictor(Protocol):
    """Follows requests through their passes, several of them in one pass. Not thread safe."""

    def begin_pass(self, requests: Sequence[str]) -> None:
        """A pass over tokens of these requests begins; one that was never named before begins with it."""

    def predict(self, layer: int) -> Shares:
        """Before a layer of the pass is routed: what it and the layers after it will need in this pass.

        Returns:
            [layers - layer, experts] float32: of each of these layers the share of its activations that an expert is
            expected to get, the mean over the pass' requests; 0 names nobody.
        """

    def observe(self, layer: int, expert_ids: Sequence[NDArray[np.int64]], hidden: Tensor | None) -> None:
        """A layer of the pass has been routed; every layer of a pass in its order.

        Args:
            expert_ids: of each request, in the order of `begin_pass`, [its tokens, top_k].
            hidden: [tokens, hidden], what the layer's router read; None where the predictor asks for none.
        """

    def end_request(self, request: str) -> None:
        """It takes part in no pass any more. One that took part in none is no error."""


def by_proximity(shares: Shares, num_layers: int) -> Shares:
    """What to copy first: shares, and the nearer layer before the later one.

    The factor is 1 - (i - l) / L for layer i of L, with layer l the next (MoE-Infinity, arXiv 2401.14361, on its
    prefetching priority).

    Args:
        shares: [coming layers, experts], as `DecodingPredictor.predict` gives them.
    """
    nearness = 1 - np.arange(len(shares), dtype=np.float32) / np.float32(num_layers)
    return shares * nearness[:, None]


def most_wanted(
    priority: Shares, absent: NDArray[np.bool_], num_slots: int, most: int
) -> Iterator[tuple[int, int, list[int]]]:
    """The absent experts to copy, the one of highest priority first.

    Of a layer's experts no more are wanted than there are slots, and none of them makes room for one that is not wanted
    more.

    Args:
        priority, absent: [coming layers, experts]; a priority of 0 wants nobody.
        most: experts at most.
    Yields:
        Row of the arguments, expert id, and the experts of that layer that must not make room.
    """
    threshold = np.partition(priority, -num_slots, axis=1)[:, -num_slots, None]
    wanted = np.where(absent & (priority >= threshold), priority, 0)  # [coming layers, experts]
    for index in (-wanted).argsort(axis=None, kind="stable")[:most].tolist():
        row, expert_id = divmod(index, wanted.shape[1])
        if wanted[row, expert_id] > 0:
            yield row, expert_id, (priority[row] >= priority[row, expert_id]).nonzero()[0].tolist()


class _Unchanging:
    """Names the same whatever happens."""

    def __init__(self, shares: Shares) -> None:
        """Args: shares: [layers, experts]."""
        self._shares = shares

    def begin_pass(self, requests: Sequence[str]) -> None:
        pass

    def predict(self, layer: int) -> Shares:
        return self._shares[layer:]

    def observe(self, layer: int, expert_ids: Sequence[NDArray[np.int64]], hidden: Tensor | None) -> None:
        pass

    def end_request(self, request: str) -> None:
        pass


class NoPredictor(_Unchanging):
    """Names nobody: every expert is fetched on demand."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(np.zeros((num_layers, num_experts), np.float32))


class FrequencyPredictor(_Unchanging):
    """Names what a recorded trace used most, whatever the request: a resident set per layer.

    A task needs few of the experts (task-specific expert pruning, arXiv 2206.00277); here the others stay available.
    """

    def __init__(self, counts: NDArray[np.int64]) -> None:
        """Args: counts: [layers, experts], activations in the trace."""
        super().__init__(_shares(counts.astype(np.float32)))


class ActivationTracePredictor:
    """Names what the most similar earlier request used: request-level tracing (MoE-Infinity, arXiv 2401.14361).

    A request's activation matrix counts, per layer and expert, the tokens that were routed there. Those of ended
    requests are kept in a bounded collection, as shares of each layer. The match has the largest cosine to a running
    request's matrix, over the layers that this one has seen so far. A full collection gives up the entry most similar
    to the new one.
    """

    def __init__(self, num_layers: int, num_experts: int, capacity: int = DEFAULT_CAPACITY) -> None:
        self._capacity = capacity
        self._nothing = np.zeros((num_layers, num_experts), np.float32)
        self._matrices: dict[str, Shares] = {}  # of running requests: activations so far
        self._in_pass: list[Shares] = []  # of those, the pass'
        self._entries = np.zeros((0, num_layers, num_experts), np.float32)  # shares
        self._squares = np.zeros((0, num_layers), np.float32)  # of the entries' lengths

    @property
    def num_entries(self) -> int:
        return len(self._entries)

    def begin_pass(self, requests: Sequence[str]) -> None:
        self._in_pass = [self._matrices.setdefault(each, self._nothing.copy()) for each in requests]

    def predict(self, layer: int) -> Shares:
        known = [matrix for matrix in self._in_pass if matrix.any()]
        if not len(self._entries) or not known:
            return self._nothing[layer:]
        matches = self._entries[self._nearest(np.stack(known)), layer:]  # [requests, coming layers, experts]
        shares: Shares = matches.sum(axis=0) / np.float32(len(self._in_pass))
        return shares

    def observe(self, layer: int, expert_ids: Sequence[NDArray[np.int64]], hidden: Tensor | None) -> None:
        for matrix, ids in zip(self._in_pass, expert_ids, strict=True):
            matrix[layer] += np.bincount(ids.reshape(-1), minlength=matrix.shape[1])

    def end_request(self, request: str) -> None:
        matrix = self._matrices.pop(request, self._nothing)
        if not matrix.any():
            return
        entry = _shares(matrix)
        square = np.square(entry).sum(axis=1)
        if len(self._entries) < self._capacity:
            self._entries = np.concatenate([self._entries, entry[None]])
            self._squares = np.concatenate([self._squares, square[None]])
        else:
            nearest = self._nearest(matrix[None])
            self._entries[nearest], self._squares[nearest] = entry, square

    def _nearest(self, matrices: Shares) -> NDArray[np.int64]:
        """[requests], numbers of entries. Args: matrices: [requests, layers, experts], none of them 0."""
        seen = matrices.any(axis=2).astype(np.float32)  # [requests, layers]
        shares = np.stack([_shares(matrix) for matrix in matrices]).reshape(len(matrices), -1)
        products = self._entries.reshape(len(self._entries), -1) @ shares.T  # [entries, requests]
        # 0 where a request ended within a pass. The running request's own length is the same for all.
        lengths = np.maximum(np.sqrt(self._squares @ seen.T), _TINY)
        nearest: NDArray[np.int64] = (products / lengths).argmax(axis=0)
        return nearest


class OraclePredictor:
    """Names exactly what each pass will need; for comparison only."""

    def __init__(self, passes: Iterable[NDArray[np.int64]], num_experts: int) -> None:
        """Args: passes: [tokens, layers, top_k] each, all that will be observed, in their order."""
        self._passes, self._num_experts = iter(passes), num_experts
        self._advance()

    def begin_pass(self, requests: Sequence[str]) -> None:
        pass

    def predict(self, layer: int) -> Shares:
        return self._shares[layer:]

    def observe(self, layer: int, expert_ids: Sequence[NDArray[np.int64]], hidden: Tensor | None) -> None:
        if layer == len(self._shares) - 1:
            self._advance()

    def end_request(self, request: str) -> None:
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
