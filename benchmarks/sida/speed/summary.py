"""What the rows of a speed table say: systems with few slots over the all-resident ones, in speed and in memory."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sida.paper import MEMORY_SAVED, SPEEDUP
from benchmarks.sida.quality_table import print_table

Row = dict[str, Any]

CASE = ("experts", "dtype", "task", "padding")
LIBRARY = ("skip-empty", "grouped")  # all-resident systems of the library that do not visit empty experts
RESIDENT = ("loop", *LIBRARY, "all-slots")
SHOWN = ("loop", "skip-empty", "all-slots", "on-demand", "sida", "sida-exact", "oracle")
PANEL_INCHES = (4.0, 3.4)


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row for each system with few slots: how many times as fast as others, and in which share of their memory.

    `over_skip_empty` compares with the faster of the library's systems that skip empty experts, `over_all_slots` with this
    project's engine where nothing moves; `memory_share` with the one of all weights and the least memory.
    """
    return [
        {**{name: row[name] for name in (*CASE, "system", "slots")}, **_compared(row, of_case)}
        for of_case in by_case(rows).values()
        for row in of_case
        if row["system"] not in RESIDENT
    ]


def by_case(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in CASE), []).append(row)
    return cases


def _compared(row: Row, of_case: Sequence[Row]) -> Row:
    rates = {other["system"]: other["sentences_per_s"] for other in of_case if other["system"] in RESIDENT}
    rates["skip_empty"] = max((rates[system] for system in LIBRARY if system in rates), default=None)
    compared: Row = {
        "slots_share": round(row["slots"] / row["experts"], 4),
        "sentences_per_s": row["sentences_per_s"],
    }
    for name, system in (("loop", "loop"), ("skip_empty", "skip_empty"), ("all_slots", "all-slots")):
        if rates.get(system):
            compared[f"over_{name}"] = round(row["sentences_per_s"] / rates[system], 3)
    resident = [
        other["peak_gpu_gb"] for other in of_case if other["system"] in RESIDENT and "peak_gpu_gb" in other
    ]
    if resident:
        compared["memory_share"] = round(row["peak_gpu_gb"] / min(resident), 4)
    return compared


def print_summary(rows: Sequence[Row]) -> None:
    print("\nSentences per second; slots as a share of the experts; what is published in brackets.\n")
    print_table([cells for of_case in by_case(rows).values() for cells in _table_rows(of_case)])
    print()


def _table_rows(of_case: Sequence[Row]) -> Iterator[Row]:
    """One for each number of slots."""
    resident = {row["system"]: row for row in of_case if row["system"] in RESIDENT}
    for slots in sorted({row["slots"] for row in of_case if row["system"] not in RESIDENT}):
        few = {
            row["system"]: row for row in of_case if row["slots"] == slots and row["system"] not in RESIDENT
        }
        case = next(iter(few.values()))
        rates = {name: (resident | few).get(name, {}).get("sentences_per_s", "–") for name in SHOWN}
        yield {
            **{name: case[name] for name in CASE},
            "experts per layer": case["distinct_experts_per_layer"],
            "slots": f"{100 * slots / case['experts']:.0f} %",
            **rates,
            **_sida_cells(few, of_case),
        }


def _sida_cells(few: dict[str, Row], of_case: Sequence[Row]) -> Row:
    compared = _compared(few["sida"], of_case) if "sida" in few else {}
    experts, task = of_case[0]["experts"], of_case[0]["task"]
    saved = 1 - compared["memory_share"] if "memory_share" in compared else None
    return {
        "sida over loop": _with_published(compared.get("over_loop"), SPEEDUP.get(experts, {}).get(task)),
        "over skip-empty": _with_published(compared.get("over_skip_empty"), None),
        "memory saved": _with_published(saved, MEMORY_SAVED.get(experts, {}).get(task)),
    }


def _with_published(value: float | None, published: float | None) -> str:
    shown = "–" if value is None else f"{value:.2f}"
    return shown if published is None else f"{shown} ({published:.2f})"


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
        if system in RESIDENT:
            axis.axhline(rates[0], label=system, linestyle="--", color=color)
        else:
            shares = [100 * row["slots"] / row["experts"] for row in of_system]
            axis.plot(shares, rates, label=system, marker="o", color=color)
    axis.set_xlim(0, 100)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
