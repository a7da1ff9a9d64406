"""Draws results of the decode benchmark: step time over the share of experts in slots, a panel per routing.

python -m benchmarks.gpu.plot_decode results.json [more.json ...] --out results.png
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.decode_report import ALL, Row, complete

PANEL_INCHES = (4.2, 4.4)


def plot(rows: Sequence[Row], baselines: Sequence[Row], title: str, path: Path) -> None:
    """Write a PNG. Args: rows: completed; of several evictions or ways to prefetch, the first is drawn."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["what"] == "decode"]
    if not rows:
        return
    rows = _first_variants(rows)
    routings = list(dict.fromkeys(row["routing"] for row in rows))
    width, height = PANEL_INCHES
    figure, axes = plt.subplots(
        1,
        len(routings),
        figsize=(width * len(routings), height),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, routing in zip(axes[0], routings, strict=True):
        _draw_panel(axis, [row for row in rows if row["routing"] == routing], baselines)
        axis.set_title(f"{routing} routing")
    axes[0][0].set_ylabel("ms per decode step")
    handles, labels = axes[0][0].get_legend_handles_labels()
    lines = "solid: measured (min to max), dashed: link, dotted: compute" + (
        ", x: library" if baselines else ""
    )
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small", title=lines
    )
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _first_variants(rows: Sequence[Row]) -> list[Row]:
    """Of each batch, routing and share, the variant (eviction, prefetching) that was measured first."""
    first: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        first.setdefault((row["batch"], row["routing"], row["share"]), row)
    return list(first.values())


def _draw_panel(axis: Any, rows: Sequence[Row], baselines: Sequence[Row]) -> None:
    from matplotlib import ticker

    for index, batch in enumerate(sorted({row["batch"] for row in rows})):
        line = sorted((row for row in rows if row["batch"] == batch), key=lambda row: row["share"])
        shares, times = [100 * row["share"] for row in line], [row["step_ms"] for row in line]
        spread = [
            [row["step_ms"] - row["step_ms_min_max"][0] for row in line],
            [row["step_ms_min_max"][1] - row["step_ms"] for row in line],
        ]
        style = {"color": f"C{index}"}
        axis.errorbar(shares, times, yerr=spread, marker="o", markersize=4, label=f"batch {batch}", **style)
        paged = [row for row in line if row["share"] < ALL]
        axis.plot(
            [100 * row["share"] for row in paged],
            [row["link_ms"] for row in paged],
            "_--",
            alpha=0.7,
            **style,
        )
        if line[0].get("compute_ms") is not None:
            axis.axhline(line[0]["compute_ms"], linestyle=":", alpha=0.7, **style)
        resident = [
            row["step_ms"] for row in baselines if row.get("implementation") and row["batch"] == batch
        ]
        if resident:
            axis.plot([100], [min(resident)], marker="x", linestyle="none", **style)
    ticks = sorted({100 * row["share"] for row in rows})
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.set_xlabel("experts in slots on the GPU")
    axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="of gpu.decode and of gpu.baselines")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    records = [json.loads(path.read_text()) for path in arguments.results]
    rows = [row for record in records if record["benchmark"] == "gpu_decode" for row in record["results"]]
    baselines = [row for record in records for row in baselines_of(record)]
    complete(rows)
    plot(rows, baselines, title_of(records[0]), arguments.out)


def baselines_of(record: Row) -> list[Row]:
    rows: list[Row] = record["results"] if record["benchmark"] == "gpu_baselines" else record["baselines"]
    return rows


def title_of(record: Row) -> str:
    conditions, settings = record["conditions"], record["conditions"]["settings"]
    model = settings["model"] or f"Qwen3-30B-A3B shape, {settings['layers']} layers, random weights"
    return f"{model}, {conditions['gpu'] or conditions['processor']}"


if __name__ == "__main__":
    main()
