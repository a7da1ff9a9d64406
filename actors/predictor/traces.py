"""What the routers of a model decided on real text: the training data of predictors, in memory and in files.

A folder holds `traces.json` (which model, what was kept) and safetensors shards of a few windows each.
"""

import json
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.predictor.network import WeightRule
from common.errors import CheckpointError

HEADER_FILE = "traces.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class TraceHeader:
    """The model that was traced."""

    model_fingerprint: str
    num_layers: int  # MoE layers
    num_experts: int
    top_k: int
    num_kept: (
        int  # experts whose logits were kept, the most likely ones: truncated distillation needs no more
    )
    weight_rule: WeightRule


@dataclass(frozen=True)
class TraceBatch:
    """Routing of some windows of text; `token_ids` where `mask` is False are padding."""

    token_ids: Tensor  # [windows, tokens] int64
    mask: Tensor  # [windows, tokens] bool
    expert_ids: Tensor  # [windows, tokens, layers, kept] int64, most likely first
    logits: Tensor  # [windows, tokens, layers, kept] float32, of those experts

    @property
    def num_windows(self) -> int:
        return len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())

    def select(self, rows: Tensor) -> "TraceBatch":
        return TraceBatch(self.token_ids[rows], self.mask[rows], self.expert_ids[rows], self.logits[rows])


class TraceSource(Protocol):
    """Where training gets its batches from: files, or a model that is traced as training goes on."""

    @property
    def header(self) -> TraceHeader: ...

    def batches(self, batch_size: int, generator: torch.Generator | None) -> Iterator[TraceBatch]:
        """Every window once, in the generator's random order, or in the text's order without one."""


class TraceFiles:
    """Traces on disk. `num_shards` of them; `part` gives some as a source of their own."""

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            CheckpointError: the folder holds no traces of this format.
        """
        self._folder = Path(folder)
        self._shards = sorted(self._folder.glob("shard-*.safetensors"))
        self.header = _read_header(self._folder)
        if not self._shards:
            raise CheckpointError(str(folder), "no trace shards there")

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def part(self, start: int, stop: int) -> "TraceFiles":
        part = copy(self)
        part._shards = self._shards[start:stop]
        return part

    def batches(self, batch_size: int, generator: torch.Generator | None) -> Iterator[TraceBatch]:
        order = range(len(self._shards)) if generator is None else _shuffled(len(self._shards), generator)
        for number in order:
            shard = _read_shard(self._shards[number])
            rows = torch.arange(shard.num_windows)
            if generator is not None:
                rows = rows[torch.randperm(len(rows), generator=generator)]
            for part in rows.split(batch_size):
                yield shard.select(part)


class TraceWriter:
    """Writes a folder of traces, one shard per batch."""

    def __init__(self, folder: str | Path, header: TraceHeader) -> None:
        self._folder, self._num_shards = Path(folder), 0
        self._folder.mkdir(parents=True, exist_ok=True)
        fields = {"format": FORMAT_VERSION, **asdict(header)}
        (self._folder / HEADER_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    def write(self, batch: TraceBatch) -> None:
        shard = {
            "token_ids": batch.token_ids.int(),
            "mask": batch.mask,
            "expert_ids": batch.expert_ids.short(),
            "logits": batch.logits.half(),
        }
        path = self._folder / f"shard-{self._num_shards:05d}.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in shard.items()}, path)
        self._num_shards += 1


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


def _read_header(folder: Path) -> TraceHeader:
    try:
        fields = json.loads((folder / HEADER_FILE).read_text(encoding="utf-8"))
        if fields.pop("format") != FORMAT_VERSION:
            raise CheckpointError(
                str(folder), f"traces of another format; this version reads {FORMAT_VERSION}"
            )
        return TraceHeader(**{**fields, "weight_rule": WeightRule(**fields["weight_rule"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(str(folder / HEADER_FILE), f"no description of traces ({error})") from error


def _read_shard(path: Path) -> TraceBatch:
    shard = load_file(path)
    return TraceBatch(
        shard["token_ids"].long(), shard["mask"], shard["expert_ids"].long(), shard["logits"].float()
    )
