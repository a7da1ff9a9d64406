"""The generation loop: who runs when, what ends a request, what an error costs whom."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.executor.engine import EngineLimits
from actors.executor.expert_source import CheckpointExpertSource
from common.checkpoint import Checkpoint
from common.errors import EngineStoppedError, ExpertsUnavailableError, HashTableError, QueueFullError
from common.hash_table import HashTable
from tests.actors.executor.harness import (
    PROMPTS,
    Harness,
    library_greedy,
    library_model,
    slot_model,
    start_engine,
)
from tests.tiny_models import NUM_EXPERTS, make_checkpoint

StartEngine = Callable[..., Harness]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture
def start(folder: Path) -> Iterator[StartEngine]:
    running: list[Harness] = []

    def start_one(num_slots: int | None = None, source: Any = None, **options: Any) -> Harness:
        running.append(start_engine(slot_model(folder, num_slots, source=source), **options))
        return running[-1]

    yield start_one
    for harness in running:
        harness.engine.stop()


class GatedSource(CheckpointExpertSource):
    """Holds every fetch until the gate opens; or fails them, or has the prefetcher's overtake the others."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Checkpoint.open(folder))
        self.gate, self.waiting = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.on_demand_s = 0.0  # a fetch takes that long
        self.gate.set()

    def fetch(self, layer: int, expert_id: int) -> Tensor:
        self.waiting.set()
        if threading.current_thread().name != "prefetcher":
            time.sleep(self.on_demand_s)
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        return super().fetch(layer, expert_id)


def true_table(folder: Path, prompt: list[int], fingerprint: str, shift: int = 0) -> HashTable:
    """What the model's own routers choose for a prompt; `shift` makes every id wrong."""
    chosen: list[Tensor] = []
    model = library_model(folder)
    for block in (layer.mlp for layer in model.model.layers):
        block.gate.register_forward_hook(lambda _m, _i, output: chosen.append(output[2]))
    model(torch.tensor([prompt]))
    ids = (torch.stack(chosen).numpy() + shift) % NUM_EXPERTS
    return HashTable(ids.astype(np.uint16), np.full(ids.shape, 0.5, np.float16), fingerprint, "oracle", "1")


def test_requests_join_a_running_batch_and_leave_it(start: StartEngine, folder: Path) -> None:
    harness = start()
    model = library_model(folder)
    long = harness.submit(PROMPTS[0], "long", max_tokens=40)
    long.next()
    short = harness.submit(PROMPTS[1], "short", max_tokens=3)
    assert short.token_ids() == library_greedy(model, PROMPTS[1], 3)
    late = harness.submit(PROMPTS[2], "late", max_tokens=5)
    assert late.token_ids() == library_greedy(model, PROMPTS[2], 5)
    assert long.token_ids() == library_greedy(model, PROMPTS[0], 40)


def test_more_requests_than_rows_wait_their_turn(start: StartEngine, folder: Path) -> None:
    limits = EngineLimits(max_batch_size=2, prefill_chunk_tokens=4, max_queued_requests=20)
    harness = start(limits=limits)
    model = library_model(folder)
    prompts = [[3 + i, 9, 4 + i] for i in range(9)]
    expected = [library_greedy(model, prompt, 6) for prompt in prompts]
    assert harness.generate(prompts, max_tokens=6) == expected


def test_the_last_chunk_tells_where_the_time_went(start: StartEngine) -> None:
    limits = EngineLimits(max_batch_size=1, prefill_chunk_tokens=8, max_queued_requests=4)
    harness = start(limits=limits)
    began = time.monotonic()
    first = harness.submit(PROMPTS[0], "first", max_tokens=20)
    second = harness.submit(PROMPTS[1], "second", max_tokens=2)
    second.result()
    elapsed_s = time.monotonic() - began
    assert all(chunk.timings is None for chunk in (*first.result()[:-1], *second.chunks[:-1]))
    ahead, behind = first.chunks[-1].timings, second.chunks[-1].timings
    assert ahead is not None and behind is not None
    assert min(ahead.queue_s, ahead.prefill_s, ahead.decode_s) > 0
    assert behind.queue_s >= ahead.decode_s, "it had to wait for the only row"
    assert behind.queue_s + behind.prefill_s + behind.decode_s <= elapsed_s


def test_stop_token_ends_a_request_and_ignore_eos_does_not(start: StartEngine, folder: Path) -> None:
    expected = library_greedy(library_model(folder), PROMPTS[0], 8)
    harness = start(eos_ids=frozenset({expected[3]}))
    stopped = harness.submit(PROMPTS[0], "a", max_tokens=8, ignore_eos=False)
    first_eos = expected.index(expected[3])
    assert stopped.token_ids() == expected[: first_eos + 1]
    assert stopped.chunks[-1].finish_reason == "stop"
    ignoring = harness.submit(PROMPTS[0], "b", max_tokens=8)
    assert ignoring.token_ids() == expected
    assert ignoring.chunks[-1].finish_reason == "length"


