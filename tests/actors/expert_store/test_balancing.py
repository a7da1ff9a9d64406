"""Balancing against loads whose best plan is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from actors.expert_store.balancing import (
    PAPER_CORRELATION_WEIGHT,
    balance_by_correlation,
    balance_greedily,
    correlations,
    max_load,
    share_out,
)


def one_layer(*windows: list[int]) -> NDArray[np.int64]:
    return np.array(windows)[:, None, :]


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any), st.integers(1, 6), st.integers(1, 12)
)
def test_quotas_fill_nodes_in_proportion_and_never_beyond_their_room(
    capacities: list[int], layers: int, experts: int
) -> None:
    layers = min(layers, sum(capacities) // experts)
    quotas = share_out(layers, experts, capacities)
    assert (quotas.sum(1) == experts).all()
    filled = quotas.sum(0)
    assert (filled <= capacities).all()
    full = layers * experts / sum(capacities)
    assert all(
        got >= int(full * room) - len(capacities) for got, room in zip(filled, capacities, strict=True)
    )


def test_equal_nodes_take_equally_many_experts_of_every_layer() -> None:
    assert (share_out(3, 8, [24] * 4) == 2).all()


def test_greedy_gives_each_expert_to_the_least_loaded_node_that_has_room() -> None:
    loads = one_layer([40, 25, 15, 10, 6, 4])
    # 40 | 25; 15 to the second (40); 10 to the first by the tie (50); the second is lighter and gets 6; 4 is left
    assert balance_greedily(loads, share_out(1, 6, [3, 3])).tolist() == [[0, 1, 1, 0, 1, 0]]
    # the second node is full after two
    assert balance_greedily(loads, np.array([[4, 2]])).tolist() == [[0, 1, 1, 0, 0, 0]]


def test_layers_are_balanced_each_for_itself() -> None:
    loads = np.array([[[9, 1, 1, 9], [1, 1, 9, 9]]])
    plan = balance_greedily(loads, share_out(2, 4, [4, 4]))
    assert plan[0, 0] != plan[0, 3] and plan[1, 2] != plan[1, 3]


def test_correlation_is_pearsons_and_0_with_what_never_changes() -> None:
    history = np.random.default_rng(0).random((20, 3))
    constant = np.full((20, 1), 0.1)
    expected = np.corrcoef(history, rowvar=False)
    found = correlations(np.hstack([history, constant]))
    assert np.allclose(found[:3, :3], expected)
    assert not found[3].any() and not found[:, 3].any()


@pytest.mark.parametrize("weight", [PAPER_CORRELATION_WEIGHT, 0.05])
def test_experts_that_are_busy_together_are_kept_apart(weight: float) -> None:
    loads = one_layer(*[[52, 48, 0, 0], [0, 0, 50, 50]] * 4)  # in turn 0 and 1, or 2 and 3
    quotas = share_out(1, 4, [2, 2])
    # greedy by the means 26, 24, 25, 25: 0 | 2, then 3 beside 2 or 0 and 1 where room is left
    together = max_load(loads, np.array([[0, 0, 1, 1]]))
    apart = max_load(loads, balance_by_correlation(loads, quotas, weight))
    assert (together.average, together.worst) == (1.0, 1.0)
    assert apart.average == pytest.approx(0.51) and apart.worst == pytest.approx(0.52)


def test_without_correlation_it_is_greedy() -> None:
    loads = np.random.default_rng(0).integers(100, size=(1, 5, 16))  # one window correlates nothing
    quotas = share_out(5, 16, [20] * 4)
    assert np.array_equal(balance_by_correlation(loads, quotas), balance_greedily(loads, quotas))


def test_max_load_is_the_share_of_the_most_loaded_node_of_each_window_and_layer() -> None:
    loads = np.array([[[6, 2, 1, 1], [0, 0, 0, 0]], [[0, 5, 5, 0], [1, 0, 0, 3]]])
    plan = np.array([[0, 0, 1, 1], [0, 1, 1, 0]])
    # layer 0: 0.8 and 0.5; layer 1: nothing routed, then 1.0
    assert max_load(loads, plan).average == pytest.approx((0.8 + 0.5 + 1.0) / 3)
    assert max_load(loads, plan).worst == 1.0


def test_skewed_loads_end_nearly_balanced() -> None:
    random = np.random.default_rng(0)
    popularity = 1 / np.arange(1, 33)
    loads = random.multinomial(4096, popularity / popularity.sum(), size=(40, 4))
    contiguous = np.tile(np.arange(32) // 8, (4, 1))
    balanced = balance_greedily(loads[:20], share_out(4, 32, [32] * 4))
    assert max_load(loads[20:], contiguous).average > 0.6
    assert (
        max_load(loads[20:], balanced).average < 0.32
    )  # 0.246 is the hottest expert; 7 others must lie beside it
