"""When prefetching is switched off, and when it gets another chance."""

import numpy as np
import pytest

from actors.executor.gpu.prefetch_governor import (
    PrefetchGovernor,
    affordable_prefetches,
    break_even_precision,
)


def test_break_even_weighs_what_is_hidden_against_what_is_in_the_way() -> None:
    assert break_even_precision(copy_s=200e-6, window_s=80e-6) == pytest.approx(0.6)
    assert break_even_precision(copy_s=30e-6, window_s=80e-6) == 0.1, "wrong guesses cost nothing there"


def test_no_more_is_prefetched_than_fits_beside_the_compute() -> None:
    assert affordable_prefetches(copy_s=35e-6, window_s=40e-6, most=4) == 1
    assert affordable_prefetches(copy_s=10e-6, window_s=33e-6, most=4) == 3
    assert affordable_prefetches(copy_s=1e-6, window_s=50e-6, most=4) == 4
    assert affordable_prefetches(copy_s=200e-6, window_s=50e-6, most=4) == 1, "if it guesses well enough"


def begun(num_layers: int) -> PrefetchGovernor:
    """Before its first review nothing had been prefetched."""
    governor = PrefetchGovernor(num_layers, break_even=0.5, most=4)
    nothing = np.zeros(num_layers, np.int64)
    assert governor.review(nothing, nothing).tolist() == [4] * num_layers
    return governor


def test_layer_that_guesses_badly_is_switched_off_alone() -> None:
    governor = begun(num_layers=2)
    assert governor.review(np.array([100, 100]), np.array([60, 40])).tolist() == [4, 0]


def test_what_others_prefetched_before_is_not_judged() -> None:
    governor = PrefetchGovernor(num_layers=1, break_even=0.5, most=4)
    assert governor.review(np.array([100]), np.array([0])).tolist() == [4], "an executor was warmed up"
    assert governor.review(np.array([200]), np.array([40])).tolist() == [0]


def test_few_guesses_are_no_ground_for_a_judgement() -> None:
    governor = begun(num_layers=1)
    assert governor.review(np.array([20]), np.array([0])).tolist() == [4]
    assert governor.review(np.array([40]), np.array([0])).tolist() == [0], "with the twenty before"


def test_switched_off_layer_is_probed_again() -> None:
    governor = begun(num_layers=1)
    prefetched, used = np.array([100]), np.array([0])
    budgets = [int(governor.review(prefetched, used)[0]) for _ in range(60)]
    assert budgets[0] == 0
    again = budgets.index(4)
    assert 10 < again < 50
    assert governor.review(prefetched + 100, used + 90).tolist() == [4], "it guesses well by now"
    assert governor.review(prefetched + 200, used + 95).tolist() == [0]
