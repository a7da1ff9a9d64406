"""The library's decode step, at a toy size on the CPU."""

import pytest
import torch

from benchmarks.gpu.baselines import check_offloaded, measure_resident, weight_read_limit_ms
from benchmarks.gpu.shapes import TINY, qwen3_30b, random_model

CPU = torch.device("cpu")
CONFIG = qwen3_30b(2, torch.float32, **TINY)


def test_one_token_reads_the_active_parameters_and_no_embedding_table() -> None:
    active_bytes = 2 * (3.35e9 - 151936 * 2048)  # published: 3.3 B of 30.5 B
    limit_ms = weight_read_limit_ms(qwen3_30b(), batch=1, distinct_experts_per_layer=8, bandwidth=4000)
    assert limit_ms == pytest.approx(active_bytes / 4000 / 1e6, rel=0.01)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_a_resident_step_is_timed_as_often_as_asked(implementation: str) -> None:
    row = measure_resident(random_model(CONFIG, CPU, seed=0), implementation, 2, 8, runs=5, device=CPU)
    assert row["runs"] == 5 and row["step_ms"] > 0
    assert TINY["num_experts_per_tok"] <= row["distinct_experts"] <= 2 * TINY["num_experts_per_tok"]


def test_experts_that_were_not_offloaded_are_noticed() -> None:
    with pytest.raises(RuntimeError, match="is on cpu"):
        check_offloaded(random_model(CONFIG, CPU, seed=0))
