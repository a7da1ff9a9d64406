"""Draws tokens per second and peak activation memory over the number of tokens, of skewed routing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANEL_INCHES = (4.2, 3.4)
DRAWN = ("dynamic", "masks, 1.25", "masks, no drops", "indices, no drops", "dense")
QUANTITIES = {"tokens_per_s": "tokens/s", "peak_mb": "peak of activations, MB"}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: a column for each shape and number of experts. What was left out has no point."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row["routing"] == "skewed" and "skipped" not in row]
    columns = list(dict.fromkeys((row["shape"], row["experts"]) for row in shown))
    width, height = PANEL_INCHES
    figure, axes = plt.subplots(
        2,
        len(columns),
        figsize=(width * len(columns), 2 * height),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for column, (shape, experts) in enumerate(columns):
        here = [row for row in shown if (row["shape"], row["experts"]) == (shape, experts)]
        for line, (quantity, label) in enumerate(QUANTITIES.items()):
            _draw(axes[line][column], here, quantity)
            axes[line][0].set_ylabel(label)
        axes[0][column].set_title(f"{shape}, {experts} experts")
        axes[1][column].set_xlabel("tokens")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw(axis: Any, rows: list[dict[str, Any]], quantity: str) -> None:
    for gating in DRAWN:
        points = sorted((row["tokens"], row[quantity]) for row in rows if row["gating"] == gating)
        style = {"linestyle": "--", "color": "black"} if gating == "dense" else {}
        axis.plot(
            [tokens for tokens, _ in points],
            [value for _, value in points],
            marker="o",
            markersize=3,
            label=gating,
            **style,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
