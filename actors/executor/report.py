"""What an executor tells about its experts: the body of `GET /v1/experts`, per replica. Frozen numbers, no behaviour."""

from dataclasses import asdict, dataclass
from typing import Any

from actors.executor.pager import LayerCounters, PrefetchCounts


@dataclass(frozen=True)
class LayerReport:
    layer: int
    resident: tuple[int, ...]  # expert ids
    hits: int
    misses: int
    prefetched: int
    prefetched_used: int
    prefetched_wasted: int
    evictions: int
    moved_bytes: int
    predictor_recall: float | None  # of the true top-k, over prompts with a hash table

    @classmethod
    def of(
        cls, layer: int, resident: list[int], counters: LayerCounters, recall: float | None
    ) -> "LayerReport":
        return cls(layer=layer, resident=tuple(resident), predictor_recall=recall, **vars(counters))


@dataclass(frozen=True)
class EngineReport:
    paging: str  # "device": by the decode graphs; "host": layer by layer
    slots_per_layer: int
    num_experts: int
    layers: tuple[LayerReport, ...]
    prefetches: dict[str, PrefetchCounts]  # by who asked for them, over all layers
    hash_tables: dict[str, int]  # how many came on_time, late, lost, or were unusable
    num_running: int
    num_waiting: int
    prompt_tokens: int
    generated_tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
