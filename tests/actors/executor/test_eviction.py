"""Exact eviction orders."""

from actors.executor.eviction import FifoPolicy, LruPolicy


def test_lru_evicts_the_least_recently_used_first() -> None:
    policy = LruPolicy()
    for expert_id in (1, 2, 3):
        policy.loaded(expert_id)
    policy.used([1])
    assert list(policy.victims()) == [2, 3, 1]
    policy.evicted(2)
    policy.loaded(2)
    assert list(policy.victims()) == [3, 1, 2]


def test_fifo_evicts_the_first_loaded_whatever_was_used() -> None:
    policy = FifoPolicy()
    for expert_id in (1, 2, 3):
        policy.loaded(expert_id)
    policy.used([1])
    assert list(policy.victims()) == [1, 2, 3]
    policy.evicted(1)
    policy.loaded(1)
    assert list(policy.victims()) == [2, 3, 1]
