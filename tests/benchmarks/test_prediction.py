"""The benchmark of predictions on a tiny model: every predictor has its row, and routers asked in time know everything."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.predictor.library_routing import load_resident_model
from actors.predictor.next_gate import EarlyRouters
from actors.predictor.text import read_windows
from actors.predictor.tracing import RoutingTracer
from benchmarks import prediction
from benchmarks.prediction import EarlyRecall
from common.checkpoint import Checkpoint
from tests.tiny_models import TOP_K, make_checkpoint

LAYERS = 3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = make_checkpoint("qwen3_moe", tmp_path / "model", num_layers=LAYERS)
    tokens = torch.randint(20, (1600,), generator=torch.Generator().manual_seed(0)).numpy()
    np.savez(tmp_path / "text.npz", train=tokens[:1200], held_out=tokens[1200:])
    return folder


def test_one_command_compares_all_predictors_layer_by_layer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, picture, text = tmp_path / "prediction.json", tmp_path / "prediction.png", tmp_path / "text.npz"
    command = (
        f"prediction --model {model} --text {text}#train --held-out {text}#held_out --device cpu --steps 6"
    )
    command += f" --evaluate-every 3 --window-tokens 20 --held-out-tokens 400 --out {out} --plot {picture}"
    monkeypatch.setattr(sys, "argv", command.split())
    prediction.main()
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [
        "frequent by layer",
        "frequent by token",
        "hash function, paper",
        "hash function, filters",
        "hash function, filters_distilled",
        "router, 1 early",
        "router, 2 early",
    ]
    assert all(len(row["recall"]) == LAYERS for row in rows.values())
    assert rows["frequent by token"]["recall"][0] > rows["frequent by layer"]["recall"][0]
    for name in ("paper", "filters"):
        row = rows[f"hash function, {name}"]
        assert row["num_tokens"] == 400 and row["trained_steps"] == 6 and row["ms_per_512_tokens"] > 0
    assert rows["router, 2 early"]["recall"][:2] == [None, None]
    assert picture.stat().st_size > 10_000


def test_a_router_that_is_asked_in_time_is_always_right_and_early_ones_are_counted_exactly(
    model: Path, tmp_path: Path
) -> None:
    resident = load_resident_model(model, torch.device("cpu"), torch.float32)
    routers, tracer = (
        EarlyRouters(resident, Checkpoint.open(model).architecture),
        RoutingTracer(resident, model),
    )
    token_ids, mask = read_windows(f"{tmp_path}/text.npz#held_out", model, 30)  # the last window is shorter
    batches = list(zip(token_ids.split(4), mask.split(4), strict=True))
    now, one_early = EarlyRecall(tracer, routers).rows(batches, [0, 1])
    assert now["recall"] == [1.0] * LAYERS
    found = total = 0
    for ids, inside in batches:
        true = tracer.trace(ids, inside).expert_ids[inside][:, 2].tolist()
        shares = routers.guess(2, routers.last_read(1))[inside.flatten().numpy()]
        for row, experts in zip(shares, true, strict=True):
            found += len(set(np.argsort(-row)[:TOP_K].tolist()) & set(experts))
            total += TOP_K
    assert one_early["recall"][2] == pytest.approx(found / total) and 0.2 < found / total < 1
    assert one_early["recall"][0] is None
