"""Exact eviction orders."""

from actors.executor.eviction import HALF_LIFE_PASSES, DecayedLfuPolicy, FifoPolicy, LruPolicy


def test_lru_evicts_the_least_recently_used_first() -> None:
    policy = LruPolicy()
    for expert_id in (1, 2, 3):
        policy.loaded(expert_id)
    policy.used([1])
    assert list(policy.victims()) == [2, 3, 1]
    policy.evicted(2)
    policy.loaded(2)
    assert list(policy.victims()) == [3, 1, 2]
    policy.used([4, 3])  # 4 has left since
    assert list(policy.victims()) == [1, 2, 3]


def test_fifo_evicts_the_first_loaded_whatever_was_used() -> None:
    policy = FifoPolicy()
    for expert_id in (1, 2, 3):
        policy.loaded(expert_id)
    policy.used([1])
    assert list(policy.victims()) == [1, 2, 3]
    policy.evicted(1)
    policy.loaded(1)
    assert list(policy.victims()) == [2, 3, 1]


def test_lfu_evicts_what_was_used_least_often() -> None:
    policy = DecayedLfuPolicy()
    for expert_id in (0, 1, 2):
        policy.loaded(expert_id)
    for expert_ids in ([0, 1], [0, 2], [0]):
        policy.used(expert_ids)
    assert list(policy.victims()) == [1, 2, 0]


def test_lfu_forgets() -> None:
    policy = DecayedLfuPolicy()
    policy.loaded(0)
    policy.loaded(1)
    for _ in range(3):
        policy.used([0])
    for _ in range(4 * HALF_LIFE_PASSES):
        policy.used([])
    policy.used([1])
    assert list(policy.victims()) == [0, 1], "three uses long ago count less than one now"


def test_lfu_remembers_what_was_evicted_and_keeps_what_was_just_loaded() -> None:
    policy = DecayedLfuPolicy()
    policy.loaded(0)
    for _ in range(5):
        policy.used([0])
    policy.evicted(0)
    policy.loaded(1)
    policy.used([1])
    policy.loaded(0)
    policy.loaded(2)
    assert list(policy.victims()) == [1, 2, 0], "loaded since the last pass: 0 and 2"
    policy.used([])
    assert list(policy.victims()) == [2, 1, 0]


def test_lfu_keeps_its_order_however_long_it_runs() -> None:
    policy = DecayedLfuPolicy()
    for expert_id in (0, 1):
        policy.loaded(expert_id)
    for _ in range(100 * HALF_LIFE_PASSES):
        policy.used([0])
    policy.used([1])
    assert list(policy.victims()) == [1, 0]
