"""The engine over steps that the device pages by itself; without a GPU in Triton's interpreter, not captured."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.executor.engine import EngineLimits
from actors.executor.gpu.fused_model import fuses
from actors.executor.gpu.graph_decoder import bucket_sizes
from common.generation import GenerationChunk, GenerationRequest, SamplingParams
from common.hash_table import HashTable
from tests.actors.executor.harness import (
    Harness,
    QueueSink,
    library_greedy,
    library_model,
    slot_model,
    start_engine,
)
from tests.tiny_models import NUM_EXPERTS, make_checkpoint

# Rows that only pad a bucket hold garbage, of which numpy tells.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton\\.runtime\\.interpreter")

PROMPTS = ([5, 9, 12, 7], [17, 3], [30, 31, 32])
LIMITS = EngineLimits(max_batch_size=3, prefill_chunk_tokens=8, max_queued_requests=8)

StartEngine = Callable[..., Harness]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a family that decodes through the library's modules: the interpreter takes its time over fused ones."""
    return make_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe"), num_layers=2)


@pytest.fixture
def start(folder: Path, device: str) -> Iterator[StartEngine]:
    running: list[Harness] = []

    def start_one(num_slots: int = 3, of: Path = folder, **options: Any) -> Harness:
        model = slot_model(of, num_slots, device=device, on_device=True)
        running.append(start_engine(model, **{"limits": LIMITS, "prefetch": False, **options}))
        return running[-1]

    yield start_one
    for harness in running:
        harness.engine.stop()


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    model = library_model(folder)
    return [library_greedy(model, prompt, 4) for prompt in PROMPTS]


def test_mixed_batch_generates_the_librarys_tokens(start: StartEngine, expected: list[list[int]]) -> None:
    harness = start(2)
    assert harness.engine.report().paging == "device"
    assert harness.generate(PROMPTS, max_tokens=3) == [tokens[:3] for tokens in expected]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_families_generate_the_librarys_tokens(family: str, start: StartEngine, tmp_path: Path) -> None:
    top_k = {"num_experts_per_tok": 1} if family == "llama4_text" else {}
    of = make_checkpoint(family, tmp_path, num_layers=2, **top_k)
    model = library_model(of)
    prompt = [5, 9, 12, 7, 3, 4, 8, 11, 2]  # longer than a sliding window or a chunk
    harness = start(2, of=of)
    assert fuses(harness.slot_model.model) == (family in ("qwen3_moe", "mixtral"))
    assert harness.generate([prompt], max_tokens=3) == [library_greedy(model, prompt, 3)]


def test_sequence_that_ends_drops_the_step_launched_too_many(
    start: StartEngine, folder: Path, expected: list[list[int]]
) -> None:
    first = expected[0]
    harness = start(eos_ids=frozenset({first[1]}))
    stopped = harness.submit(PROMPTS[0], "stopped", max_tokens=30, ignore_eos=False)
    assert stopped.token_ids() == first[: first.index(first[1]) + 1]
    again = harness.submit(PROMPTS[1], "again", max_tokens=4)  # in the row that was just freed
    assert again.token_ids() == expected[1]
    assert harness.engine.report().num_running == 0


def test_requests_join_and_leave_a_running_batch(
    start: StartEngine, expected: list[list[int]], folder: Path
) -> None:
    harness = start()
    long = harness.submit(PROMPTS[0], "long", max_tokens=5)
    long.next()
    assert harness.submit(PROMPTS[1], "short", max_tokens=2).token_ids() == expected[1][:2]
    gone = harness.submit(PROMPTS[2], "gone", max_tokens=100)
    gone.next()
    harness.engine.cancel("gone")
    assert long.token_ids() == library_greedy(library_model(folder), PROMPTS[0], 5)


def test_seeded_draws_do_not_depend_on_the_batch(start: StartEngine) -> None:
    harness = start()
    alone = harness.submit(PROMPTS[0], "alone", max_tokens=3, temperature=1.0, seed=5).token_ids()
    other = harness.submit(PROMPTS[1], "other", max_tokens=3, temperature=1.0, seed=6)
    beside = harness.submit(PROMPTS[0], "beside", max_tokens=3, temperature=1.0, seed=5)
    assert beside.token_ids() == alone
    other.result()


