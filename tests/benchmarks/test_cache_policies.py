"""The simulation against the engine, against a simulation of another kind, and by its own definitions."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.executor.eviction import EVICTION_POLICIES, EvictionPolicy, LruPolicy
from actors.executor.lookahead import COPIES_AHEAD, Lookahead
from actors.predictor.decoding import DecodingPredictor, FrequencyPredictor, NoPredictor, OraclePredictor
from actors.predictor.hash_function import save_hash_function
from actors.predictor.network import WeightRule
from actors.predictor.trace import TraceArguments, write_traces
from actors.predictor.traces import Stack, TraceBatch, TraceFiles, TraceHeader, TraceWriter
from benchmarks.cache_policies import __main__ as command
from benchmarks.cache_policies import engine_check
from benchmarks.cache_policies.cells import BELADY, NEED_A_MODEL, PREDICTORS, Cell, Workload
from benchmarks.cache_policies.engine_check import ON_DEMAND, best_combinations, compare_with_engine
from benchmarks.cache_policies.guesses import Guesses, RecordedGuesses
from benchmarks.cache_policies.simulation import Counts, Ids, belady, simulate, split
from benchmarks.gpu.cache_simulation import last_use, next_use
from benchmarks.gpu.cache_simulation import simulate as simulate_by_score
from common.checkpoint import Checkpoint
from common.errors import CheckpointError, ConfigError
from tests.actors.predictor.conftest import make_function
from tests.tiny_models import NUM_EXPERTS, TOP_K, VOCAB_SIZE, make_checkpoint, make_classifier_checkpoint

LAYERS, TOKENS = 3, 60


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


class AtOnce:
    """A lookahead's words, taken when they are left: as in the simulation, no copy is late."""

    def __init__(self, lookahead: Lookahead) -> None:
        self.put = lookahead._take

    def empty(self) -> bool:
        return True

    def qsize(self) -> int:
        return 0


@pytest.fixture
def no_copy_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(lookahead: Lookahead) -> None:
        monkeypatch.setattr(lookahead, "_words", AtOnce(lookahead))

    monkeypatch.setattr(Lookahead, "start", start)
    monkeypatch.setattr(Lookahead, "stop", lambda _: None)


def test_the_engine_hits_what_the_simulation_hits(
    checkpoint: Path, no_copy_is_late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_check, "NEW_TOKENS", 24)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(VOCAB_SIZE, (3, 40), generator=generator).tolist()
    fingerprint = Checkpoint.open(checkpoint).fingerprint
    workload = Workload(fingerprint, NUM_EXPERTS, REQUESTS[:3], token_ids)
    predicted = [("next-gate", "lru"), ("activation-trace", "lfu"), ("frequency", "fifo")]
    rows = compare_with_engine(workload, checkpoint, [*ON_DEMAND, *predicted], num_requests=3)
    assert [(row["predictor"], row["policy"]) for row in rows] == [*ON_DEMAND, *predicted]
    assert_equal_counts(rows)


