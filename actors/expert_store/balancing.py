"""Which node holds which expert, by recorded loads: greedy and anti-correlation balancing (Huang et al., arXiv
2303.06182, section VII). Arithmetic over arrays; knows no bytes and moves nothing.

A *plan* is [layers, experts] int64, the number of the node of every expert. *Loads* are [windows, layers, experts]: how
many tokens of a window of the trace each expert got.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PAPER_CORRELATION_WEIGHT = 0.5
# On halves of the first halves of the traces in benchmarks/placement.py: everywhere within 0.7 points of the best weight
# from 0 to 1. The paper's lets a sum of correlations, each up to 1, outweigh mean loads, which sum to 1 in all: worse than
# greedy where routing is nearly balanced.
CORRELATION_WEIGHT = 0.05

Plan = NDArray[np.int64]


def share_out(num_layers: int, num_experts: int, capacities: Sequence[int]) -> NDArray[np.int64]:
    """How many experts of each layer every node takes, so that all are equally full in proportion to their room.

    The paper gives every device the same number of experts of a layer; so does this to nodes of one size.

    Args:
        capacities: experts that each node has room for, together at least `num_layers * num_experts`.
    Returns:
        [layers, nodes]; each row sums to `num_experts`, no column to more than its capacity.
    """
    assert num_layers * num_experts <= sum(capacities)
    room, taken = np.asarray(capacities, np.float64), np.zeros(len(capacities))
    quotas = np.zeros((num_layers, len(capacities)), np.int64)
    for layer in range(num_layers):
        for _ in range(num_experts):
            fullness = np.divide(taken + 1, room, out=np.full(len(room), np.inf), where=room > 0)
            emptiest = int(fullness.argmin())
            taken[emptiest] += 1
            quotas[layer, emptiest] += 1
    return quotas


def balance_greedily(loads: NDArray[np.int64], quotas: NDArray[np.int64]) -> Plan:
    """Experts by falling mean load, each to the node with the smallest load so far that has room (section VII-A)."""
    return _balance(loads, quotas, correlation_weight=0.0)


def balance_by_correlation(
    loads: NDArray[np.int64], quotas: NDArray[np.int64], weight: float = CORRELATION_WEIGHT
) -> Plan:
    """Greedy, but to an expert that is to be placed, one that lies on a node weighs its mean load plus `weight` times
    the Pearson correlation of the two over the windows: what is busy together is kept apart (section VII-B).
    """
    return _balance(loads, quotas, weight)


def _balance(loads: NDArray[np.int64], quotas: NDArray[np.int64], correlation_weight: float) -> Plan:
    shares = window_shares(loads)
    plan = np.empty(loads.shape[1:], np.int64)
    for layer, quota in enumerate(quotas):
        history = shares[:, layer]  # [windows, experts]
        weights = correlation_weight * correlations(history) if correlation_weight else None
        plan[layer] = _balance_layer(history.mean(0), weights, quota)
    return plan


def _balance_layer(
    mean_loads: NDArray[np.float64], weights: NDArray[np.float64] | None, quota: NDArray[np.int64]
) -> NDArray[np.int64]:
    """[experts], the node of each."""
    nodes = np.empty(len(mean_loads), np.int64)
    members = np.zeros((len(mean_loads), len(quota)))  # 1 where a node holds an expert
    for expert in (-mean_loads).argsort(kind="stable"):
        charged = mean_loads if weights is None else mean_loads + weights[expert]
        workload = np.where(members.sum(0) < quota, charged @ members, np.inf)
        nodes[expert] = workload.argmin()
        members[expert, nodes[expert]] = 1
    return nodes


def window_shares(loads: NDArray[np.int64]) -> NDArray[np.float64]:
    """Loads as shares of their window and layer: the paper's activation A; 0 where a layer routed nothing."""
    totals = loads.sum(-1, keepdims=True)
    shares: NDArray[np.float64] = loads / np.maximum(totals, 1)
    return shares


def correlations(history: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlation of every two experts; 0 with one whose load never changes.

    Args:
        history: [windows, experts].
    Returns:
        [experts, experts].
    """
    centred = history - history.mean(0)
    norms = np.sqrt((centred**2).sum(0))
    constant = norms < 1e-12  # shares are at most 1, so anything smaller is rounding
    scaled = np.where(constant, 0.0, centred / np.where(constant, 1.0, norms))
    matrix: NDArray[np.float64] = scaled.T @ scaled
    return matrix


@dataclass(frozen=True)
class MaxLoad:
    """The share of a batch's tokens that the most loaded node gets; 1 / nodes is perfect balance.

    Of a batch and a layer it is the largest share, over the nodes, of that layer's (token, chosen expert) pairs. The
    paper's *Avg Max Load* is its mean over batches (here also over layers), its *Max Load* the largest of all.
    """

    average: float
    worst: float


def max_load(loads: NDArray[np.int64], plan: Plan) -> MaxLoad:
    """Of a plan on loads, each window a batch; windows and layers that routed nothing do not count."""
    shares = window_shares(loads)
    on_nodes = plan[..., None] == np.arange(plan.max() + 1)  # [layers, experts, nodes]
    largest = np.einsum("wle,len->wln", shares, on_nodes.astype(np.float64)).max(-1)
    routed = largest[loads.sum(-1) > 0]
    return MaxLoad(float(routed.mean()), float(routed.max()))
