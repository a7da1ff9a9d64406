"""Exact eviction orders, and where each can be had."""

from pathlib import Path

import pytest

from actors.executor.build import build_engine
from actors.executor.eviction import (
    HALF_LIFE_PASSES,
    ActivationPolicy,
    DecayedLfuPolicy,
    FifoPolicy,
    InactiveLifoPolicy,
    LruPolicy,
)
from actors.executor.expert_source import CheckpointExpertSource
from common.checkpoint import Checkpoint
from common.config import ServingConfig
from common.errors import ConfigError
from tests.tiny_models import make_checkpoint


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


def test_inactive_lifo_evicts_what_was_loaded_last() -> None:
    policy = InactiveLifoPolicy()
    for expert_id in (2, 0, 1):
        policy.loaded(expert_id)
    policy.used([2, 0, 1])
    assert list(policy.victims()) == [1, 0, 2]
    policy.used([1])
    assert list(policy.victims()) == [1, 0, 2], "use does not count"
    policy.evicted(0)
    policy.loaded(0)
    policy.used([])
    assert list(policy.victims()) == [0, 1, 2]


def test_inactive_lifo_keeps_what_was_just_loaded() -> None:
    policy = InactiveLifoPolicy()
    policy.loaded(1)
    policy.used([1])
    policy.loaded(3)
    policy.loaded(2)
    assert list(policy.victims()) == [1, 2, 3], "loaded since the last pass: 3 and 2"


def test_activation_evicts_what_the_running_requests_used_least() -> None:
    policy = ActivationPolicy()
    for expert_id in (2, 0, 1):
        policy.loaded(expert_id)
    for expert_ids in ([0, 1], [0, 2], [0, 2], [0]):
        policy.used(expert_ids)
    assert list(policy.victims()) == [1, 2, 0]
    policy.evicted(2)
    policy.loaded(2)
    assert list(policy.victims()) == [1, 0, 2], "loaded since the last pass"
    policy.used([])
    assert list(policy.victims()) == [1, 2, 0], "what was evicted is remembered"


def test_activation_begins_anew_with_the_request_after_the_last() -> None:
    policy = ActivationPolicy()
    for expert_id in (2, 0, 1):
        policy.loaded(expert_id)
    for _ in range(3):
        policy.used([2])
    policy.requests_ended(1.0)
    assert list(policy.victims()) == [2, 0, 1], "equally active: in the order of loading"
    policy.used([0])
    assert list(policy.victims()) == [2, 1, 0]


def test_activation_forgets_a_request_in_its_share() -> None:
    policy = ActivationPolicy()
    policy.loaded(0)
    policy.loaded(1)
    for expert_ids in ([0], [0], [0]):
        policy.used(expert_ids)
    policy.requests_ended(0.5)  # one of two
    policy.used([1])
    assert list(policy.victims()) == [1, 0], "1.5 to 1"
    policy.used([1])
    assert list(policy.victims()) == [0, 1]


@pytest.mark.parametrize("eviction", ["inactive-lifo", "activation"])
def test_a_gpu_refuses_an_order_that_its_kernels_do_not_know(tmp_path: Path, eviction: str) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path, num_layers=2)
    source = CheckpointExpertSource(Checkpoint.open(folder))
    config = ServingConfig.from_args({"model": str(folder), "device": "cuda", "eviction": eviction}, {})
    with pytest.raises(ConfigError, match=f"eviction='{eviction}'.*on a GPU.* lru, fifo, lfu;.*device=cpu"):
        build_engine(config, source)
