"""How evenly do nodes share a batch's tokens, for several ways to place experts on them?

Plans are made from the first half of a trace and measured on the second. *avg max load* is the share of a batch's (token,
chosen expert) pairs of one layer that the most loaded node gets, averaged over batches and layers; *max load* is the
largest share of all (Huang et al., arXiv 2303.06182, section VII). On 8 nodes an even load is 0.125. Nodes are equal.

- *contiguous*: equal ranges of expert ids, as expert parallelism usually has it.
- *even*: what the store does without loads: chunks of neighbours, each to the emptiest node.
- *random*: equally many experts of each layer on each node; the mean of 10 draws.
- *greedy*, *anti-correlation 0.5*: the paper's. *anti-correlation 0.05*: what the store does with `placement_trace`.
- *hindsight*: anti-correlation 0.05 from the second half itself.
- *floor*: no plan with equally many experts on each node can do better: in every batch and layer the node of the hottest
  expert has the coldest ones beside it, or all nodes have the same.

Traces: the reference model on its held-out text (or any folders of `actors.predictor.trace`), and a skewed one that is
drawn, not recorded (`skewed_loads` says how). Its experts of one topic are neighbours, which is the worst case for
contiguous ranges; *random* shows how much of the gain comes from breaking that up. Not measured: time, bytes, and
placement under a workload that shifts.

    python -m benchmarks.placement [--trace FOLDER ...] [--out placement.json] [--plot placement.png]
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.expert_store.balancing import (
    CORRELATION_WEIGHT,
    PAPER_CORRELATION_WEIGHT,
    MaxLoad,
    Plan,
    balance_by_correlation,
    balance_greedily,
    max_load,
    share_out,
    window_shares,
)
from actors.expert_store.placement import NodeOffer, make_chunks, place
from actors.expert_store.record_loads import record_loads
from actors.predictor.trace import TraceArguments, write_traces
from actors.predictor.traces import TraceFiles
from benchmarks.conditions import conditions
from common.config import REFERENCE_MODEL
from common.errors import ServingError

SEED = 0
RANDOM_PLANS = 10
WINDOW_TOKENS = 128  # of the reference model's text
SLAB_BYTES = 10**6  # of the imaginary nodes' experts

Loads = NDArray[np.int64]  # [batches, layers, experts]
Row = dict[str, Any]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trace", type=Path, nargs="+", default=[], help="folders, instead of the reference model"
    )
    parser.add_argument("--batch-tokens", type=int, default=512, help="of traces; the skewed one has 2048")
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG")
    return parser.parse_args(arguments)


def skewed_loads(
    num_batches: int = 256,
    num_layers: int = 12,
    num_experts: int = 128,
    batch_tokens: int = 2048,
    topic_experts: int = 8,
    topic_share: float = 0.8,
) -> Loads:
    """Loads of top-1 routing with topics, in the shape of Switch-base-128.

    Each batch is of one topic, drawn by Zipf(1) popularity. In every layer a topic has a group of `topic_experts`
    neighbouring experts of its own (which, is drawn per layer), and each of a batch's tokens goes with probability
    `topic_share` to the topic's group, there by Zipf(1) in an order drawn per layer and topic, or else to any expert, by
    Zipf(1) in an order drawn per layer.
    """
    random = np.random.default_rng(SEED)
    num_topics = num_experts // topic_experts
    topics = random.choice(num_topics, num_batches, p=_zipf(num_topics))
    loads = np.empty((num_batches, num_layers, num_experts), np.int64)
    for layer in range(num_layers):
        everybody = random.permutation(_zipf(num_experts))
        groups = random.permutation(num_topics)
        of_topic = np.zeros((num_topics, num_experts))  # probability of each expert
        for topic, group in enumerate(groups):
            members = slice(group * topic_experts, (group + 1) * topic_experts)
            of_topic[topic, members] = random.permutation(_zipf(topic_experts))
        mixed = topic_share * of_topic + (1 - topic_share) * everybody
        loads[:, layer] = random.multinomial(batch_tokens, mixed[topics])
    return loads


def _zipf(count: int) -> NDArray[np.float64]:
    weights = 1 / np.arange(1, count + 1)
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def reference_loads(batch_tokens: int) -> Loads:
    """Of the reference model on its held-out text, traced here."""
    text = str(REFERENCE_MODEL / "heldout.txt")
    settings = {"model": str(REFERENCE_MODEL), "text": text, "device": "cpu", "window_tokens": WINDOW_TOKENS}
    with TemporaryDirectory() as folder:
        write_traces(TraceArguments.model_validate({**settings, "out": folder}))
        return record_loads(TraceFiles(folder), batch_tokens).counts


def contiguous(first: Loads, num_nodes: int) -> Plan:
    _, layers, experts = first.shape
    return np.tile(np.arange(experts) * num_nodes // experts, (layers, 1))


def even(first: Loads, num_nodes: int) -> Plan:
    _, layers, experts = first.shape
    room = 2 * layers * experts * SLAB_BYTES
    offers = [NodeOffer(str(node), room, num_cpus=1, offers_host_memory=True) for node in range(num_nodes)]
    chunks = make_chunks(layers, experts, SLAB_BYTES, num_nodes)
    plan = np.empty((layers, experts), np.int64)
    for chunk, offer in zip(chunks, place(chunks, SLAB_BYTES, offers), strict=True):
        plan[chunk.layer, list(chunk.expert_ids)] = int(offer.node_id)
    return plan


def random_plan(first: Loads, num_nodes: int, seed: int) -> Plan:
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(layer) for layer in contiguous(first, num_nodes)])


def quotas(loads: Loads, num_nodes: int) -> NDArray[np.int64]:
    _, layers, experts = loads.shape
    return share_out(layers, experts, [layers * experts] * num_nodes)


def paper(first: Loads, num_nodes: int) -> Plan:
    return balance_by_correlation(first, quotas(first, num_nodes), PAPER_CORRELATION_WEIGHT)


PLANS: dict[str, Callable[[Loads, int], Plan]] = {
    "contiguous": contiguous,
    "even": even,
    "greedy": lambda first, num_nodes: balance_greedily(first, quotas(first, num_nodes)),
    f"anti-correlation {PAPER_CORRELATION_WEIGHT}": paper,
    f"anti-correlation {CORRELATION_WEIGHT}": lambda first, num_nodes: balance_by_correlation(
        first, quotas(first, num_nodes)
    ),
}


def floor(loads: Loads, num_nodes: int) -> MaxLoad:
    """What a plan with equally many experts on each node cannot go below."""
    rising = np.sort(window_shares(loads), axis=-1)  # [batches, layers, experts]
    beside = loads.shape[-1] // num_nodes - 1  # as many share a node with the hottest
    least = np.maximum(rising[..., -1] + rising[..., :beside].sum(-1), 1 / num_nodes)
    routed = least[loads.sum(-1) > 0]
    return MaxLoad(float(routed.mean()), float(routed.max()))


def measure(name: str, loads: Loads, num_nodes: int) -> list[Row]:
    half = len(loads) // 2
    first, second = loads[:half], loads[half:]
    rows = []
    for plan_name, make_plan in PLANS.items():
        began = time.perf_counter()
        plan = make_plan(first, num_nodes)
        seconds = time.perf_counter() - began
        rows.append(_row(name, num_nodes, plan_name, max_load(second, plan), seconds))
    draws = [max_load(second, random_plan(first, num_nodes, seed)) for seed in range(RANDOM_PLANS)]
    mean = MaxLoad(*np.mean([(draw.average, draw.worst) for draw in draws], axis=0).tolist())
    hindsight = max_load(second, balance_by_correlation(second, quotas(second, num_nodes)))
    return [
        *rows,
        _row(name, num_nodes, "random", mean),
        _row(name, num_nodes, "hindsight", hindsight),
        _row(name, num_nodes, "floor", floor(second, num_nodes)),
    ]


def _row(trace: str, num_nodes: int, plan: str, load: MaxLoad, seconds: float | None = None) -> Row:
    row: Row = {"trace": trace, "nodes": num_nodes, "plan": plan}
    row |= {"avg_max_load": round(load.average, 4), "max_load": round(load.worst, 4)}
    return row if seconds is None else {**row, "plan_ms": round(1000 * seconds, 1)}


def plot(rows: list[Row], path: Path) -> None:
    """A panel for each trace: bars for each number of nodes, marks for the worst batch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    traces, counts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("trace", "nodes"))
    plans = [plan for plan in dict.fromkeys(row["plan"] for row in rows) if plan != "hindsight"]
    figure, axes = plt.subplots(
        1, len(traces), figsize=(6 * len(traces), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, trace in zip(axes[0], traces, strict=True):
        for number, plan in enumerate(plans):
            shown = [row for row in rows if (row["trace"], row["plan"]) == (trace, plan)]
            places = [
                position + (number - len(plans) / 2) * 0.8 / len(plans) for position in range(len(counts))
            ]
            axis.bar(places, [row["avg_max_load"] for row in shown], 0.75 / len(plans), label=plan)
            axis.plot(places, [row["max_load"] for row in shown], "_", color="black")
        axis.set_title(trace)
        axis.set_xticks(range(len(counts)), [f"{count} nodes" for count in counts])
        axis.grid(alpha=0.3, axis="y")
    axes[0][0].set_ylabel("share of the most loaded node\nbars: mean, marks: worst batch")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(plans), fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(rows: list[Row]) -> None:
    for row in rows:
        print(
            f"{row['trace']:<16} {row['nodes']:>2} nodes  {row['plan']:<22} "
            f"avg max load {row['avg_max_load']:.3f}  max load {row['max_load']:.3f}"
        )


def load_traces(arguments: argparse.Namespace) -> dict[str, Loads]:
    recorded = {
        folder.name: record_loads(TraceFiles(folder), arguments.batch_tokens).counts
        for folder in arguments.trace
    }
    return {**(recorded or {"reference": reference_loads(arguments.batch_tokens)}), "skewed": skewed_loads()}


def main() -> None:
    arguments = parse_arguments()
    try:
        traces = load_traces(arguments)
    except ServingError as error:
        raise SystemExit(f"error: {error}") from error
    rows = [
        row
        for name, loads in traces.items()
        for count in arguments.nodes
        for row in measure(name, loads, count)
    ]
    print_table(rows)
    settings = {**vars(arguments), "trace": [folder.name for folder in arguments.trace], "seed": SEED}
    record = {
        "benchmark": "placement",
        "batches_layers_experts": {name: list(loads.shape) for name, loads in traces.items()},
        "results": rows,
        "conditions": conditions(**settings),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(rows, arguments.plot)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
