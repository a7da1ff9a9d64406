"""A `Backend` that echoes, and tells of two executors of two layers with four experts, and of a third that is away."""

import time
from typing import Any

from tests.deployments.fakes import EchoBackend

REPLICAS = ("first", "second")
NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS = 2, 4, 3


def _layer(layer: int, factor: int) -> dict[str, Any]:
    counted = {
        "hits": 30,
        "misses": 10,
        "prefetched": 8,
        "prefetched_used": 5,
        "prefetched_wasted": 2,
        "evictions": 7,
    }
    return {
        "layer": layer,
        "resident": [0, 3],
        **{key: factor * (value + layer) for key, value in counted.items()},
        "moved_bytes": factor * 1000,
        "predictor_recall": 0.75 if factor == 1 else None,
    }


class TwoExecutors(EchoBackend):
    store: dict[str, Any] | None = {"total_bytes": 5000}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.num_looks = 0

    async def expert_report(self) -> dict[str, Any]:
        executors = [
            {
                "replica": replica,
                "slots_per_layer": NUM_SLOTS,
                "num_experts": NUM_EXPERTS,
                "layers": [_layer(layer, factor) for layer in range(NUM_LAYERS)],
                "prefetches": {"next-gate": {"copied": 9 * factor, "used": 6, "wasted": 3}},
                "hash_tables": {"on_time": 4 * factor, "late": 3, "lost": 2, "unusable": 1},
                "num_running": 2 * factor,
                "num_waiting": factor,
                "prompt_tokens": 100 * factor,
                "generated_tokens": 50 * factor,
            }
            for factor, replica in enumerate(REPLICAS, start=1)
        ]
        predictions = {"started": 9, "failed": 1}
        return {
            "store": self.store,
            "predictions": predictions,
            "executors": executors,
            "unreachable_executors": 1,
        }

    async def live_view(self) -> dict[str, Any]:
        """Every mark is on the page; the totals grow with each look."""
        self.num_looks += 1
        executors = [
            {
                "replica": replica,
                "time_s": time.monotonic(),
                "num_running": 2 * factor,
                "num_waiting": factor,
                "prompt_tokens": 10 * self.num_looks,
                "generated_tokens": 20 * self.num_looks,
                "hits": 30 * self.num_looks,
                "misses": 10 * self.num_looks,
                "moved_bytes": 1_000_000 * self.num_looks,
                "experts": ["hm.p", "ook."],
            }
            for factor, replica in enumerate(REPLICAS, start=1)
        ]
        return {"executors": executors, "unreachable_executors": 1}