def test_stop_tokens_before_min_tokens_are_tokens_like_others(start: StartEngine, folder: Path) -> None:
    expected = library_greedy(library_model(folder), PROMPTS[0], 8)
    harness = start(eos_ids=frozenset(expected))
    for min_tokens in (0, 1, 2, 5, 8):
        stopped = harness.submit(
            PROMPTS[0], f"{min_tokens}", max_tokens=8, ignore_eos=False, min_tokens=min_tokens
        )
        assert stopped.token_ids() == expected[: max(1, min_tokens)]
        assert stopped.chunks[-1].finish_reason == "stop"


def test_seeded_sampling_does_not_depend_on_the_batch(start: StartEngine) -> None:
    harness = start()
    alone = harness.submit(PROMPTS[0], "alone", max_tokens=20, temperature=1.0, seed=5).token_ids()
    others = [harness.submit(PROMPTS[1], f"o{i}", max_tokens=20, temperature=1.0, seed=i) for i in range(2)]
    beside = harness.submit(PROMPTS[0], "beside", max_tokens=20, temperature=1.0, seed=5)
    assert beside.token_ids() == alone
    assert len({tuple(other.token_ids()) for other in others}) == 2


def test_cancel_frees_the_row_at_once(start: StartEngine) -> None:
    limits = EngineLimits(max_batch_size=1, prefill_chunk_tokens=8, max_queued_requests=4)
    harness = start(limits=limits)
    endless = harness.submit(PROMPTS[0], "endless", max_tokens=100)
    endless.next()
    waiting = harness.submit(PROMPTS[1], "waiting", max_tokens=2)
    harness.engine.cancel("endless")
    assert len(waiting.token_ids()) == 2
    assert len(endless.chunks) < 100
    harness.engine.cancel("endless")  # once more is no error
    assert harness.engine.report().num_running == 0


