"""What the rows of a speed table say: each system over the all-resident ones, in speed and in memory."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sida.paper import MEMORY_SAVED, SPEEDUP

Row = dict[str, Any]

CASE = ("experts", "dtype", "task", "padding")
STRONG = ("skip-empty", "grouped")  # all-resident systems that do not visit empty experts
PANEL_INCHES = (4.0, 3.4)


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row for each system with slots: how many times as fast as others, and in which share of their memory.

    `over_strong` compares with the faster of the all-resident systems that skip empty experts.
    """
    return [
        {**{name: row[name] for name in (*CASE, "system", "slots")}, **_compared(row, of_case)}
        for of_case in by_case(rows).values()
        for row in of_case
        if row["system"] not in ("loop", *STRONG)
    ]


def by_case(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in CASE), []).append(row)
    return cases


def _compared(row: Row, of_case: Sequence[Row]) -> Row:
    rates = {
        other["system"]: other["sentences_per_s"] for other in of_case if other["system"] in ("loop", *STRONG)
    }
    strong = [rates[system] for system in STRONG if system in rates]
    compared: Row = {"slots_share": round(row["slots"] / row["experts"], 4)}
    if "loop" in rates:
        compared["over_loop"] = round(row["sentences_per_s"] / rates["loop"], 3)
    compared["paper_over_loop"] = SPEEDUP.get(row["experts"], {}).get(row["task"])
    if strong:
        compared["over_strong"] = round(row["sentences_per_s"] / max(strong), 3)
    resident = [
        other["peak_gpu_gb"]
        for other in of_case
        if other["system"] == "skip-empty" and "peak_gpu_gb" in other
    ]
    if resident:
        compared["memory_share"] = round(row["peak_gpu_gb"] / resident[0], 4)
        compared["paper_memory_saved"] = MEMORY_SAVED.get(row["experts"], {}).get(row["task"])
    return compared


def print_summary(summary: Sequence[Row]) -> None:
    for row in summary:
        print("  ".join(f"{name}={value}" for name, value in row.items()))


def plot(rows: Sequence[Row], path: Path) -> None:
    """A row of panels for each number of experts and dtype, a panel for each task: sentences per second over slots."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row["padding"] == "unpadded"] or list(rows)
    models = list(dict.fromkeys((row["experts"], row["dtype"]) for row in shown))
    tasks = list(dict.fromkeys((row["task"], row["mirrors"]) for row in shown))
    figure, axes = plt.subplots(
        len(models),
        len(tasks),
        figsize=(PANEL_INCHES[0] * len(tasks), PANEL_INCHES[1] * len(models)),
        squeeze=False,
        layout="constrained",
    )
    for line, (experts, dtype) in zip(axes, models, strict=True):
        for axis, (task, mirrored) in zip(line, tasks, strict=True):
            here = [
                row for row in shown if (row["experts"], row["dtype"], row["task"]) == (experts, dtype, task)
            ]
            _draw(axis, here)
            axis.set_title(f"{experts} experts, {dtype}, {task} (as {mirrored})", fontsize="small")
            axis.set_xlabel("slots, % of the experts")
        line[0].set_ylabel("sentences / s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis: Any, rows: Sequence[Row]) -> None:
    for number, system in enumerate(dict.fromkeys(row["system"] for row in rows)):
        of_system = sorted(
            (row for row in rows if row["system"] == system), key=lambda row: int(row["slots"])
        )
        rates, color = [row["sentences_per_s"] for row in of_system], f"C{number}"
        if system in ("loop", *STRONG):
            axis.axhline(rates[0], label=system, linestyle="--", color=color)
        else:
            shares = [100 * row["slots"] / row["experts"] for row in of_system]
            axis.plot(shares, rates, label=system, marker="o", color=color)
    axis.set_xlim(0, 100)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
