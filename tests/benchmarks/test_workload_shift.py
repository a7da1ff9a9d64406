"""The two kinds of text and their distance; the benchmark itself, on a tiny model."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import workload_shift
from benchmarks.workload_shift import (
    KINDS,
    SUBJECTS,
    Kind,
    count_experts,
    distances,
    measure,
    parse_arguments,
    split_kinds,
)
from tests.tiny_models import NUM_EXPERTS, TOP_K, VOCAB_SIZE, make_checkpoint

SOURCE = '''"""A module."""
import os  # stays


# of its own
def double(x):
    """Twice.

    Really.
    """
    text = """no docstring"""
    return x + x
<|endoftext|>'''


def test_docstrings_and_comments_are_prose_and_the_rest_is_code() -> None:
    kinds = split_kinds(SOURCE + "value = 1\n")
    assert kinds["prose"].split("\n") == [
        '"""A module."""',
        "# of its own",
        '    """Twice.',
        "",
        "    Really.",
        '    """',
        "",
    ]
    assert "import os  # stays" in kinds["code"]
    assert '    text = """no docstring"""\n    return x + x\n' in kinds["code"]
    assert kinds["code"].endswith("value = 1\n")


def test_prompts_come_from_the_half_that_was_not_counted() -> None:
    kind = Kind.of(list(range(1000)), requests=4, prompt_tokens=10)
    assert max(token for window in kind.traced for token in window) < 500
    assert min(token for prompt in kind.prompts for token in prompt) >= 500
    assert [len(prompt) for prompt in kind.prompts] == [10] * 4


def test_distances_are_of_shares() -> None:
    first, second = np.array([[2, 2], [4, 0]]), np.array([[10, 10], [0, 1]])
    assert distances(first, second) == [0.0, 1.0]


def test_no_window_lies_across_the_shift() -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--requests", "5", "--window", "2"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"), num_layers=2)


def arguments_of(checkpoint: Path) -> argparse.Namespace:
    sizes = ["--requests", "2", "--window", "1", "--prompt-tokens", "4", "--new-tokens", "5"]
    return parse_arguments(["--model", str(checkpoint), "--slots", "4", "--policy", "lfu", *sizes])


def test_every_subject_is_a_row_for_each_window(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload_shift, "TRACED_WINDOW_TOKENS", 8)
    monkeypatch.setattr(workload_shift, "TRACED_WINDOWS", 4)
    generator = torch.Generator().manual_seed(0)
    kinds = {
        kind: Kind.of(torch.randint(VOCAB_SIZE, (100,), generator=generator).tolist(), 2, 4) for kind in KINDS
    }
    halves = count_experts(checkpoint, kinds["code"].traced)
    assert halves.shape == (2, 2, NUM_EXPERTS)
    assert halves[0].sum() == 2 * 2 * 8 * TOP_K, "layers, windows, tokens, choices"
    rows = measure(arguments_of(checkpoint), kinds, halves.sum(axis=0))
    assert [(row["subject"], row["kind"], row["first_request"]) for row in rows] == [
        (subject, kind, first)
        for subject in SUBJECTS
        for first, kind in enumerate(("code", "code", "prose", "prose"))
    ]
    assert all(0 < row["hit_rate"] < 1 and row["ms_per_token"] > 0 for row in rows)
    pytest.importorskip("matplotlib")
    workload_shift.plot(rows, 2, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
