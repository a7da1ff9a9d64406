"""Routing traces, on a trace whose skew is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.gpu.routing_trace import RoutingTrace, trace_routing
from tests.tiny_models import NUM_EXPERTS, TOP_K, VOCAB_SIZE, make_model

ALTERNATING = RoutingTrace(np.array([[[0, 1], [2, 3]] * 4, [[0, 1]] * 8], np.uint8), num_experts=4)


def test_entropy_is_one_when_experts_are_used_evenly() -> None:
    assert ALTERNATING.usage_entropy() == pytest.approx([1.0, 0.5])


def test_overlap_compares_each_token_with_the_one_before() -> None:
    assert ALTERNATING.step_overlap().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("num_probabilities", [0, 12])
def test_a_trace_survives_its_file(tmp_path: Path, num_probabilities: int) -> None:
    trace = trace_routing(make_model("qwen3_moe"), _token_ids(), 8, num_probabilities)
    assert trace.ids.shape == (3, 16, TOP_K)
    trace.save(tmp_path / "trace.npz")
    loaded = RoutingTrace.load(tmp_path / "trace.npz")
    assert np.array_equal(loaded.ids, trace.ids) and loaded.num_experts == NUM_EXPERTS
    assert (loaded.probabilities is None) == (num_probabilities == 0)
    if loaded.probabilities is not None:
        assert loaded.probabilities.shape == (3, 12, NUM_EXPERTS)
        best = loaded.probabilities.argmax(-1)
        assert np.array_equal(best, loaded.ids[:, :12, 0])


def _token_ids() -> Tensor:
    return torch.randint(VOCAB_SIZE, (20,), generator=torch.Generator().manual_seed(0))
