"""Keep one of several trained hash functions: the one with the best recall on the validation files.

    python -m models.reference.choose_hash_function RUN [RUN ...] --out models/reference/hash_function

For variants that were trained side by side, each by a train_hash_function of its own. Copies the best one's folder and
notes what the others reached in its evaluation.json; scores nothing itself.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from models.reference.train_hash_function import FOLDER, RESULT_FILE


def choose(runs: list[Path], out: Path) -> Path:
    """Copy the best run's files into `out`; returns the run."""
    results = {run: json.loads((run / RESULT_FILE).read_text(encoding="utf-8")) for run in runs}
    best = max(runs, key=lambda run: _best_recall(results[run]))
    variants = [variant for run in runs for variant in _variants(results[run])]
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(best.iterdir()):
        shutil.copy(path, out / path.name)
    text = json.dumps({**results[best], "variants": variants}, indent=2)
    (out / RESULT_FILE).write_text(text + "\n", encoding="utf-8")
    return best


def _variants(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A run's variants; the one that it saved with its perplexity on the held-out files, which chose nothing."""
    scored = {"perplexity_predicted": result["held_out"]["perplexity_predicted"]}
    return [{**each, **(scored if each["name"] == result["saved"] else {})} for each in result["variants"]]


def _best_recall(result: dict[str, Any]) -> float:
    return max(float(variant["mean_validation_recall"]) for variant in result["variants"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep the best of several trained hash functions.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders written by train_hash_function.py")
    parser.add_argument("--out", type=Path, default=FOLDER / "hash_function", help="folder to write")
    args = parser.parse_args()
    print(f"kept {choose(args.runs, args.out)}")


if __name__ == "__main__":
    main()
