"""The report of all executors, the body of `GET /v1/experts`, in Prometheus's terms. Counts nothing itself."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

# Of an executor: key of its report, kind, name and meaning.
_OF_EXECUTOR: Sequence[tuple[str, type[Any], str, str]] = (
    ("num_running", GaugeMetricFamily, "num_requests_running", "Requests in the batch."),
    ("num_waiting", GaugeMetricFamily, "num_requests_waiting", "Requests that wait for a row of the batch."),
    ("prompt_tokens", CounterMetricFamily, "prompt_tokens", "Prompt tokens computed."),
    ("generated_tokens", CounterMetricFamily, "generation_tokens", "Tokens generated."),
)
# Of each of its layers.
_OF_LAYER: Sequence[tuple[str, type[Any], str, str]] = (
    ("hits", CounterMetricFamily, "expert_hits", "Experts that a pass needed and that lay in a slot."),
    ("misses", CounterMetricFamily, "expert_misses", "Experts that a pass needed and that lay in none."),
    ("evictions", CounterMetricFamily, "expert_evictions", "Experts that left their slot to others."),
    ("prefetched", CounterMetricFamily, "expert_prefetched", "Experts copied ahead of need."),
    ("prefetched_used", CounterMetricFamily, "expert_prefetched_used", "Of those, needed before they left."),
    ("prefetched_wasted", CounterMetricFamily, "expert_prefetched_wasted", "Of those, left before need."),
    ("moved_bytes", CounterMetricFamily, "expert_moved_bytes", "Bytes copied into slots."),
    (
        "predictor_recall",
        GaugeMetricFamily,
        "expert_prediction_recall",
        "Share of the routers' choices that hash tables named.",
    ),
)
# Of each predictor that asked for copies, over all layers.
_OF_PREDICTOR: Sequence[tuple[str, str, str]] = (
    ("copied", "predictor_prefetched", "Experts copied ahead of need, by the predictor that named them."),
    ("used", "predictor_prefetched_used", "Of those, needed before they left."),
    ("wasted", "predictor_prefetched_wasted", "Of those, left before need."),
)


def registry_of(report: Mapping[str, Any]) -> CollectorRegistry:
    """A registry that shows one report.

    Args:
        report: of `Backend.expert_report`. An executor that did not answer is counted, and has no series.
    """
    registry = CollectorRegistry()
    registry.register(_Report(report))
    return registry


class _Report:
    """A collector, as prometheus_client calls it."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        executors = self._report["executors"]
        yield GaugeMetricFamily(
            "sida_unreachable_executors",
            "Executors that did not answer this scrape.",
            self._report["unreachable_executors"],
        )
        yield from _whole_application(self._report)
        for key, kind, name, meaning in _OF_EXECUTOR:
            yield _family(kind, name, meaning, ["replica"], [((), each, each[key]) for each in executors])
        yield from _slots(executors)
        layers = [(str(layer["layer"]), each, layer) for each in executors for layer in each["layers"]]
        for key, kind, name, meaning in _OF_LAYER:
            values = [((number,), each, layer[key]) for number, each, layer in layers]
            yield _family(kind, name, meaning, ["replica", "layer"], values)
        by_predictor = [((by,), each, n) for each in executors for by, n in each["prefetches"].items()]
        for key, name, meaning in _OF_PREDICTOR:
            values = [(label, each, counts[key]) for label, each, counts in by_predictor]
            yield _family(CounterMetricFamily, name, meaning, ["replica", "predictor"], values)
        tables = [((kind,), each, n) for each in executors for kind, n in each["hash_tables"].items()]
        meaning = "Hash tables, by when they came, or why they were not used."
        yield _family(CounterMetricFamily, "expert_hash_tables", meaning, ["replica", "kind"], tables)


def _whole_application(report: Mapping[str, Any]) -> Iterator[Metric]:
    predictions = report["predictions"]
    yield CounterMetricFamily(
        "sida_expert_predictions", "Predictions asked for by this ingress.", predictions["started"]
    )
    yield CounterMetricFamily(
        "sida_expert_predictions_failed", "Of those, the ones that failed.", predictions["failed"]
    )
    if report["store"] is not None:
        yield GaugeMetricFamily(
            "sida_expert_store_bytes", "Experts in host memory.", report["store"]["total_bytes"]
        )


def _slots(executors: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    labels = ["replica", "layer"]
    layers = [((str(layer["layer"]),), each, layer) for each in executors for layer in each["layers"]]
    slots = [(label, each, each["slots_per_layer"]) for label, each, _ in layers]
    yield _family(GaugeMetricFamily, "expert_slots", "Slots for experts.", labels, slots)
    resident = [(label, each, len(layer["resident"])) for label, each, layer in layers]
    yield _family(GaugeMetricFamily, "expert_resident", "Experts in slots.", labels, resident)


def _family(
    kind: type[Any],
    name: str,
    meaning: str,
    labels: Sequence[str],
    values: Sequence[tuple[tuple[str, ...], Mapping[str, Any], float | None]],
) -> Metric:
    """
    Args:
        values: labels after the first, the executor, and the value; None has no series.
    """
    family: Metric = kind(f"sida_{name}", meaning, labels=labels)
    for more_labels, executor, value in values:
        if value is not None:
            family.add_metric([executor["replica"], *more_labels], value)  # type: ignore[attr-defined]
    return family
