"""Traces of real library models: complete, aligned with the routers' decisions, and the same from disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.predictor.arguments import read_arguments
from actors.predictor.library_routing import intercepted_routing, load_resident_model
from actors.predictor.trace import TraceArguments, write_traces
from actors.predictor.traces import TraceFiles, windows
from actors.predictor.tracing import LiveTraces, RoutingTracer, find_teacher
from actors.predictor.train import TrainArguments, read_training_data
from common.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.tiny_models import NUM_EXPERTS, TOP_K, VOCAB_SIZE, make_checkpoint

CPU = torch.device("cpu")


def some_windows(count: int = 3, length: int = 10) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB_SIZE, (count * length - 4,), generator=torch.Generator().manual_seed(1))
    return windows(tokens, length)


def routed_ids(model: torch.nn.Module, token_ids: Tensor) -> Tensor:
    """[layers, tokens, top_k], sorted: what the experts modules were told."""
    seen: list[Tensor] = []

    def record(layer: int, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        assert layer == len(seen)
        seen.append(ids.sort(-1).values)
        return ids, weights

    with torch.no_grad(), intercepted_routing(model, record):
        model(input_ids=token_ids, use_cache=False)
    return torch.stack(seen)


@pytest.mark.parametrize(
    ("family", "weight_sum"),
    [("qwen3_moe", 1.0), ("mixtral", 1.0), ("olmoe", None), ("qwen2_moe", None), ("gpt_oss", 1.0)],
)
def test_traces_hold_what_the_routers_decided(family: str, weight_sum: float | None, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    model = load_resident_model(folder, CPU, torch.float32)
    token_ids, mask = some_windows()
    source = LiveTraces(RoutingTracer(model, folder), token_ids, mask)
    assert (source.header.top_k, source.header.num_kept) == (TOP_K, NUM_EXPERTS)
    assert source.header.weight_rule.sum == weight_sum
    (batch,) = source.batches(8, None)
    assert batch.logits is not None and batch.logits.shape == (
        *token_ids.shape,
        source.header.num_layers,
        NUM_EXPERTS,
    )
    assert source.header.teacher == "logits"
    traced = batch.expert_ids.sort(-1).values.permute(2, 0, 1, 3).flatten(1, 2)
    assert torch.equal(traced, routed_ids(model, token_ids))


def test_unweighted_rules_reproduce_the_routers_weights(tmp_path: Path) -> None:
    folder = make_checkpoint("olmoe", tmp_path)
    model = load_resident_model(folder, CPU, torch.float32)
    source = LiveTraces(RoutingTracer(model, folder), *some_windows())
    assert source.header.weight_rule.scale == 1.0


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "granitemoe", "phimoe", "minimax_m2", "ernie4_5_moe", "llama4_text", "dbrx"]
)
def test_every_familys_decisions_are_traced(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    model = load_resident_model(folder, CPU, torch.float32)
    token_ids, mask = some_windows()
    source = LiveTraces(RoutingTracer(model, folder), token_ids, mask)
    (batch,) = source.batches(8, None)
    traced = batch.expert_ids.permute(2, 0, 1, 3).reshape(source.header.num_layers, -1)
    told = routed_ids(model, token_ids).reshape(source.header.num_layers, -1)
    assert torch.equal(traced.sort(-1).values, told.sort(-1).values)
    assert batch.weights.shape == batch.expert_ids.shape and batch.weights.isfinite().all()


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_routers_that_do_more_than_softmax_and_top_k_are_not_learned(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path / "model")
    np.savez(tmp_path / "text.npz", part=np.arange(80) % VOCAB_SIZE)
    words = [f"model={folder}", f"text={tmp_path}/text.npz#part", "window_tokens=10", "device=cpu"]
    with pytest.raises(UnsupportedModelError, match="router"):
        read_training_data(read_arguments(TrainArguments, words))


def test_weights_that_are_no_softmax_are_told_apart() -> None:
    logits = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    values, ids = logits.topk(2)
    scores = values.sigmoid()
    assert find_teacher(logits, ids, scores / scores.sum(-1, keepdim=True))[0] == "choices"
    assert find_teacher(logits, ids, values.softmax(-1))[0] == "logits"
    assert find_teacher(None, ids, scores)[0] == "choices"


def test_a_trace_that_was_cut_off_is_resumed_bit_by_bit(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path / "model")
    np.savez(tmp_path / "text.npz", part=np.arange(95) % VOCAB_SIZE)

    def arguments(out: str, **changes: str | int) -> TraceArguments:
        fields = {"text": f"{tmp_path}/text.npz#part", "window_tokens": 10, "batch_size": 4, **changes}
        return TraceArguments.model_validate(
            {"model": str(folder), "out": str(tmp_path / out), "device": "cpu", **fields}
        )

    write_traces(arguments("whole"))
    write_traces(arguments("cut"))
    shards = sorted((tmp_path / "cut").glob("shard-*"))
    for shard in shards[1:]:
        shard.unlink()
    with pytest.raises(CheckpointError, match="resume"):
        TraceFiles(tmp_path / "cut")
    write_traces(arguments("cut"))
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()
    with pytest.raises(ConfigError, match="holds traces with"):
        write_traces(arguments("cut", window_tokens=12))


def test_replacing_the_routing_with_itself_changes_nothing_and_with_another_does(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path)
    model = load_resident_model(folder, CPU, torch.float32)
    token_ids, _ = some_windows()
    with torch.no_grad():
        expected = model(input_ids=token_ids).logits
        with intercepted_routing(model, lambda _layer, ids, weights: (ids, weights)):
            same = model(input_ids=token_ids).logits
        with intercepted_routing(model, lambda _layer, ids, weights: ((ids + 1) % NUM_EXPERTS, weights)):
            other = model(input_ids=token_ids).logits
        after = model(input_ids=token_ids).logits
    assert torch.equal(same, expected) and torch.equal(after, expected)
    assert not torch.allclose(other, expected, atol=1e-2)


def test_traces_from_disk_equal_live_ones(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path / "model")
    tokens = torch.randint(VOCAB_SIZE, (95,), generator=torch.Generator().manual_seed(1))
    np.savez(tmp_path / "text.npz", part=tokens.numpy())
    arguments = TraceArguments(
        model=str(folder),
        text=f"{tmp_path}/text.npz#part",
        out=str(tmp_path / "traces"),
        device="cpu",
        window_tokens=10,
        batch_size=4,
    )
    assert write_traces(arguments) == 95
    files = TraceFiles(tmp_path / "traces")
    live = LiveTraces(
        RoutingTracer(load_resident_model(folder, CPU, torch.float32), folder), *windows(tokens, 10)
    )
    assert files.header == live.header
    assert files.num_shards == 3
    for stored, fresh in zip(files.batches(4, None), live.batches(4, None), strict=True):
        assert torch.equal(stored.token_ids, fresh.token_ids) and torch.equal(stored.mask, fresh.mask)
        assert torch.equal(stored.expert_ids, fresh.expert_ids)
        assert stored.logits is not None and fresh.logits is not None
        torch.testing.assert_close(stored.logits, fresh.logits, rtol=1e-3, atol=1e-3)


def test_shuffled_batches_hold_every_window_once(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path / "model")
    token_ids, mask = windows(torch.arange(120) % VOCAB_SIZE, 10)
    live = LiveTraces(RoutingTracer(load_resident_model(folder, CPU, torch.float32), folder), token_ids, mask)
    seen = torch.cat([batch.token_ids for batch in live.batches(5, torch.Generator().manual_seed(0))])
    assert not torch.equal(seen, token_ids)
    assert sorted(seen.tolist()) == sorted(token_ids.tolist())


def test_unusable_traces_and_texts_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"traces\.json"):
        TraceFiles(tmp_path)
    folder = make_checkpoint("qwen3_moe", tmp_path / "model")
    arguments = TraceArguments(
        model=str(folder), text=f"{tmp_path}/none.npz#part", out=str(tmp_path / "t"), device="cpu"
    )
    with pytest.raises(ConfigError, match="text="):
        write_traces(arguments)
