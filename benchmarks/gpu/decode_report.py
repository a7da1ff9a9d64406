"""What the decode benchmark says of cases beside each other: ratios, exactness, tables. Measures nothing."""

from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.gpu.decode_cases import Outputs

Row = dict[str, Any]
Key = tuple[str, int, str]  # what, batch, routing: of cases that differ in slots alone

ALL = 1.0  # share of the experts that have slots
# Heading -> field, of rows with a time.
COLUMNS = {
    "slots": "slots", "evict": "eviction", "what": "what", "batch": "batch", "routing": "routing",
    "ahead": "prefetch",
    "step ms": "step_ms", "min, max": "step_ms_min_max", "device": "device_ms", "compute": "compute_ms",
    "link": "link_ms", "ratio": "ratio", "weights": "weight_read_ms", "hits": "hit_rate",
    "MB/step": "fetched_mb_per_step", "exact": "identical",
}  # fmt: skip


def key_of(row: Row) -> Key:
    return row["what"], row["batch"], row["routing"]


def complete(rows: Iterable[Row]) -> None:
    """Add to rows what takes the all-resident one of their kind: `compute_ms`, `ratio`, shares of memory."""
    rows = list(rows)
    timed = [row for row in rows if "step_ms" in row]
    compute_ms = {key_of(row): row["step_ms"] for row in timed if row["share"] == ALL}
    for row in timed:
        row["compute_ms"] = compute_ms.get(key_of(row))
        if row["compute_ms"] is not None:
            row["ratio"] = round(row["step_ms"] / max(row["compute_ms"], row["link_ms"]), 3)
    memory = [row for row in rows if "peak_gpu_gb" in row]
    all_resident = [row["peak_gpu_gb"] for row in memory if row["share"] == ALL]
    for row in memory:
        row["share_of_all_resident"] = (
            round(row["peak_gpu_gb"] / all_resident[0], 4) if all_resident else None
        )


def judge(row: Row, outputs: Outputs, of_most_slots: Outputs) -> None:
    """Add to a row whether its tokens and logits are those of the most slots, and where they first differ."""
    row["finite"] = all(token is not None for step in outputs.tokens for token in step)
    row["compared_steps"] = min(len(outputs.tokens), len(of_most_slots.tokens))
    kept = sorted(outputs.logits.keys() & of_most_slots.logits.keys())
    row["compared_logits_at"] = kept
    row["first_difference"] = _token_difference(outputs, of_most_slots) or _logit_difference(
        kept, outputs, of_most_slots
    )
    row["identical"] = row["first_difference"] is None


def _token_difference(outputs: Outputs, expected: Outputs) -> Row | None:
    for step, (here, there) in enumerate(zip(outputs.tokens, expected.tokens, strict=False)):
        for index, (token, other) in enumerate(zip(here, there, strict=True)):
            if token != other:
                return {"step": step, "row": index, "token": token, "expected": other}
    return None


def _logit_difference(kept: Iterable[int], outputs: Outputs, expected: Outputs) -> Row | None:
    """Bits are compared: two NaNs may be equal, 0 and -0 are not."""
    for steps in kept:
        here, there = outputs.logits[steps], expected.logits[steps]
        if not torch.equal(here.view(torch.int32), there.view(torch.int32)):
            return {"logits_after_steps": steps, "largest": float((here - there).abs().max())}
    return None


def is_exact(rows: Iterable[Row]) -> bool | None:
    """Whether all that was compared is; None if nothing was."""
    judged = [row["identical"] for row in rows if "identical" in row]
    return all(judged) if judged else None


def print_row(row: Row) -> None:
    print("  ".join(f"{name}={_cell(value)}" for name, value in row.items()), flush=True)


def print_table(rows: Iterable[Row]) -> None:
    lines = [list(COLUMNS)]
    lines += [[_cell(row.get(field)) for field in COLUMNS.values()] for row in rows if "step_ms" in row]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)
