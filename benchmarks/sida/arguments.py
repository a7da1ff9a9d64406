"""Arguments that the commands of this package share, and the folder in which they hand each other what they made."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.sida.data.build import build
from benchmarks.sida.sizes import SIZES, Size


class SidaArguments(argparse.Namespace):
    size: str
    work: Path
    out: Path | None
    plot: Path | None
    seed: int
    device: str
    experts: list[int] | None

    @property
    def numbers(self) -> Size:
        return SIZES[self.size]

    def save(self, record: dict[str, Any]) -> None:
        """Into `--out`, as far as it has come."""
        if self.out:
            self.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Into `--out`, and as the last line of the output."""
        self.save(record)
        print(json.dumps(record))


def parser(purpose: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=list(SIZES), default="cpu", help="full: for a GPU")
    made.add_argument(
        "--work",
        type=Path,
        default=Path("sida_work"),
        help="folder for data and models, kept between commands",
    )
    made.add_argument("--out", type=Path, help="JSON file to write")
    made.add_argument("--plot", type=Path, help="PNG to write")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def data_folder(arguments: SidaArguments) -> Path:
    return arguments.work / arguments.size / "data"


def prepare_data(arguments: SidaArguments) -> None:
    """Build the data if the folder lacks it, in as many processes as there are processors."""
    build(
        data_folder(arguments), arguments.numbers.data, arguments.seed, processes=len(os.sched_getaffinity(0))
    )
