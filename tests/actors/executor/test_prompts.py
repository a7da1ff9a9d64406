"""Which prompt chunks share a pass that the host pages, and what each of them learns from it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.executor.engine import EngineLimits
from actors.executor.passes import Pass
from actors.executor.prompts import HostPrompts, PromptResult
from actors.executor.runner import ModelRunner, RowInput
from actors.executor.sequence import PromptChunk, Sequence
from common.generation import GenerationRequest, SamplingParams
from tests.actors.executor.harness import (
    QueueSink,
    library_greedy,
    library_model,
    slot_model,
    start_engine,
)
from tests.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    folder = make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))
    return ModelRunner(slot_model(folder), num_rows=3, max_tokens=64)


def chunk_of(length: int, row: int = 0) -> PromptChunk:
    request = GenerationRequest(f"r{row}", tuple(range(1, length + 1)), SamplingParams(max_tokens=1))
    sequence = Sequence.of(request, QueueSink(), None)
    sequence.row = row
    return PromptChunk.next_of(sequence, 64)


@pytest.mark.parametrize(
    ("lengths", "next_length", "fits"),
    [((), 40, True), ((8, 8, 8), 8, True), ((8,), 7, True), ((8,), 2, False), ((2, 2), 40, False)],
)
def test_chunks_of_about_one_length_share_a_pass(
    runner: ModelRunner, lengths: tuple[int, ...], next_length: int, fits: bool
) -> None:
    chunks = [chunk_of(length) for length in lengths]
    assert HostPrompts(runner).joins(chunk_of(next_length), chunks) == fits


def test_each_chunk_gets_its_own_choices_and_logits(runner: ModelRunner) -> None:
    chunks = [chunk_of(6, row=1), chunk_of(9, row=0), chunk_of(8, row=2)]
    together = HostPrompts(runner).read(chunks, lambda _: None, paced=False)
    assert together.choices is not None
    for index, chunk in enumerate(chunks):
        alone = Pass(1, keep_choices=True)
        logits = runner.run([RowInput(chunk.sequence.row, 0, chunk.token_ids)], alone)
        assert alone.choices is not None
        for chosen, expected in zip(together.choices[index], alone.choices, strict=True):
            np.testing.assert_array_equal(chosen, expected)
        assert together.needed[index] == alone.needed[0]
        torch.testing.assert_close(together.logits[index], logits[0], rtol=1e-3, atol=1e-4)


def test_requests_that_come_together_are_read_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sizes = make_checkpoint("qwen3_moe", tmp_path), []
    limits = EngineLimits(max_batch_size=4, prefill_chunk_tokens=64, max_queued_requests=8)
    read = HostPrompts.read

    def read_and_note(
        self: HostPrompts, chunks: list[PromptChunk], *args: Any, **options: Any
    ) -> PromptResult:
        sizes.append(len(chunks))
        return read(self, chunks, *args, **options)

    monkeypatch.setattr(HostPrompts, "read", read_and_note)
    harness = start_engine(slot_model(folder), limits=limits)
    prompts = [[3 + row, 9, 4 + row] for row in range(3)]
    with harness.engine._changed:  # the engine admits none before all are there
        sinks = [
            harness.submit(prompt, f"r{row}", max_tokens=6, temperature=0.0)
            for row, prompt in enumerate(prompts)
        ]
    tokens = [sink.token_ids() for sink in sinks]
    harness.engine.stop()
    assert sizes == [3]
    library = library_model(folder)
    assert tokens == [library_greedy(library, prompt, 6) for prompt in prompts]
