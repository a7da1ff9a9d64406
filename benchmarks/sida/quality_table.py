"""Prints what hash functions hit and what is lost, the paper's figures beside ours, as tables in Markdown."""

from collections.abc import Sequence
from typing import Any

from benchmarks.sida.paper import EXPERTS_NAMED, FIDELITY, HIT_RATE, PERPLEXITY
from benchmarks.sida.text_quality import DECODER

Row = dict[str, Any]


def print_tables(record: Row) -> None:
    rows = [_task_cells(row) for row in record["tasks"]]
    print(
        "\nHit rates are top 3; fidelity with 1 and 3 predicted experts per token, the published one as given.\n"
    )
    print_table(rows)
    print("\nPerplexity with 1 predicted expert per token, and its ratio to the exact one.\n")
    print_table([_text_cells(row) for row in record["text"]])
    if record["exact"]:
        print("\nA quarter of the experts in slots against all of them.\n")
        print_table(record["exact"])
    print()


def _task_cells(row: Row) -> Row:
    experts, task = row["experts"], row["task"]
    published = FIDELITY.get(experts, {}).get(task)
    return {
        "experts": experts,
        "task": f"{task} ({row['mirrors']})",
        "tokens": row["tokens_mean"],
        "accuracy": _percent(row["accuracy"]),
        "majority": _percent(row["majority"]),
        "counts of tokens": _percent(row["bag_of_tokens"]),
        "experts per text": row["skew"]["experts_per_text"],
        "hits by token id": _percent(row["token_id"]["top_3"]),
        "paper's network": _percent(row["paper"]["top_3"]),
        "ours": _percent(row["ours"]["top_3"]),
        "published": _percent(HIT_RATE.get(experts, {}).get(task)),
        "fidelity, paper's network": _pair(row["paper"]),
        "fidelity, ours": _pair(row["ours"]),
        "published ": "–" if published is None else f"{_percent(published)} ({EXPERTS_NAMED[task]})",
        "agreement, ours": _percent(row["ours"]["agreement_1"]),
        "agreement, random experts": _percent(row["random"]["agreement_1"]),
    }


def _text_cells(row: Row) -> Row:
    published = PERPLEXITY.get(row["experts"])
    return {
        "experts": row["experts"],
        "exact": round(row["perplexity"], 2),
        "encoder, paper's network": _ratio(row["encoder_paper"]),
        "encoder, ours": _ratio(row["encoder_ours"]),
        "both stacks, ours": _ratio(row[DECODER]),
        "random experts": _ratio(row["random"]),
        "published": "–"
        if published is None
        else f"{published[0]} → {published[1]} ({published[1] / published[0]:.2f}×)",
        "hits, encoder": _percent(row["encoder_ours"]["top_3"]),
        "hits, decoder": _percent(row[DECODER]["top_3"]),
    }


def _pair(of_network: Row) -> str:
    return f"{_percent(of_network['fidelity_1'])}, {_percent(of_network['fidelity_3'])}"


def _ratio(of_function: Row) -> str:
    return f"{of_function['perplexity_1']:.2f} ({of_function['ratio_1']:.3f}×)"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def print_table(rows: Sequence[Row]) -> None:
    """In Markdown. Args: rows: with the same names."""
    names = [name.strip() for name in rows[0]]
    print(f"| {' | '.join(names)} |")
    print(f"|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")
