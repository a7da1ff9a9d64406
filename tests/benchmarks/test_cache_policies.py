"""The simulation against the engine, against a simulation of another kind, and by its own definitions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.executor.eviction import EVICTION_POLICIES, EvictionPolicy, LruPolicy
from actors.predictor.decoding import DecodingPredictor, FrequencyPredictor, NoPredictor, OraclePredictor
from actors.predictor.network import WeightRule
from actors.predictor.traces import TraceBatch, TraceFiles, TraceHeader, TraceWriter
from benchmarks.cache_policies import __main__ as command
from benchmarks.cache_policies.cells import BELADY, PREDICTORS, Cell, Workload
from benchmarks.cache_policies.engine_check import POLICIES, compare_with_engine
from benchmarks.cache_policies.simulation import Counts, Ids, belady, simulate, split
from benchmarks.gpu.cache_simulation import last_use, next_use
from benchmarks.gpu.cache_simulation import simulate as simulate_by_score
from common.checkpoint import Checkpoint
from common.errors import CheckpointError, ConfigError
from tests.tiny_models import NUM_EXPERTS, TOP_K, VOCAB_SIZE, make_checkpoint

LAYERS, TOKENS = 2, 60


def random_request(seed: int, tokens: int = TOKENS) -> Ids:
    """[tokens, layers, top_k], some experts likelier than others."""
    random = np.random.default_rng(seed)
    scores = random.normal(size=(tokens, LAYERS, NUM_EXPERTS)) + np.linspace(0, 2, NUM_EXPERTS)
    return (-scores).argsort(-1)[..., :TOP_K]


REQUESTS = [random_request(seed) for seed in range(4)]
NOBODY = NoPredictor(LAYERS, NUM_EXPERTS)


def simulated(
    policy: Callable[[], EvictionPolicy],
    slots: int,
    predictor: DecodingPredictor = NOBODY,
    requests: list[Ids] = REQUESTS,
    **options: Any,
) -> Counts:
    return simulate([split(ids) for ids in requests], NUM_EXPERTS, slots, policy, predictor, **options)


def belady_of(requests: list[Ids]) -> Callable[[], EvictionPolicy]:
    return belady([split(ids) for ids in requests], NUM_EXPERTS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"), num_layers=LAYERS)


def test_the_engine_hits_what_the_simulation_hits(checkpoint: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(VOCAB_SIZE, (3, 40), generator=generator).tolist()
    fingerprint = Checkpoint.open(checkpoint).fingerprint
    rows = compare_with_engine(Workload(fingerprint, NUM_EXPERTS, REQUESTS[:3], token_ids), checkpoint)
    assert [row["policy"] for row in rows] == list(POLICIES)
    for row in rows:
        assert row["slots"] == NUM_EXPERTS // 4
        assert 0 < row["engine_hits"] < row["needed"]
        assert row["engine_hits"] == row["simulated_hits"], row["policy"]


def test_the_engine_refuses_the_trace_of_another_model(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="trace is of another model"):
        compare_with_engine(Workload("another", NUM_EXPERTS, REQUESTS, [[1]] * 4), checkpoint)


@pytest.mark.parametrize("slots", [TOP_K, 3, 5, NUM_EXPERTS])
@pytest.mark.parametrize("policy", ["lru", BELADY])
def test_hits_are_those_of_a_simulation_by_scores(slots: int, policy: str) -> None:
    used = np.zeros((len(REQUESTS) * TOKENS, LAYERS, NUM_EXPERTS), np.bool_)
    np.put_along_axis(used, np.concatenate(REQUESTS), True, axis=-1)
    scores = last_use(used) if policy == "lru" else next_use(used)
    hits = int(simulate_by_score(used, scores, np.full((1, LAYERS), slots)).sum())
    counts = simulated(LruPolicy if policy == "lru" else belady_of(REQUESTS), slots)
    assert counts.needed == used.sum()
    assert counts.needed - counts.misses == hits


@pytest.mark.parametrize("slots", [TOP_K, 4, 6])
@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
def test_no_policy_misses_less_than_belady_and_no_predictor_moves_less(eviction: str, slots: int) -> None:
    policy, floor = EVICTION_POLICIES[eviction], simulated(belady_of(REQUESTS), slots)
    assert floor.moved == floor.misses
    assert simulated(policy, slots).misses >= floor.misses
    oracle = OraclePredictor([ids for request in REQUESTS for ids in split(request)], NUM_EXPERTS)
    assert simulated(policy, slots, oracle, copies_ahead=1).moved >= floor.moved


@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
def test_with_a_slot_for_every_expert_each_misses_once(eviction: str) -> None:
    counts = simulated(EVICTION_POLICIES[eviction], NUM_EXPERTS)
    assert counts.misses == counts.moved == LAYERS * NUM_EXPERTS


@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
def test_an_oracle_that_may_copy_all_misses_nothing(eviction: str) -> None:
    oracle = OraclePredictor([ids for request in REQUESTS for ids in split(request)], NUM_EXPERTS)
    counts = simulated(EVICTION_POLICIES[eviction], 2 * TOP_K, oracle, copies_ahead=TOP_K)
    assert counts.misses == 0
    assert counts.moved == counts.prefetched > 0


def test_fewer_slots_than_one_token_needs_are_simulated_too() -> None:
    counts = simulated(LruPolicy, slots=1)
    assert counts.needed == len(REQUESTS) * TOKENS * LAYERS * TOP_K
    assert counts.needed - counts.misses < counts.needed / TOP_K


def test_what_warms_up_is_not_counted() -> None:
    whole, first = simulated(LruPolicy, 3), simulated(LruPolicy, 3, requests=REQUESTS[:2])
    assert simulated(LruPolicy, 3, num_warm_up=2) == whole - first


def test_a_prefetch_nobody_needs_is_in_vain_once_it_is_evicted() -> None:
    names_7 = FrequencyPredictor(np.eye(NUM_EXPERTS, dtype=np.int64)[[7] * LAYERS])
    tokens = np.array([0, 1, 2]).reshape(3, 1, 1).repeat(LAYERS, axis=1)  # each token another expert
    counts = simulated(LruPolicy, 2, names_7, [tokens], copies_ahead=1)
    assert (counts.misses, counts.in_vain) == (3 * LAYERS, LAYERS), "of 7, prefetched twice, one copy stays"
    assert counts.prefetched == 2 * LAYERS


def test_a_prefetch_takes_no_slot_from_what_is_wanted_more() -> None:
    prefers_low = FrequencyPredictor(np.tile(np.arange(NUM_EXPERTS, 0, -1), (LAYERS, 1)))
    tokens = np.zeros((20, LAYERS, 1), np.int64)
    counts = simulated(LruPolicy, 3, prefers_low, [tokens], copies_ahead=2)
    assert counts.moved == 3 * LAYERS, "0, 1 and 2 fill the slots and stay"


def test_a_prompt_is_one_pass() -> None:
    counts = simulate([split(REQUESTS[0], prompt_tokens=TOKENS)], NUM_EXPERTS, NUM_EXPERTS, LruPolicy, NOBODY)
    assert (counts.tokens, counts.misses) == (TOKENS, counts.needed)


def write_trace(folder: Path, num_windows: int = 5) -> Path:
    """Random routing of whole windows and a short one."""
    header = TraceHeader("random", LAYERS, NUM_EXPERTS, TOP_K, TOP_K, WeightRule(sum=1.0))
    ids = torch.from_numpy(np.stack([random_request(seed, tokens=12) for seed in range(num_windows)]))
    token_ids = torch.arange(num_windows * 12).view(num_windows, 12)
    mask = torch.ones(num_windows, 12, dtype=torch.bool)
    mask[-1, 7:] = False
    TraceWriter(folder, header).write(TraceBatch(token_ids, mask, ids, ids.float()))
    return folder


def test_requests_are_whole_windows_evenly_spaced(tmp_path: Path) -> None:
    workload = Workload.load(TraceFiles(write_trace(tmp_path)), num_requests=2)
    assert [ids[0] for ids in workload.token_ids] == [0, 24]
    assert (workload.num_layers, workload.top_k, workload.num_warm_up) == (LAYERS, TOP_K, 1)
    assert np.array_equal(workload.requests[1], random_request(2, tokens=12))


def test_a_trace_of_one_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 whole windows' is not possible: 2 whole windows or more"):
        Workload.load(TraceFiles(write_trace(tmp_path, num_windows=2)), num_requests=2)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_cell_is_a_row(tmp_path: Path, predictor: str) -> None:
    workload = Workload.load(TraceFiles(write_trace(tmp_path)), num_requests=4)
    row = workload.run(Cell("lfu", predictor, slots=4, copies_ahead=1))
    assert 0 < row["miss_rate"] < 1
    assert (row["prefetched_per_token"] > 0) == (predictor != "none")
    assert row["moved_per_token"] >= row["prefetched_per_token"]


def test_the_command_writes_every_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, out = write_trace(tmp_path / "trace"), tmp_path / "results.json"
    words = ["--trace", str(trace), "--requests", "4", "--slots", "2", "8", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["cache_policies", *words])
    command.main()
    record = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    assert len(record["results"]) == 2 * (len(EVICTION_POLICIES) * len(PREDICTORS) + 1)
    assert record["requests_tokens"] == [4, 48]


def test_the_plot_has_a_panel_for_each_predictor(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.cache_policies.plot import plot

    workload = Workload.load(TraceFiles(write_trace(tmp_path)), num_requests=4)
    cells = [Cell(policy, "none", slots, 0) for policy in ("lru", BELADY) for slots in (2, 4)]
    plot([workload.run(cell) for cell in cells], "random", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
