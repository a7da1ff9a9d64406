"""Draws the miss rate over the slots: a panel for each predictor, a line for each policy, Belady's order in all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cache_policies.cells import BELADY

PANEL_INCHES = (4.2, 3.6)
COLUMNS = 3


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Write a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    predictors = list(dict.fromkeys(row["predictor"] for row in rows))
    columns, lines = min(COLUMNS, len(predictors)), -(-len(predictors) // COLUMNS)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines)
    figure, axes = plt.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(predictors) :]:
        axis.set_visible(False)
    floor = [row for row in rows if row["policy"] == BELADY]
    for axis, predictor in zip(axes.flat, predictors, strict=False):
        shown = [row for row in rows if row["predictor"] == predictor and row["policy"] != BELADY]
        for policy in dict.fromkeys(row["policy"] for row in shown):
            _draw(axis, [row for row in shown if row["policy"] == policy], label=policy, marker="o")
        _draw(axis, floor, label="belady, on demand", linestyle="--", color="black")
        ahead = max((row["copies_ahead"] for row in shown), default=0)
        axis.set_title(predictor if not ahead else f"{predictor}, {ahead} ahead per layer")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylim(bottom=0)
    for axis in axes[-1]:
        axis.set_xlabel("slots per layer")
    figure.supylabel("needed experts that miss, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw(axis: Any, rows: Sequence[dict[str, Any]], **style: Any) -> None:
    rows = sorted(rows, key=lambda row: row["slots"])
    slots, rates = [row["slots"] for row in rows], [100 * row["miss_rate"] for row in rows]
    axis.plot(slots, rates, markersize=3, linewidth=1.2, **style)
