"""Keep one of several training runs: the one with the lowest loss on the validation files.

    python -m models.reference.choose RUN [RUN ...] --out models/reference

Copies its checkpoint and notes the others in its training.json; scores nothing itself.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from models.reference.corpus import FOLDER

NUM_LAST_POINTS = 20  # of the loss curve: the loss of one step is noisy


def last_loss(training: dict[str, Any]) -> float:
    """Mean training loss at the end of a run, in nats per token."""
    points = training["curve"][-NUM_LAST_POINTS:]
    return float(sum(point["loss"] for point in points) / len(points))


def choose(runs: list[Path], out: Path) -> Path:
    """Copy the best run's files into `out`, replacing the checkpoint there; returns the run."""
    records = {run: json.loads((run / "training.json").read_text()) for run in runs}
    best = min(runs, key=lambda run: records[run]["best_validation_loss"])
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    for path in sorted(best.iterdir()):
        shutil.copy(path, out / path.name)
    rejected = [_summary(records[run]) for run in runs if run != best]
    training = {**records[best], "rejected": rejected}
    (out / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    return best


def _summary(training: dict[str, Any]) -> dict[str, Any]:
    names = ("settings", "best_step", "best_validation_loss", "steps", "tokens_seen", "seconds")
    return {**{name: training[name] for name in names}, "last_loss": last_loss(training)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep the best of several training runs.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders written by train.py")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the checkpoint to keep")
    args = parser.parse_args()
    print(f"kept {choose(args.runs, args.out)}")


if __name__ == "__main__":
    main()