def test_logprobs_come_with_every_token(start: StartEngine, expected: list[list[int]]) -> None:
    chunks = start().submit(PROMPTS[0], "r", max_tokens=3, logprobs=2).result()
    for chunk, token_id in zip(chunks, expected[0], strict=False):
        (logprobs,) = chunk.logprobs
        assert logprobs.token_id == logprobs.top[0][0] == token_id
        assert logprobs.logprob == pytest.approx(logprobs.top[0][1], abs=1e-5)


def test_usage_counts_what_a_request_missed(start: StartEngine) -> None:
    harness = start(NUM_EXPERTS - 1)
    usage = harness.submit([7], "r", max_tokens=3).result()[-1].experts
    assert usage is not None
    assert usage.needed == 2 * 2 * 3, "layers, experts, tokens"
    assert 0 < usage.missed <= usage.needed
    assert usage.moved_bytes == usage.missed * harness.slot_model.pager.source.layout.slab_bytes


def test_hash_table_is_prefetched_layer_by_layer_and_changes_no_token(
    start: StartEngine, expected: list[list[int]]
) -> None:
    harness = start(4, prefetch=True)
    fingerprint = harness.slot_model.pager.source.model_fingerprint
    ids = np.random.default_rng(0).integers(0, NUM_EXPERTS, (2, len(PROMPTS[0]), 2)).astype(np.uint16)
    table = HashTable(ids, np.full(ids.shape, 0.5, np.float16), fingerprint, "random", "1")
    blocker = harness.submit(PROMPTS[1], "blocker", max_tokens=1)
    sink = harness.submit(PROMPTS[0], "r", max_tokens=4)
    harness.engine.attach_table("r", table)
    assert sink.token_ids() == expected[0]
    blocker.result()


def test_running_streams_get_steps_between_the_layers_of_a_prompt(
    start: StartEngine, expected: list[list[int]], folder: Path
) -> None:
    limits = EngineLimits(max_batch_size=3, prefill_chunk_tokens=64, max_queued_requests=8, max_stall_s=0.0)
    harness = start(limits=limits)
    running = harness.submit(PROMPTS[0], "running", max_tokens=9)
    running.next()
    long_prompt = [(7 * place) % 120 + 1 for place in range(12)]
    joined = harness.submit(long_prompt, "joined", max_tokens=2)
    model = library_model(folder)
    assert joined.token_ids() == library_greedy(model, long_prompt, 2)
    assert running.token_ids() == library_greedy(model, PROMPTS[0], 9)


def test_buckets_are_powers_of_two_up_to_a_limit() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(6) == [1, 2, 4, 8]
    assert bucket_sizes(300) == [1, 2, 4, 8, 16, 32]


def test_broken_logits_end_the_request_and_no_other(start: StartEngine, expected: list[list[int]]) -> None:
    harness = start(NUM_EXPERTS)
    embedding = harness.slot_model.model.get_input_embeddings()
    with torch.inference_mode():
        embedding.weight[99] = float("nan")
    with pytest.raises(Exception, match="not a number"):
        harness.submit([99], "broken", max_tokens=4).result()
    assert harness.submit(PROMPTS[0], "fine", max_tokens=2).token_ids() == expected[0][:2]


class SubmittingSink(QueueSink):
    """Submits other requests when its first chunk comes: the engine then finds them all at once."""

    def __init__(self, submit: Callable[[], object]) -> None:
        super().__init__()
        self._submit = submit

    def put(self, chunk: GenerationChunk) -> None:
        self._submit()
        super().put(chunk)


def test_prompts_that_wait_together_are_read_in_one_pass(start: StartEngine, tmp_path: Path) -> None:
    of = make_checkpoint("qwen3_moe", tmp_path, num_layers=2)
    harness, model, sinks = start(3, of=of), library_model(of), list[QueueSink]()

    def submit_all() -> None:
        for index, prompt in enumerate(PROMPTS[1:]):
            sinks.append(harness.submit(prompt, f"r{index}", max_tokens=2))

    begun = harness.slot_model.clock.passes_begun
    first = SubmittingSink(submit_all)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    harness.engine.submit(GenerationRequest("first", tuple(PROMPTS[0]), params), first)
    assert first.token_ids() == library_greedy(model, PROMPTS[0], 1)
    for sink, prompt in zip(sinks, PROMPTS[1:], strict=True):
        assert sink.token_ids() == library_greedy(model, prompt, 2)
    assert harness.slot_model.clock.passes_begun == begun + 2, "one for the first, one for all others"
