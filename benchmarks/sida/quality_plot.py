"""Draws what hash functions hit and what is lost, with the paper's figures beside."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sida.hash_functions import NETWORKS
from benchmarks.sida.paper import FIDELITY, HIT_RATE, PERPLEXITY

_INCHES = (4.6, 3.6)
_BAR = 0.2


def plot(record: dict[str, Any], path: Path) -> None:
    """Three panels: hit rates, fidelity, perplexity."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    width, height = _INCHES
    figure, axes = plt.subplots(1, 3, figsize=(3 * width, height), layout="constrained")
    tasks = record["tasks"]
    names = [f"{row['task']}\n{row['experts']}" for row in tasks]
    hits = {"token id": [row["token_id"]["top_3"] for row in tasks]}
    hits |= {network: [row[network]["top_3"] for row in tasks] for network in NETWORKS}
    _bars(
        axes[0],
        names,
        {**hits, "published": [HIT_RATE.get(row["experts"], {}).get(row["task"]) for row in tasks]},
        "top-3 hit rate",
    )
    kept = {network: [row[network]["fidelity_1"] for row in tasks] for network in NETWORKS}
    _bars(
        axes[1],
        names,
        {**kept, "published": [FIDELITY.get(row["experts"], {}).get(row["task"]) for row in tasks]},
        "score kept, one expert per token",
    )
    text = record["text"]
    ratios = {
        name.replace("_", ", "): [row[name]["ratio_1"] for row in text]
        for name in text[0]
        if name.startswith(("encoder_", "decoder_"))
    }
    published = [PERPLEXITY.get(row["experts"]) for row in text]
    ratios["published"] = [figures and figures[1] / figures[0] for figures in published]
    _bars(axes[2], [f"{row['experts']}" for row in text], ratios, "perplexity, predicted over exact")
    figure.suptitle("routing by hash functions, by task and number of experts")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: Any, names: Sequence[str], bars: dict[str, list[float | None]], title: str) -> None:
    for number, (label, values) in enumerate(bars.items()):
        places = [place + _BAR * number for place, value in enumerate(values) if value is not None]
        axis.bar(places, [value for value in values if value is not None], _BAR, label=label)
    axis.set_xticks(
        [place + _BAR * (len(bars) - 1) / 2 for place in range(len(names))], names, fontsize="small"
    )
    axis.set_title(title, fontsize="medium")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="x-small", loc="lower right")
