"""Pinned experts: who they are, that they never leave, and that paging works through the slots that are left."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.executor.build import build_engine
from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.expert_source import CheckpointExpertSource
from actors.executor.gpu.host_experts import HostExperts
from actors.executor.gpu.pager import DevicePager
from actors.executor.host_pager import HostPager
from actors.executor.pager import PrefetchCounts
from actors.executor.resident_set import count_pinned, load_pinned, most_used
from actors.expert_store.loads import ExpertLoads
from common.checkpoint import Checkpoint
from common.config import ServingConfig
from common.errors import ConfigError
from tests.actors.executor.harness import (
    PROMPTS,
    Harness,
    library_greedy,
    library_model,
    slot_model,
    start_engine,
)
from tests.actors.executor.test_pager import (
    EVICTIONS,
    NUM_EXPERTS,
    NUM_LAYERS,
    NumberedSource,
    make_pools,
    read,
    resident,
)
from tests.tiny_models import NUM_EXPERTS as TINY_EXPERTS
from tests.tiny_models import TOP_K, make_checkpoint

NUM_TOKENS = 8
PINNED = ([2, 4], [5])


def make_pager(kind: str, num_slots: int, eviction: str) -> HostPager | DevicePager:
    source, pools, cpu = NumberedSource(), make_pools(num_slots), torch.device("cpu")
    if kind == "host":
        policy = EVICTION_POLICIES[eviction]
        return HostPager(source, pools, NUM_EXPERTS, policy, cpu, True, pinned=PINNED)
    experts = HostExperts(source, NUM_LAYERS, NUM_EXPERTS, cpu)
    return DevicePager(source, pools, NUM_EXPERTS, experts, eviction, True, pinned=PINNED)


def test_the_most_used_come_first_and_the_unused_not_at_all() -> None:
    counts = np.array([[3, 0, 5, 3], [0, 0, 0, 1]])
    assert most_used(counts, 3) == [[2, 0, 3], [3]]
    assert most_used(counts, 1) == [[2], [3]]
    assert most_used(counts, 0) == [[], []]


def config(**args: object) -> ServingConfig:
    return ServingConfig.from_args({key: str(value) for key, value in args.items()}, {})


def test_a_quarter_of_the_slots_is_pinned_and_one_tokens_never() -> None:
    given = config(resident_set="x")
    assert [count_pinned(given, slots, 32, top_k=4) for slots in (4, 5, 8, 16, 31, 32)] == [0, 1, 2, 4, 7, 0]
    assert count_pinned(config(resident_set="x", pinned_experts=12), 16, 32, top_k=4) == 12
    assert count_pinned(config(resident_set="x", pinned_experts=0), 16, 32, top_k=4) == 0
    assert count_pinned(config(), 16, 32, top_k=4) == 0


def test_refuses_more_than_paging_can_spare() -> None:
    with pytest.raises(ConfigError, match="pinned_experts=13.*of 16 slots per layer 4 .*at most 12"):
        count_pinned(config(resident_set="x", pinned_experts=13), 16, 32, top_k=4)
    with pytest.raises(ConfigError, match="pinned_experts=1 .*set resident_set"):
        count_pinned(config(pinned_experts=1), 16, 32, top_k=4)


steps = st.lists(
    st.tuples(
        st.integers(0, NUM_LAYERS - 1),
        st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=3, unique=True),
        st.booleans(),
    ),
    max_size=15,
)


@given(steps=steps, num_slots=st.integers(3, 5), kind_and_eviction=st.sampled_from(EVICTIONS))
@settings(deadline=None, max_examples=60)
def test_pinned_experts_stay_whatever_is_read(
    steps: list[tuple[int, list[int], bool]], num_slots: int, kind_and_eviction: tuple[str, str]
) -> None:
    pager = make_pager(kind_and_eviction[0], num_slots, kind_and_eviction[1])
    load_pinned(pager, PINNED)
    for layer, expert_ids, is_prefetch in steps:
        if is_prefetch:
            with pager.host_pass():
                for expert_id in expert_ids:
                    pager.prefetch(layer, expert_id, keep=expert_ids)
        elif pager.fits(layer, np.array(expert_ids)):
            read(pager, layer, expert_ids)
        elif isinstance(pager, HostPager):
            with pager.streaming(layer, expert_ids) as slots:
                for expert_id, slot in slots:
                    value = pager._layers[layer].pool.views["down_proj"][slot]
                    assert (value == 10 * layer + expert_id).all()
        for each, pinned in enumerate(PINNED):
            assert set(pinned) <= set(resident(pager, each))


@pytest.mark.parametrize("kind", ["host", "device"])
def test_what_fits_leaves_pinned_experts_their_slots(kind: str) -> None:
    pager = make_pager(kind, 4, "lru")
    fits = [([0, 1], True), ([0, 1, 3], False), ([0, 1, 2, 4], True), ([0, 1, 2, 3, 4], False)]
    for expert_ids, expected in fits:
        assert pager.fits(0, np.array(expert_ids)) == expected, expert_ids
    assert pager.fits(1, np.array([0, 1, 2]))
    load_pinned(pager, PINNED)
    assert pager.wave_size <= 2
    if isinstance(pager, DevicePager):
        pager.refresh()
    assert pager.prefetches() == {"resident-set": PrefetchCounts(copied=3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    model = library_model(folder)
    return [library_greedy(model, prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("pinned", [[[0, 1], [2, 3], []], [[7], [1], [6]]])
def test_no_token_changes_however_few_slots_are_left(
    folder: Path, expected: list[list[int]], pinned: list[list[int]]
) -> None:
    harness = start_engine(slot_model(folder, TOP_K + max(map(len, pinned)), pinned=pinned))
    assert harness.generate(PROMPTS, max_tokens=NUM_TOKENS) == expected
    for layer, experts in zip(harness.engine.report().layers, pinned, strict=True):
        assert set(experts) <= set(layer.resident)
    harness.engine.stop()


def loads_of(folder: Path, path: Path) -> Path:
    random = np.random.default_rng(0)
    counts = random.integers(1, 100, size=(2, 3, TINY_EXPERTS))
    ExpertLoads(Checkpoint.open(folder).fingerprint, counts).save(path)
    return path


def test_an_engine_pins_what_the_file_names(folder: Path, expected: list[list[int]], tmp_path: Path) -> None:
    loads = loads_of(folder, tmp_path / "loads")
    settings = {
        "model": folder,
        "device": "cpu",
        "expert_slots": 5,
        "resident_set": loads,
        "pinned_experts": 3,
    }
    engine = build_engine(config(**settings), CheckpointExpertSource(Checkpoint.open(folder)))
    engine.start()
    harness = Harness(engine, slot_model=None)  # type: ignore[arg-type]  # not of interest
    assert harness.generate(PROMPTS, max_tokens=NUM_TOKENS) == expected
    engine.stop()
    pinned = most_used(ExpertLoads.load(loads).counts.sum(axis=0), 3)
    assert all(
        set(own) <= set(layer.resident) for own, layer in zip(pinned, engine.report().layers, strict=True)
    )
    assert engine.report().prefetches["resident-set"].copied > 0


def test_a_file_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    ExpertLoads("0123456789abcdef", np.ones((1, 3, TINY_EXPERTS), np.int64)).save(tmp_path / "loads")
    settings = {"model": folder, "device": "cpu", "resident_set": tmp_path / "loads"}
    with pytest.raises(ConfigError, match="resident_set=.*its loads are of model 0123456789abcdef"):
        build_engine(config(**settings), CheckpointExpertSource(Checkpoint.open(folder)))
