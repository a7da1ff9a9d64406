"""Data and models of a few kilobytes for the tests of SiDA's tables."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.sida.data.build import TOKENS
from benchmarks.sida.data.sources import PARTS
from benchmarks.sida.data.tasks import TASKS
from benchmarks.sida.data.tokens import Vocabulary, padded
from benchmarks.sida.models import TrainedShape
from benchmarks.sida.optimize import Schedule
from benchmarks.sida.sizes import SIZES, Size

TINY = TrainedShape(d_model=16, d_ff=32, d_kv=8, num_heads=2, encoder_layers=2, decoder_layers=2)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random tokens in the form of the data that are built."""
    folder, random = tmp_path_factory.mktemp("tiny_data"), np.random.default_rng(0)
    _save(folder / "text.npz", {part: random.integers(1, 6000, 2000).astype(np.int16) for part in PARTS})
    for task, (shortest, longest) in TOKENS.items():
        arrays: dict[str, Any] = {}
        for part in PARTS:
            lengths = random.integers(shortest, min(longest, shortest + 20), 8)
            rows = [random.integers(1, 6000, length).astype(np.int16) for length in lengths]
            arrays |= {
                part: padded(rows),
                f"{part}_labels": np.arange(8) % 2,
                f"{part}_kinds": np.full(8, "any"),
            }
        _save(folder / f"{task}.npz", arrays)
    Vocabulary().save(folder / "tokenizer")
    return folder


def _save(path: Path, arrays: Mapping[Any, Any]) -> None:
    np.savez(path, **arrays)


@pytest.fixture(scope="session")
def tiny_size() -> Size:
    three_steps = Schedule(minutes=1, learning_rate=1e-3, warmup_steps=1, steps=3)
    return replace(
        SIZES["cpu"],
        shape=TINY,
        window_tokens=40,
        pretraining_batch=4,
        pretraining=three_steps,
        finetuning_batch_tokens=256,
        finetuning=dict.fromkeys(TASKS, three_steps),
        evaluated_windows=4,
        hash_training=replace(
            SIZES["cpu"].hash_training,
            minutes=1,
            task_minutes=1,
            steps=6,
            hidden_size=16,
            evaluate_every=5,
            batch_tokens=256,
        ),
    )
