"""Loads: what a trace holds, counted without padding, through a file, and refused for another model."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.expert_store import record_loads as command
from actors.expert_store.loads import ExpertLoads
from actors.expert_store.record_loads import record_loads
from actors.predictor.network import WeightRule
from actors.predictor.traces import TraceBatch, TraceFiles, TraceHeader, TraceWriter
from common.checkpoint import Checkpoint
from common.errors import ConfigError

LAYERS, EXPERTS, TOP_K, WINDOW = 3, 8, 2, 5


@pytest.fixture
def batch() -> TraceBatch:
    random = torch.Generator().manual_seed(0)
    windows = 6
    mask = torch.arange(WINDOW) < torch.tensor([5, 5, 3, 5, 2, 4])[:, None]
    ids = torch.rand(windows, WINDOW, LAYERS, EXPERTS, generator=random).argsort(-1)[..., :TOP_K]
    return TraceBatch(torch.zeros(windows, WINDOW, dtype=torch.int64), mask, ids, torch.zeros(ids.shape))


@pytest.fixture
def trace(batch: TraceBatch, tmp_path: Path) -> Path:
    header = TraceHeader("0123456789abcdef", LAYERS, EXPERTS, TOP_K, 0, WeightRule(sum=1.0))
    writer = TraceWriter(tmp_path / "trace", header)
    for rows in torch.arange(batch.num_windows).split(4):
        writer.write(batch.select(rows))
    return tmp_path / "trace"


def counted(batch: TraceBatch, windows: list[int], layer: int) -> list[int]:
    """One token after the other."""
    counts = [0] * EXPERTS
    for window in windows:
        for token in range(WINDOW):
            if batch.mask[window, token]:
                for expert_id in batch.expert_ids[window, token, layer, :TOP_K].tolist():
                    counts[expert_id] += 1
    return counts


def test_counts_the_choices_of_every_token_that_is_no_padding(batch: TraceBatch, trace: Path) -> None:
    loads = record_loads(TraceFiles(trace), batch_tokens=1)
    assert loads.model_fingerprint == "0123456789abcdef"
    for window in range(batch.num_windows):
        for layer in range(LAYERS):
            assert loads.counts[window, layer].tolist() == counted(batch, [window], layer)


def test_puts_windows_together_until_they_have_enough_tokens(batch: TraceBatch, trace: Path) -> None:
    loads = record_loads(TraceFiles(trace), batch_tokens=7)  # windows of 5, 5, 3, 5, 2 and 4 tokens
    assert [counts[0].tolist() for counts in loads.counts] == [
        counted(batch, [0, 1], 0),
        counted(batch, [2, 3], 0),  # the last two have 6 tokens
    ]


def test_a_trace_shorter_than_a_window_is_refused(trace: Path) -> None:
    with pytest.raises(ConfigError, match="batch_tokens=25 is not possible: no more than the trace has"):
        record_loads(TraceFiles(trace), batch_tokens=25)


@pytest.mark.parametrize("largest", [2**16 - 1, 2**16])
def test_loads_survive_their_file(largest: int, tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(100, size=(4, LAYERS, EXPERTS))
    counts[0, 0, 0] = largest
    ExpertLoads("0123456789abcdef", counts).save(tmp_path / "loads")
    loaded = ExpertLoads.load(tmp_path / "loads")
    assert loaded.model_fingerprint == "0123456789abcdef"
    assert loaded.counts.dtype == np.int64 and np.array_equal(loaded.counts, counts)


def test_the_command_writes_what_the_store_reads(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "loads"
    monkeypatch.setattr(sys, "argv", ["record_loads", f"trace={trace}", f"out={out}", "batch_tokens=7"])
    command.main()
    assert "2 windows of 3 layers and 8 experts" in capsys.readouterr().out
    assert ExpertLoads.load(out).counts.shape == (2, LAYERS, EXPERTS)


@pytest.mark.parametrize(("stack", "traced"), [("encoder", slice(0, 1)), ("decoder", slice(1, 3))])
def test_layers_of_a_stack_that_was_not_traced_have_no_load(
    stack: str, traced: slice, folder: Path, tmp_path: Path
) -> None:
    found = Checkpoint.open(folder)  # as if its first layer were an encoder's
    checkpoint = replace(found, architecture=replace(found.architecture, num_encoder_layers=1))
    counts = np.ones((2, traced.stop - traced.start, 8), np.int64)
    ExpertLoads(checkpoint.fingerprint, counts, stack).save(tmp_path / "loads")
    loads = ExpertLoads.load_for(checkpoint, tmp_path / "loads")
    assert (loads[:, traced] == 1).all() and loads.sum() == counts.sum() and loads.shape == (2, 3, 8)


def test_files_that_hold_no_loads_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no loads")
    for path in (tmp_path / "nothing", tmp_path / "text", tmp_path):
        with pytest.raises(ConfigError, match=r"^placement_trace=.*record_loads"):
            ExpertLoads.load(path)


def test_loads_of_another_model_or_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint, path = Checkpoint.open(folder), tmp_path / "loads"
    ExpertLoads(checkpoint.fingerprint, np.ones((2, 3, 8), np.int64)).save(path)
    assert ExpertLoads.load_for(checkpoint, path).shape == (2, 3, 8)
    ExpertLoads("0123456789abcdef", np.ones((2, 3, 8), np.int64)).save(path)
    with pytest.raises(ConfigError, match=f"are of model 0123456789abcdef, {folder} is"):
        ExpertLoads.load_for(checkpoint, path)
    ExpertLoads(checkpoint.fingerprint, np.ones((2, 3, 9), np.int64)).save(path)
    with pytest.raises(ConfigError, match="shape"):
        ExpertLoads.load_for(checkpoint, path)
