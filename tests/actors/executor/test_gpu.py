"""The engine on a CUDA device: the same tokens and bits as with every expert in place. Not in CI, which has no GPU."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.executor.drivers import new_passes
from actors.executor.engine import EngineLimits
from actors.executor.gpu.graph_decoder import GraphDecoder
from actors.executor.pager import Pager
from actors.executor.passes import Pass
from actors.executor.runner import ModelRunner, RowInput
from actors.executor.sequence import PromptChunk, Sequence
from benchmarks.gpu.page_checks import broken_page_tables, wrong_slots
from common.generation import GenerationRequest, SamplingParams
from common.hash_table import HashTable
from tests.actors.executor.harness import (
    PROMPTS,
    Harness,
    QueueSink,
    library_greedy,
    library_model,
    slot_model,
    start_engine,
)
from tests.tiny_models import FAMILIES, NUM_EXPERTS, TOP_K, make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_TOKENS = 12


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_generates_the_librarys_tokens(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    reference = library_model(folder).to("cuda")
    expected = [library_greedy(reference, prompt, NUM_TOKENS) for prompt in PROMPTS]
    for num_slots, on_device in ((TOP_K, False), (TOP_K, True), (5, True), (NUM_EXPERTS, True)):
        harness = start_engine(slot_model(folder, num_slots, device="cuda", on_device=on_device))
        try:
            tokens = harness.generate(PROMPTS, max_tokens=NUM_TOKENS)
            assert tokens == expected, (num_slots, on_device)
        finally:
            harness.engine.stop()


@pytest.mark.parametrize("num_slots", [20, 32])
def test_padded_buckets_of_a_large_batch_generate_the_librarys_tokens(num_slots: int, tmp_path: Path) -> None:
    """Between two buckets, most rows of the larger one are padding."""
    folder = make_checkpoint("qwen3_moe", tmp_path, num_experts=32, num_experts_per_tok=8)
    reference = library_model(folder).to("cuda")
    prompts = [[(7 * row + 3 * place) % 120 + 1 for place in range(3 + row % 4)] for row in range(20)]
    expected = [library_greedy(reference, prompt, NUM_TOKENS) for prompt in prompts]
    limits = EngineLimits(max_batch_size=32, prefill_chunk_tokens=200, max_queued_requests=64)
    harness = start_engine(
        slot_model(folder, num_slots, device="cuda", on_device=True), top_k=8, limits=limits
    )
    try:
        assert harness.generate(prompts, max_tokens=NUM_TOKENS) == expected
    finally:
        harness.engine.stop()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "glm4_moe"])
def test_captured_steps_are_bit_equal_to_all_resident(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make_checkpoint(family, tmp_path, dtype=dtype)
    resident = decode_logits(folder, NUM_EXPERTS, dtype)
    for num_slots in (2, 3, 5):
        paged = decode_logits(folder, num_slots, dtype)
        assert all(torch.equal(a, b) for a, b in zip(resident, paged, strict=True)), num_slots


def decode_logits(folder: Path, num_slots: int, dtype: torch.dtype) -> list[Tensor]:
    """Logits of three prompts and of six captured steps over their rows."""
    model = slot_model(folder, num_slots, dtype, device="cuda", on_device=True)
    runner = ModelRunner(model, num_rows=4, max_tokens=64)
    runner.run([RowInput(0, 0, (0,))], Pass(1))
    limits = EngineLimits(max_batch_size=3, prefill_chunk_tokens=64, max_queued_requests=1)
    prompts, decoder = new_passes(model, runner, limits, top_k=TOP_K)
    assert isinstance(decoder, GraphDecoder)
    sequences = []
    for row, prompt in enumerate(PROMPTS):
        request = GenerationRequest(f"r{row}", tuple(prompt), SamplingParams(max_tokens=9, temperature=0.0))
        sequences.append(Sequence.of(request, QueueSink(), None))
        sequences[-1].row = row
    logits = []
    for group in (sequences[:1], sequences[1:]):
        chunks = [PromptChunk.next_of(sequence, 64) for sequence in group]
        fit_together = all(prompts.joins(chunk, chunks[:index]) for index, chunk in enumerate(chunks))
        parts = [chunks] if fit_together else [[chunk] for chunk in chunks]
        read = [prompts.read(part, lambda _: None, paced=False).logits for part in parts]
        logits.append(torch.cat(read))
        decoder.first(group, logits[-1])
    for _ in range(6):
        decoder.launch(sequences).result()
        logits.append(decoder._buckets[4].logits[:3].clone())
    model.pager.close()
    return logits


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_page_tables_and_slots_agree_after_warm_up_and_after_every_step(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    for num_slots in (3, 5, 7):
        model = slot_model(folder, num_slots, device="cuda", on_device=True)
        runner = ModelRunner(model, num_rows=4, max_tokens=64)
        runner.run([RowInput(0, 0, (0,))], Pass(1))
        limits = EngineLimits(max_batch_size=3, prefill_chunk_tokens=64, max_queued_requests=1)
        prompts, decoder = new_passes(model, runner, limits, top_k=TOP_K)
        sequences = []
        assert_pages_agree(model.pager)
        for row, prompt in enumerate(PROMPTS):
            request = GenerationRequest(
                f"r{row}", tuple(prompt), SamplingParams(max_tokens=9, temperature=0.0)
            )
            sequences.append(Sequence.of(request, QueueSink(), None))
            sequences[-1].row = row
            chunks = [PromptChunk.next_of(sequences[-1], 64)]
            decoder.first(sequences[-1:], prompts.read(chunks, lambda _: None, paced=False).logits)
            assert_pages_agree(model.pager)
        for size in (1, 3, 1, 2):
            decoder.launch(sequences[:size]).result()
            assert_pages_agree(model.pager)
        model.pager.close()


def assert_pages_agree(pager: Pager) -> None:
    torch.cuda.synchronize()
    assert [*broken_page_tables(pager), *wrong_slots(pager, random.Random(0))] == []


def run_all(folder: Path, num_slots: int, dtype: torch.dtype) -> list[Tensor]:
    model = slot_model(folder, num_slots, dtype, device="cuda")
    runner = ModelRunner(model, num_rows=3, max_tokens=64)
    logits = [runner.run([RowInput(row, 0, prompt)], Pass(1)) for row, prompt in enumerate(PROMPTS)]
    for step in range(4):
        inputs = [RowInput(row, len(prompt) + step, (7 + row + step,)) for row, prompt in enumerate(PROMPTS)]
        logits.append(runner.run(inputs, Pass(len(inputs))))
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "granitemoe"])
def test_logits_are_bit_equal_to_all_resident(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path, dtype=dtype)
    resident = run_all(folder, NUM_EXPERTS, dtype)
    for num_slots in (2, 3, 5):
        paged = run_all(folder, num_slots, dtype)
        assert all(torch.equal(a, b) for a, b in zip(resident, paged, strict=True)), num_slots


def test_prefetching_beside_the_compute_changes_no_token(tmp_path: Path) -> None:
    """Random tables keep the copy stream writing into slots that passes have just read."""
    folder = make_checkpoint(
        "qwen3_moe", tmp_path, dtype=torch.bfloat16, hidden_size=512, moe_intermediate_size=512
    )
    prompts = [[(7 * row + 3 * place) % 120 + 1 for place in range(40)] for row in range(12)]
    limits = EngineLimits(max_batch_size=4, prefill_chunk_tokens=8, max_queued_requests=16)

    def tokens(num_slots: int, *, with_tables: bool) -> list[list[int]]:
        harness = start_engine(slot_model(folder, num_slots, torch.bfloat16, device="cuda"), limits=limits)
        try:
            sinks = [harness.submit(prompt, f"r{row}", max_tokens=6) for row, prompt in enumerate(prompts)]
            if with_tables:
                for row, prompt in enumerate(prompts):
                    harness.engine.attach_table(f"r{row}", random_table(harness, len(prompt), row))
            return [sink.token_ids() for sink in sinks]
        finally:
            harness.engine.stop()

    assert tokens(3, with_tables=True) == tokens(3, with_tables=False)


def random_table(harness: Harness, num_tokens: int, seed: int) -> HashTable:
    model = harness.slot_model
    ids = np.random.default_rng(seed).integers(0, NUM_EXPERTS, (model.clock.num_layers, num_tokens, 2))
    weights = np.full(ids.shape, 0.5, np.float16)
    return HashTable(ids.astype(np.uint16), weights, model.pager.source.model_fingerprint, "random", "1")


@pytest.mark.parametrize("num_slots", [4, NUM_EXPERTS])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_nothing_is_compiled_once_an_engine_is_built(
    family: str, num_slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of any length, with and without a table, alone and together: a first request waits for no compiler."""
    from triton import knobs

    folder = make_checkpoint(family, tmp_path)
    harness = start_engine(slot_model(folder, num_slots, device="cuda", on_device=True))
    compiled: list[str] = []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda **details: compiled.append(details["fn"].name)
    )
    try:
        for length in (1, 2, 3, 16, 17, 33, 64):
            sinks = [
                harness.submit([7 + row] * (length + row), f"r{length}.{row}", max_tokens=2)
                for row in range(3)
            ]
            for row in range(2):
                harness.engine.attach_table(
                    f"r{length}.{row}", random_table(harness, length + row, seed=length)
                )
            for sink in sinks:
                sink.result()
    finally:
        harness.engine.stop()
    assert compiled == []