def test_the_pager_learns_which_share_of_the_requests_ended(
    start: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness, shares = start(), []
    monkeypatch.setattr(harness.slot_model.pager, "requests_ended", shares.append)
    long = harness.submit(PROMPTS[0], "long", max_tokens=100)
    long.next()  # it runs
    harness.submit(PROMPTS[1], "short", max_tokens=2).result()
    long.result()
    assert shares == [0.5, 1.0]


def test_cancelled_while_waiting_never_runs(start: StartEngine, folder: Path) -> None:
    source = GatedSource(folder)
    limits = EngineLimits(max_batch_size=1, prefill_chunk_tokens=8, max_queued_requests=4)
    harness = start(source=source, limits=limits)
    source.gate.clear()
    first = harness.submit(PROMPTS[0], "first", max_tokens=2)
    second = harness.submit(PROMPTS[1], "second", max_tokens=2)
    harness.engine.cancel("second")
    source.gate.set()
    first.result()
    assert harness.submit(PROMPTS[2], "third", max_tokens=1).token_ids()
    assert second.is_silent()


def test_full_queue_refuses_with_the_numbers(start: StartEngine, folder: Path) -> None:
    source = GatedSource(folder)
    limits = EngineLimits(max_batch_size=1, prefill_chunk_tokens=8, max_queued_requests=1)
    harness = start(source=source, limits=limits)
    source.gate.clear()
    source.waiting.clear()
    running = harness.submit(PROMPTS[0], "running", max_tokens=2)
    assert source.waiting.wait(10)
    queued = harness.submit(PROMPTS[0], "queued", max_tokens=2)
    with pytest.raises(QueueFullError, match="limit is 1"):
        harness.submit(PROMPTS[0], "refused", max_tokens=2)
    source.gate.set()
    assert running.token_ids() == queued.token_ids()


def test_failed_fetch_fails_its_request_and_no_other(start: StartEngine, folder: Path) -> None:
    source = GatedSource(folder)
    harness = start(num_slots=2, source=source, prefetch=False)
    source.error = ExpertsUnavailableError(0, 1, 60.0)
    with pytest.raises(ExpertsUnavailableError, match="try again"):
        harness.submit(PROMPTS[0], "unlucky", max_tokens=4).result()
    source.error = None
    expected = library_greedy(library_model(folder), PROMPTS[0], 4)
    assert harness.submit(PROMPTS[0], "lucky", max_tokens=4).token_ids() == expected


def test_stop_answers_what_is_unfinished(start: StartEngine) -> None:
    harness = start()
    endless = harness.submit(PROMPTS[0], "endless", max_tokens=100)
    endless.next()
    harness.engine.stop("of the test")
    with pytest.raises(EngineStoppedError, match="of the test"):
        endless.result()
    with pytest.raises(EngineStoppedError):
        harness.submit(PROMPTS[0], "too late", max_tokens=1)
    with pytest.raises(EngineStoppedError):
        harness.engine.check_health()
    harness.engine.stop()  # twice is fine


def test_logprobs_come_with_every_token(start: StartEngine, folder: Path) -> None:
    sink = start().submit(PROMPTS[0], "r", max_tokens=3, logprobs=2)
    with torch.no_grad():
        logits = library_model(folder)(torch.tensor([PROMPTS[0]])).logits[0, -1]
    first = sink.next().logprobs[0]
    assert first.logprob == pytest.approx(float(logits.log_softmax(0).max()), abs=1e-4)
    assert [token_id for token_id, _ in first.top] == logits.topk(2).indices.tolist()
    assert all(len(chunk.logprobs) == 1 for chunk in sink.result())


def test_right_table_is_prefetched_and_scored(start: StartEngine, folder: Path) -> None:
    source = GatedSource(folder)
    limits = EngineLimits(max_batch_size=1, prefill_chunk_tokens=64, max_queued_requests=4)
    harness = start(num_slots=NUM_EXPERTS, source=source, limits=limits)
    source.on_demand_s = 0.05
    source.gate.clear()
    source.waiting.clear()
    blocker = harness.submit([99], "blocker", max_tokens=1)
    assert source.waiting.wait(10)
    sink = harness.submit(PROMPTS[0], "r", max_tokens=1)
    harness.engine.attach_table("r", true_table(folder, PROMPTS[0], source.model_fingerprint))
    source.gate.set()
    blocker.result()
    usage = sink.result()[-1].experts
    report = harness.engine.report()
    assert usage is not None
    assert usage.predicted == usage.needed
    assert [layer.predictor_recall for layer in report.layers] == [1.0] * len(report.layers)
    assert report.hash_tables == {"on_time": 1, "late": 0, "lost": 0, "unusable": 0}
    assert sum(layer.prefetched_used for layer in report.layers) > 0


def test_wrong_table_changes_no_token(start: StartEngine, folder: Path) -> None:
    harness = start(num_slots=2)
    expected = library_greedy(library_model(folder), PROMPTS[0], 8)
    fingerprint = harness.slot_model.pager.source.model_fingerprint
    wrong = true_table(folder, PROMPTS[0], fingerprint, shift=3)
    sink = harness.submit(PROMPTS[0], "r", max_tokens=8)
    harness.engine.attach_table("r", wrong)
    assert sink.token_ids() == expected
    assert sink.chunks[-1].experts is not None
    assert sink.chunks[-1].experts.predicted < sink.chunks[-1].experts.needed


@pytest.mark.parametrize("fault", ["model", "length", "experts"])
def test_table_that_does_not_fit_is_refused(start: StartEngine, folder: Path, fault: str) -> None:
    source = GatedSource(folder)
    harness = start(source=source)
    source.gate.clear()
    table = true_table(folder, PROMPTS[0], source.model_fingerprint)
    if fault == "model":
        table = HashTable(table.expert_ids, table.weights, "another", "oracle", "1")
    elif fault == "length":
        table = HashTable(
            table.expert_ids[:, 1:], table.weights[:, 1:], table.model_fingerprint, "oracle", "1"
        )
    else:
        table = HashTable(table.expert_ids + 90, table.weights, table.model_fingerprint, "oracle", "1")
    sink = harness.submit(PROMPTS[0], "r", max_tokens=2)
    with pytest.raises(HashTableError):
        harness.engine.attach_table("r", table)
    source.gate.set()
    assert len(sink.token_ids()) == 2
    assert set(harness.engine.report().hash_tables.values()) == {0}


def test_usage_counts_what_a_request_needed_and_missed(start: StartEngine) -> None:
    harness = start(num_slots=NUM_EXPERTS, prefetch=False)
    num_layers, top_k, new_tokens = harness.slot_model.clock.num_layers, 2, 5
    first = harness.submit([7], "first", max_tokens=new_tokens).result()[-1].experts
    again = harness.submit([7], "again", max_tokens=new_tokens).result()[-1].experts
    assert first is not None
    assert again is not None
    assert first.needed == again.needed == num_layers * top_k * new_tokens
    assert first.missed > 0
    assert first.moved_bytes == first.missed * harness.slot_model.pager.source.layout.slab_bytes
    assert (again.missed, again.moved_bytes) == (0, 0)
