"""Builds the text and the tasks of one size in a folder, and reads them again.

`text.npz` holds the token ids of the files of each part, `short.npz`, `pair.npz` and `long.npz` the examples of each part
(`train`, padded with -1), their labels (`train_labels`) and the kinds of their groups (`train_kinds`).
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.sida.data.extract import FileParts, extract
from benchmarks.sida.data.sources import PARTS, Part, installed_roots, read_sources
from benchmarks.sida.data.tasks import GROUPS, TASKS, Group, TaskName, normal_forms
from benchmarks.sida.data.tokens import NO_TOKEN, Ids, Vocabulary, padded

RECORD_FILE = "data.json"
TOKENS: dict[TaskName, tuple[int, int]] = {"short": (14, 48), "pair": (24, 72), "long": (256, 512)}
_CHUNK_FILES, _BATCH_GROUPS = 64, 256


@dataclass(frozen=True)
class DataSize:
    max_bytes: int  # of sources
    max_text_tokens: int  # of each part
    train_examples: int  # of each task, at most
    other_examples: int  # of each task for validation, and for the test, at most


@dataclass(frozen=True)
class TaskPart:
    ids: Ids  # [examples, longest], NO_TOKEN where an example is shorter
    labels: npt.NDArray[np.int64]  # [examples]
    kinds: npt.NDArray[np.str_]  # [examples]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[examples] tokens."""
        counted: npt.NDArray[np.int64] = (self.ids != NO_TOKEN).sum(1)
        return counted

    def first(self, count: int) -> "TaskPart":
        return TaskPart(self.ids[:count], self.labels[:count], self.kinds[:count])


def build(folder: Path, size: DataSize, seed: int, processes: int = 1, roots: Sequence[Path] = ()) -> None:
    """Make the folder, unless it holds the same already.

    Args:
        roots: folders of sources, instead of this Python's.
    Raises:
        RuntimeError: they are too few: a part has no files, or a task no examples.
    """
    settings = {**asdict(size), "seed": seed}
    record_file = folder / RECORD_FILE
    if record_file.is_file() and json.loads(record_file.read_text())["settings"] == settings:
        return
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    record_file.unlink(missing_ok=True)
    vocabulary = Vocabulary()
    files = _extract_all(roots or installed_roots(), size.max_bytes, processes)
    texts = {part: [file.text for file in files if file.part == part] for part in PARTS}
    if empty := [part for part in PARTS if not texts[part]]:
        raise RuntimeError(f"no {' and '.join(empty)} files among {len(files)} sources: read more of them")
    encoded = {part: vocabulary.encode_documents(texts[part], size.max_text_tokens) for part in PARTS}
    _save(folder / "text.npz", encoded)
    for task in TASKS:
        arrays: dict[str, npt.NDArray[Any]] = {}
        seen: set[str] = set()
        for part in PARTS:
            groups = GROUPS[task]([file for file in files if file.part == part], seed)
            most = size.train_examples if part == "train" else size.other_examples
            made = _encode(vocabulary, groups, TOKENS[task], most, seen)
            if not len(made.labels):
                raise RuntimeError(
                    f"no {part} examples of task {task} in {len(files)} sources: read more of them"
                )
            arrays |= {part: made.ids, f"{part}_labels": made.labels, f"{part}_kinds": made.kinds}
        _save(folder / f"{task}.npz", arrays)
    vocabulary.save(folder / "tokenizer")
    record = {
        "settings": settings,
        "files": {part: len(texts[part]) for part in PARTS},
        "bytes": {part: sum(len(text.encode()) for text in texts[part]) for part in PARTS},
        "tokens": {part: len(ids) for part, ids in encoded.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    record_file.write_text(json.dumps(record, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / RECORD_FILE).read_text())
    return record


def read_text(folder: Path, part: Part) -> Ids:
    """[tokens], every file closed by the end of text."""
    with np.load(folder / "text.npz") as arrays:
        ids: Ids = arrays[part]
    return ids


def read_task(folder: Path, task: TaskName, part: Part) -> TaskPart:
    with np.load(folder / f"{task}.npz") as arrays:
        return TaskPart(arrays[part], arrays[f"{part}_labels"], arrays[f"{part}_kinds"])


def _extract_all(roots: Sequence[Path], max_bytes: int, processes: int) -> list[FileParts]:
    files = read_sources(list(roots), max_bytes)
    if processes == 1:
        found: Iterable[FileParts | None] = map(extract, files)
        return [parts for parts in found if parts is not None]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return [parts for parts in pool.map(extract, files, chunksize=_CHUNK_FILES) if parts is not None]


def _encode(
    vocabulary: Vocabulary, groups: Iterable[Group], tokens: tuple[int, int], most: int, seen: set[str]
) -> TaskPart:
    """The first groups all of whose examples have a number of tokens in the range.

    Args:
        seen: normal forms of the texts that other parts have; those of this one are added.
    """
    rows: list[Ids] = []
    labels: list[int] = []
    kinds: list[str] = []
    forms: set[str] = set()
    fresh = (group for group in groups if not normal_forms(group) & seen)
    while len(rows) < most and (batch := list(islice(fresh, _BATCH_GROUPS))):
        encoded = iter(vocabulary.encode_examples([each.texts for group in batch for each in group]))
        for group in batch:
            ids = list(islice(encoded, len(group)))
            if len(rows) + len(group) <= most and all(tokens[0] <= len(row) <= tokens[1] for row in ids):
                rows += ids
                labels += [each.label for each in group]
                kinds += [each.kind for each in group]
                forms |= normal_forms(group)
    seen |= forms
    return TaskPart(padded(rows), np.asarray(labels, np.int64), np.asarray(kinds))


def _save(path: Path, arrays: Mapping[Any, npt.NDArray[Any]]) -> None:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for options
