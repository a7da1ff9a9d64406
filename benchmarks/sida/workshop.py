"""The work folder: models that commands of this package make once and hand each other."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.sida.arguments import SidaArguments, data_folder, prepare_data
from benchmarks.sida.data.baselines import score_baselines
from benchmarks.sida.data.build import read_task
from benchmarks.sida.data.tasks import TaskName
from benchmarks.sida.data.tokens import Vocabulary
from benchmarks.sida.finetune import finetune
from benchmarks.sida.pretrain import TextWindows, pretrain
from benchmarks.sida.sizes import Size

RECORD_FILE = "record.json"
_BASELINE_EXAMPLES = 8000  # which a linear model learns from in seconds


def routing_folder(root: Path, num_experts: int, text: TaskName | Literal["text"]) -> Path:
    """Of hash functions and recorded routing. Args: root: of a workshop."""
    return _folder(root, num_experts, f"{text}_routing")


def _folder(root: Path, num_experts: int, name: str) -> Path:
    return root / f"{num_experts}_experts" / name


@dataclass(frozen=True)
class Made:
    folder: Path
    record: dict[str, Any]


class Workshop:
    """Makes what the folder lacks, whatever it takes."""

    def __init__(self, root: Path, data: Path, size: Size, device: torch.device, seed: int) -> None:
        """Args: data: the folder of the text and the tasks."""
        self.root, self.data, self.size, self.device, self.seed = root, data, size, device, seed
        self.vocabulary = Vocabulary()
        self.text = TextWindows(data, size, self.vocabulary, device)

    @classmethod
    def of(cls, arguments: SidaArguments, size: Size) -> "Workshop":
        """With the data that go with the arguments, which are built if they are missing."""
        prepare_data(arguments)
        root = arguments.work / arguments.size
        return cls(root, data_folder(arguments), size, torch.device(arguments.device), arguments.seed)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def folder(self, num_experts: int, name: str) -> Path:
        return _folder(self.root, num_experts, name)

    def pretrained(self, num_experts: int) -> Made:
        """A model of corrupted text."""

        def make(folder: Path) -> dict[str, Any]:
            return pretrain(
                folder, self.text, self.size, num_experts, self.vocabulary, self.device, self.seed
            )

        return self.once(self.folder(num_experts, "pretrained"), make)

    def classifier(self, num_experts: int, task: TaskName) -> Made:
        """A classifier of one task."""
        pretrained = self.pretrained(num_experts).folder

        def make(folder: Path) -> dict[str, Any]:
            return finetune(
                folder, pretrained, self.data, task, self.size, self.vocabulary, self.device, self.seed
            )

        return self.once(self.folder(num_experts, task), make)

    def baselines(self, task: TaskName) -> dict[str, Any]:
        """Scores on the test part that a classifier must beat."""

        def make(_folder: Path) -> dict[str, Any]:
            train = read_task(self.data, task, "train").first(_BASELINE_EXAMPLES)
            test = read_task(self.data, task, "test")
            scores = score_baselines(
                train, test, self.vocabulary.size, self.vocabulary.separator_id, self.seed
            )
            return {name: round(score, 4) for name, score in asdict(scores).items()}

        return self.once(self.root / "baselines" / task, make).record

    def once(self, folder: Path, make: Callable[[Path], dict[str, Any]]) -> Made:
        """Made now, or found from before: a folder with a record is complete."""
        file = folder / RECORD_FILE
        if file.is_file():
            return Made(folder, json.loads(file.read_text()))
        started = time.perf_counter()
        print(f"{time.strftime('%H:%M:%S')} {folder.relative_to(self.root)}:", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        record = make(folder)
        record["seconds_in_all"] = round(time.perf_counter() - started, 1)
        file.write_text(json.dumps(record, indent=1) + "\n")
        return Made(folder, record)
