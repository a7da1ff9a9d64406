"""What the routers of a model decided on real text: the training data of predictors, in memory and in files.

A folder holds `traces.json` (which model, which text, what was kept) and safetensors shards of a few windows each.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from actors.predictor.network import WeightRule
from common.errors import CheckpointError, ConfigError

HEADER_FILE = "traces.json"
FORMAT_VERSION = 2
MIXED_BATCHES = 4

# What a hash function can learn from: logits whose softmax and top k make the decisions, or the decisions alone.
Teacher = Literal["logits", "choices"]
Stack = Literal["decoder", "encoder"]


@dataclass(frozen=True)
class TraceHeader:
    """The model that was traced."""

    model_fingerprint: str
    num_layers: int  # MoE layers, of the stack
    num_experts: int
    top_k: int
    num_kept: int  # experts with the largest logits, which were kept; 0 where the library exposes none
    weight_rule: WeightRule
    teacher: Teacher = "logits"
    stack: Stack = "decoder"


@dataclass(frozen=True)
class TracedText:
    """What a folder's traces were made of, so that only the same work is resumed."""

    dtype: str  # of the model
    window_tokens: int
    shard_windows: int
    digest: str  # of the windows
    num_tokens: int
    num_windows: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_windows // self.shard_windows)


@dataclass(frozen=True)
class TraceBatch:
    """Routing of some windows of text; `token_ids` where `mask` is False are padding."""

    token_ids: Tensor  # [windows, tokens] int64
    mask: Tensor  # [windows, tokens] bool
    expert_ids: (
        Tensor  # [windows, tokens, layers, top_k] int64, the decisions, in the order the experts get them
    )
    weights: Tensor  # [windows, tokens, layers, top_k] float32
    # Truncated distillation needs no more than the largest logits. None where the library exposes none.
    kept_ids: Tensor | None = None  # [windows, tokens, layers, kept] int64, most likely first
    logits: Tensor | None = None  # [windows, tokens, layers, kept] float32

    @property
    def num_windows(self) -> int:
        return len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())

    def select(self, rows: Tensor) -> "TraceBatch":
        return TraceBatch(**{name: tensor[rows] for name, tensor in self.tensors().items()})

    def to(self, device: torch.device) -> "TraceBatch":
        return TraceBatch(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by the names of the fields."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class TraceSource(Protocol):
    """Where training gets its batches from: files, or a model that is traced as training goes on."""

    @property
    def header(self) -> TraceHeader: ...

    def batches(
        self, batch_size: int, generator: torch.Generator | None, first: int = 0
    ) -> Iterator[TraceBatch]:
        """Every window once, in the generator's random order, or in the text's order without one.

        Args:
            first: leave so many batches out, which is faster than to pass over them.
        """


class TraceFiles:
    """Traces on disk. `num_shards` of them; `part` gives some as a source of their own."""

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            CheckpointError: the folder holds no complete traces of this format.
        """
        self._folder = Path(folder)
        self._shards = sorted(self._folder.glob("shard-*.safetensors"))
        self.header, text = _read_header(self._folder)
        expected = text.num_shards if text else max(1, len(self._shards))
        if len(self._shards) != expected:
            problem = f"{len(self._shards)} of {expected} trace shards; run the command that traces again to resume it"
            raise CheckpointError(str(folder), problem)

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def part(self, start: int, stop: int) -> "TraceFiles":
        part = copy(self)
        part._shards = self._shards[start:stop]
        return part

    def batches(
        self, batch_size: int, generator: torch.Generator | None, first: int = 0
    ) -> Iterator[TraceBatch]:
        count = len(self._shards)
        order = list(range(count)) if generator is None else _shuffled(count, generator)
        mixed = 1 if generator is None else MIXED_BATCHES  # a batch is drawn from so many shards and more
        for numbers in self._groups(order, mixed * batch_size):
            num_windows = sum(_count_windows(self._shards[number]) for number in numbers)
            rows = list(range(num_windows)) if generator is None else _shuffled(num_windows, generator)
            parts = torch.tensor(rows).split(batch_size)
            if first < len(parts):
                group = _concatenate([_read_shard(self._shards[number]) for number in numbers])
                for part in parts[first:]:
                    yield group.select(part)
            first = max(0, first - len(parts))

    def _groups(self, order: list[int], num_windows: int) -> Iterator[list[int]]:
        """Shards to be read together, of at least so many windows but for the last group."""
        group: list[int] = []
        found = 0
        for number in order:
            group.append(number)
            found += _count_windows(self._shards[number])
            if found >= num_windows:
                yield group
                group, found = [], 0
        if group:
            yield group


class TraceWriter:
    """Writes a folder of traces, one shard per batch. A shard is whole or not there, whenever the process ends."""

    def __init__(self, folder: str | Path, header: TraceHeader, text: TracedText | None = None) -> None:
        """
        Args:
            text: lets a folder that was left unfinished be continued, after its `num_shards`.
        Raises:
            ConfigError: the folder holds traces of something else.
            CheckpointError: it holds what is no trace of this format.
        """
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._header = header
        if (self._folder / HEADER_FILE).exists():
            self._header = _check_resumable(self._folder, header, text)
        else:
            _write_header(self._folder, header, text)
        self.num_shards = len(list(self._folder.glob("shard-*.safetensors")))

    def write(self, batch: TraceBatch) -> None:
        narrow = torch.uint8 if self._header.num_experts <= 256 else torch.int16
        dtypes = {"token_ids": torch.int32, "mask": torch.bool, "expert_ids": narrow, "kept_ids": narrow}
        shard = {
            name: tensor.cpu().to(dtypes.get(name, torch.float16)) for name, tensor in batch.tensors().items()
        }
        path = self._folder / f"shard-{self.num_shards:06d}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, unfinished)
        os.replace(unfinished, path)
        self.num_shards += 1


def windows(token_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cut a text into windows.

    Args:
        token_ids: [tokens] int64.
    Returns:
        ids [windows, length] int64, padded with 0, and the mask [windows, length] of what is text.
    """
    num_windows = -(-len(token_ids) // length)
    ids = torch.zeros(num_windows * length, dtype=torch.int64)
    ids[: len(token_ids)] = token_ids
    mask = torch.arange(len(ids)) < len(token_ids)
    return ids.view(num_windows, length), mask.view(num_windows, length)


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def _concatenate(batches: list[TraceBatch]) -> TraceBatch:
    tensors = [batch.tensors() for batch in batches]
    return TraceBatch(**{name: torch.cat([each[name] for each in tensors]) for name in tensors[0]})


def _count_windows(path: Path) -> int:
    with _opened(path) as shard:
        return int(shard.get_slice("mask").get_shape()[0])


def _write_header(folder: Path, header: TraceHeader, text: TracedText | None) -> None:
    values = {"format": FORMAT_VERSION, **asdict(header), "text": text and asdict(text)}
    unfinished = folder / f"{HEADER_FILE}.unfinished"
    unfinished.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / HEADER_FILE)


def _read_header(folder: Path) -> tuple[TraceHeader, TracedText | None]:
    try:
        values = json.loads((folder / HEADER_FILE).read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT_VERSION:
            problem = f"traces of another format; this version reads {FORMAT_VERSION}: trace the text again"
            raise CheckpointError(str(folder), problem)
        text = values.pop("text")
        rule = WeightRule(**values["weight_rule"])
        return TraceHeader(**{**values, "weight_rule": rule}), TracedText(**text) if text else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(str(folder / HEADER_FILE), f"no description of traces ({error})") from error


def _check_resumable(folder: Path, header: TraceHeader, text: TracedText | None) -> TraceHeader:
    """The stored header: how the routers weight is not derived twice, as kernels may round differently."""
    stored_header, stored_text = _read_header(folder)
    if text is None or stored_text is None:
        raise ConfigError("out", str(folder), "an empty folder; it holds traces")
    stored, given = (
        {**asdict(each), **asdict(its)} for each, its in ((stored_header, stored_text), (header, text))
    )
    for name in stored:
        if name not in ("weight_rule", "teacher") and stored[name] != given[name]:
            problem = f"it holds traces with {name} {stored[name]}, not {given[name]}; give another folder, or delete it"
            raise ConfigError("out", str(folder), problem)
    return stored_header


def _read_shard(path: Path) -> TraceBatch:
    wide = {torch.bool: torch.bool, torch.float16: torch.float32}  # the rest are ids
    with _opened(path) as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - no mapping
        return TraceBatch(
            **{name: tensor.to(wide.get(tensor.dtype, torch.int64)) for name, tensor in tensors.items()}
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError, TypeError) as error:
        raise CheckpointError(str(path), f"no shard of traces ({error})") from error