def assert_equal_counts(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert 0 < row["engine_hits"] < row["needed"]
        assert row["engine_hits"] == row["simulated_hits"], row
        assert row["engine_hit_rate"] == row["simulated_hit_rate"], row
        assert row["engine_prefetched"] == row["simulated_prefetched"], row
        assert (row["engine_prefetched"] > 0) == (row["predictor"] != "none")


def test_the_best_that_an_engine_can_do_are_measured_in_it() -> None:
    rows = [
        {"policy": policy, "predictor": predictor, "slots": slots, "copies_ahead": copies, "miss_rate": rate}
        for policy, predictor, slots, copies, rate in [
            ("lru", "none", 2, 0, 0.5),
            ("lru", "oracle", 2, COPIES_AHEAD, 0.1),
            ("lru", "hash-function", 2, COPIES_AHEAD, 0.2),
            ("lru", "next-gate", 2, COPIES_AHEAD, 0.3),
            ("lfu", "next-gate", 2, COPIES_AHEAD + 1, 0.2),
            ("lfu", "next-gate", 4, COPIES_AHEAD, 0.1),
            ("lfu", "none", 2, 0, 0.4),
            (BELADY, "none", 2, 0, 0.2),
        ]
    ]
    workload = Workload("random", 8, REQUESTS, [])
    assert best_combinations(workload, rows) == [("next-gate", "lru"), ("none", "lfu"), ("none", "lru")]
    assert best_combinations(replace(workload, at_once=True), rows) == [("none", "lfu"), ("none", "lru")]


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


def random_guesses() -> Guesses:
    """[12, layers, experts]: of TOP_K experts each."""
    guesses = np.zeros((12, LAYERS, NUM_EXPERTS), np.float32)
    np.put_along_axis(guesses, random_request(0, tokens=12), 0.5, axis=-1)
    return guesses


def write_trace(folder: Path, num_windows: int = 5, stack: Stack = "decoder") -> Path:
    """Random routing of windows, the last one short."""
    header = TraceHeader(
        "random", LAYERS, NUM_EXPERTS, TOP_K, TOP_K, WeightRule(sum=1.0), "logits", stack=stack
    )
    ids = torch.from_numpy(np.stack([random_request(seed, tokens=12) for seed in range(num_windows)]))
    token_ids = torch.arange(num_windows * 12).view(num_windows, 12)
    mask = torch.ones(num_windows, 12, dtype=torch.bool)
    mask[-1, 7:] = False
    TraceWriter(folder, header).write(TraceBatch(token_ids, mask, ids, torch.ones(ids.shape)))
    return folder


def test_requests_are_windows_without_padding_evenly_spaced(tmp_path: Path) -> None:
    workload = Workload.load(TraceFiles(write_trace(tmp_path)), num_requests=3)
    assert [ids[0] for ids in workload.token_ids] == [0, 12, 24]
    assert (workload.num_layers, workload.top_k, workload.num_warm_up) == (LAYERS, TOP_K, 1)
    assert np.array_equal(workload.requests[1], random_request(1, tokens=12))
    every = Workload.load(TraceFiles(tmp_path), num_requests=5)
    assert [len(request) for request in every.requests] == [12, 12, 12, 12, 7]
    assert every.token_ids[-1] == list(range(48, 55))


def test_a_trace_of_one_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 windows' is not possible: 2 windows or more"):
        Workload.load(TraceFiles(write_trace(tmp_path, num_windows=1)), num_requests=2)


def test_a_decoder_reads_token_by_token_and_an_encoder_at_once(tmp_path: Path) -> None:
    decoder = Workload.load(TraceFiles(write_trace(tmp_path / "decoder")), num_requests=4)
    encoder = Workload.load(TraceFiles(write_trace(tmp_path / "encoder", stack="encoder")), num_requests=4)
    assert [len(ids) for ids in decoder.all_passes(decoder.requests)] == [1] * 48
    assert [len(ids) for ids in encoder.all_passes(encoder.requests)] == [12] * 4
    cell = Cell("lru", "oracle", slots=NUM_EXPERTS, copies_ahead=NUM_EXPERTS)
    assert decoder.run(cell)["miss_rate"] == encoder.run(cell)["miss_rate"] == 0


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_cell_is_a_row(tmp_path: Path, predictor: str) -> None:
    workload = replace(
        Workload.load(TraceFiles(write_trace(tmp_path)), num_requests=4),
        guesses={name: [random_guesses()] * 4 for name in NEED_A_MODEL},
    )
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
    num_predictors = len(PREDICTORS) - len(NEED_A_MODEL)
    assert len(record["results"]) == 2 * (len(EVICTION_POLICIES) * num_predictors + 1)
    assert not {row["predictor"] for row in record["results"]} & set(NEED_A_MODEL)
    assert record["requests_tokens"] == [4, 48]


def test_a_guess_reaches_as_far_as_it_may() -> None:
    guesses = np.stack([random_guesses()[0], np.zeros((LAYERS, NUM_EXPERTS), np.float32)])
    for reach, rows in ((1, 1), (None, LAYERS - 1)):
        predictor = RecordedGuesses([guesses, guesses], reach)
        predictor.begin_pass(["a"])
        named = predictor.predict(1)
        assert named.shape == (LAYERS - 1, NUM_EXPERTS)
        assert np.allclose(named[:rows], guesses[0, 1 : 1 + rows] / 2), "the mean of two tokens"
        assert not named[rows:].any()


SENTENCES = [6, 9, 4, 12]  # tokens


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder-decoder with a random hash function for its encoder."""
    folder = make_checkpoint("switch_transformers", tmp_path_factory.mktemp("switch"), num_layers=4)
    save_hash_function(make_function(folder), folder / "hash_function")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_classifier_checkpoint(tmp_path_factory.mktemp("classifier"), ["ham", "spam"])
    save_hash_function(make_function(folder), folder / "hash_function")
    return folder


def trace_sentences(model: Path, folder: Path, **arguments: str) -> Path:
    generator = np.random.default_rng(0)
    rows = np.full((len(SENTENCES), max(SENTENCES)), -1)
    for row, length in zip(rows, SENTENCES, strict=True):
        row[:length] = generator.integers(1, VOCAB_SIZE, length)
    np.savez(folder / "text.npz", ids=rows)
    text = f"{folder / 'text.npz'}#ids"
    options = {"device": "cpu", "window_tokens": str(max(SENTENCES)), **arguments}
    write_traces(TraceArguments(model=str(model), text=text, out=str(folder / "trace"), **options))
    return folder / "trace"


@pytest.mark.parametrize("kind", ["switch", "classifier"])
def test_every_predictor_and_the_engine_on_an_encoder(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch, out = request.getfixturevalue(kind), tmp_path / "results.json"
    trace = trace_sentences(switch, tmp_path)
    words = ["--trace", str(trace), "--slots", "2", "--policy", "lfu", "--engine-requests", "3"]
    monkeypatch.setattr("sys.argv", ["cache_policies", *words, "--model", str(switch), "--out", str(out)])
    command.main()
    record = json.loads(out.read_text())
    assert record["layers_experts_top_k"] == [2, NUM_EXPERTS, 1]
    assert record["requests_tokens"] == [len(SENTENCES), sum(SENTENCES)]
    assert {row["predictor"] for row in record["results"]} == set(PREDICTORS)
    assert [(row["predictor"], row["policy"]) for row in record["engine"]] == list(ON_DEMAND)
    assert_equal_counts(record["engine"])


def test_a_hash_function_that_is_not_there_is_asked_for_by_name(checkpoint: Path, tmp_path: Path) -> None:
    trace = trace_sentences(checkpoint, tmp_path)
    words = ["--trace", str(trace), "--model", str(checkpoint), "--predictor", "hash-function"]
    with pytest.raises(ConfigError, match="hash-function' is not possible: for this model one of none"):
        command.load_workload(command.parse_arguments(words))


def test_what_a_decoder_beside_an_encoder_read_is_not_in_its_trace(switch: Path, tmp_path: Path) -> None:
    source = f"{tmp_path / 'text.npz'}#ids"
    trace = trace_sentences(switch, tmp_path, stack="decoder", source=source)
    workload = Workload.load(TraceFiles(trace), num_requests=4)
    assert 0 < workload.run(Cell("lru", "none", slots=2, copies_ahead=0))["miss_rate"] < 1
    with pytest.raises(ConfigError, match="without --model"):
        workload.with_guesses(switch)


def test_the_plot_has_a_panel_for_each_predictor(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.cache_policies.plot import plot

    workload = Workload.load(TraceFiles(write_trace(tmp_path)), num_requests=4)
    cells = [Cell(policy, "none", slots, 0) for policy in ("lru", BELADY) for slots in (2, 4)]
    plot([workload.run(cell) for cell in cells], "random", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
