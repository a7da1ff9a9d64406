"""The cache simulation against a plain cache that is driven by the executor's own eviction policy."""

import numpy as np
import numpy.typing as npt
import pytest

from actors.executor.eviction import LruPolicy
from benchmarks.gpu.cache_simulation import Simulation, frequency, last_use, next_use, share_out, simulate
from benchmarks.gpu.routing_trace import RoutingTrace

NUM_EXPERTS, TOP_K, STEPS, LAYERS = 16, 3, 200, 2


def random_trace(probabilities: bool = False) -> RoutingTrace:
    random = np.random.default_rng(0)
    logits = random.normal(size=(LAYERS, STEPS, NUM_EXPERTS)) + np.linspace(0, 2, NUM_EXPERTS)
    ids = (-logits).argsort(-1)[..., :TOP_K].astype(np.uint8)
    shares = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float16)
    return RoutingTrace(ids, NUM_EXPERTS, shares if probabilities else None)


def hits_of_lru_policy(ids: npt.NDArray[np.uint8], num_slots: int) -> list[int]:
    """What a cache of one layer hits when the policy is called as the pager calls it."""
    policy, resident, hits = LruPolicy(), set[int](), []
    for needed in (sorted(step) for step in ids.tolist()):
        hits.append(len(resident.intersection(needed)))
        for expert in needed:
            if expert not in resident:
                if len(resident) == num_slots:
                    victim = next(each for each in policy.victims() if each not in needed)
                    policy.evicted(victim)
                    resident.remove(victim)
                policy.loaded(expert)
                resident.add(expert)
        policy.used(needed)
    return hits


@pytest.mark.parametrize("num_slots", [3, 5, 8, 15])
def test_lru_hits_step_by_step_what_the_executors_policy_hits(num_slots: int) -> None:
    trace = random_trace()
    hits = simulate(trace.used(), last_use(trace.used()), np.full((1, LAYERS), num_slots))
    for layer in range(LAYERS):
        assert hits[:, 0, layer].tolist() == hits_of_lru_policy(trace.ids[layer], num_slots)


def test_no_order_beats_belady() -> None:
    used, slots = random_trace().used(), np.array([[3] * LAYERS, [6] * LAYERS, [12] * LAYERS])
    best = simulate(used, next_use(used), slots).sum((0, 2))
    for scores in (last_use(used), frequency(used)):
        assert (simulate(used, scores, slots).sum((0, 2)) <= best).all()


def test_with_a_slot_for_every_expert_each_misses_once() -> None:
    used = random_trace().used()
    hits = simulate(used, last_use(used), np.full((1, LAYERS), NUM_EXPERTS))
    assert used.sum() - hits.sum() == used.any(0).sum()


def test_a_step_that_needs_more_than_the_slots_keeps_as_many_as_fit() -> None:
    used = np.ones((3, 1, 4), np.bool_)
    assert simulate(used, last_use(used), np.array([[3]])).ravel().tolist() == [0, 3, 3]


def test_unequal_slots_go_where_they_save_the_most_misses() -> None:
    misses = np.array([[9.0, 9.0], [9.0, 8.0], [1.0, 8.0]])  # the first layer gains only at the largest size
    assert share_out(misses, np.array([2, 3, 4]), total_slots=6).tolist() == [4, 2]


def test_every_order_has_a_hit_rate_at_every_share() -> None:
    rows = Simulation(random_trace(probabilities=True), [0.25, 0.5], tokens=STEPS, batch=2).run()
    assert {"LRU", "Belady", "fitted"} <= {row["order"] for row in rows}
    assert all(0 < rate < 1 for row in rows for rate in row["equal"])
