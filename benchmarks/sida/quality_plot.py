"""Draws what hash functions hit and what is lost, with the paper's figures beside."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sida.hash_functions import NETWORKS
from benchmarks.sida.paper import FIDELITY, HIT_RATE, PERPLEXITY
from benchmarks.sida.text_quality import DECODER

_INCHES = (4.8, 3.8)
_BAR = 0.18
PUBLISHED, RANDOM = "published", "random experts"
_COLORS = {
    "token id": "C2",
    "paper": "C1",
    "ours": "C0",
    "ours, both stacks": "C9",
    RANDOM: "C5",
    PUBLISHED: "0.6",
}

Bars = dict[str, Sequence[float | None]]


def plot(record: dict[str, Any], path: Path) -> None:
    """Three panels: hit rates, fidelity, perplexity."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tasks, text = record["tasks"], record["text"]
    names = [f"{row['task']}\n{row['experts']}" for row in tasks]
    width, height = _INCHES
    figure, axes = plt.subplots(1, 3, figsize=(3 * width, height), layout="constrained")
    _draw(axes[0], names, _hit_rates(tasks), "top-3 hit rate")
    _draw(axes[1], names, _fidelities(tasks), "score kept, one expert per token")
    _draw(axes[2], [str(row["experts"]) for row in text], _ratios(text), "perplexity, predicted over exact")
    figure.suptitle("routing by hash functions, by task and number of experts")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _hit_rates(tasks: Sequence[dict[str, Any]]) -> Bars:
    return {
        "token id": [row["token_id"]["top_3"] for row in tasks],
        **{network: [row[network]["top_3"] for row in tasks] for network in NETWORKS},
        PUBLISHED: [HIT_RATE.get(row["experts"], {}).get(row["task"]) for row in tasks],
    }


def _fidelities(tasks: Sequence[dict[str, Any]]) -> Bars:
    return {
        RANDOM: [row["random"]["fidelity_1"] for row in tasks],
        **{network: [row[network]["fidelity_1"] for row in tasks] for network in NETWORKS},
        PUBLISHED: [FIDELITY.get(row["experts"], {}).get(row["task"]) for row in tasks],
    }


def _ratios(text: Sequence[dict[str, Any]]) -> Bars:
    published = [PERPLEXITY.get(row["experts"]) for row in text]
    return {
        RANDOM: [row["random"]["ratio_1"] for row in text],
        **{network: [row[f"encoder_{network}"]["ratio_1"] for row in text] for network in NETWORKS},
        "ours, both stacks": [row[DECODER]["ratio_1"] for row in text],
        PUBLISHED: [figures and figures[1] / figures[0] for figures in published],
    }


def _draw(axis: Any, names: Sequence[str], bars: Bars, title: str) -> None:
    for number, (label, values) in enumerate(bars.items()):
        shown = {place + _BAR * number: value for place, value in enumerate(values) if value is not None}
        axis.bar(shown.keys(), shown.values(), _BAR, label=label, color=_COLORS[label])
    middle = _BAR * (len(bars) - 1) / 2
    axis.set_xticks([place + middle for place in range(len(names))], names, fontsize="small")
    axis.set_title(title, fontsize="medium")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(bars))
