"""A Hugging Face checkpoint folder as experts and dense tensors: which bytes of which file make which expert.

Reads headers and single experts, never the whole model. The library's own conversion mapping gives the names.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from common.architecture import MoeArchitecture, architecture_of, load_config, meta_model
from common.errors import CheckpointError, UnsupportedModelError
from common.expert_layout import ExpertLayout, ExpertTensor
from common.file_ranges import FileRange, FileReader
from common.key_mapping import MappedKey, map_keys
from common.safetensors_index import StoredTensor, index_tensors

# What can be done to expert tensors by reading bytes in another order.
_FUSED: tuple[str, ...] = ()
_FLATTENED = (("UnflattenExperts", "Concatenate(1)"), ("UnflattenExperts", "Transpose"))
_MERGED = (("MergeModulelist(0)",), ("MergeModulelist(0)", "Concatenate(1)"))
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SAMPLES_PER_SHARD, _SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class Checkpoint:
    """An indexed checkpoint. Immutable; reading from several threads is safe."""

    folder: Path
    architecture: MoeArchitecture
    fingerprint: str  # 16 hexadecimal digits, see `_fingerprint`
    stored_layout: ExpertLayout  # in the checkpoint's own dtype
    dense_tensors: tuple[StoredTensor, ...]  # everything of the model that is no expert
    expert_ranges: Mapping[
        tuple[int, int], tuple[FileRange, ...]
    ]  # (layer, expert id) -> the bytes of its slab

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Index a folder: seconds for a large model, a few MB read.

        Raises:
            CheckpointError: something is missing, truncated or of the wrong shape.
            UnsupportedModelError: an architecture, quantisation or expert format that cannot be served.
        """
        folder = Path(folder)
        config = load_config(folder)
        if getattr(config, "quantization_config", None):
            raise UnsupportedModelError(
                str(folder),
                "its weights are quantised (quantization_config); give a float32, bfloat16 or float16 one",
            )
        model = meta_model(config, folder)
        architecture = architecture_of(model, folder)
        tensors = index_tensors(folder)
        mapped = map_keys(model, tensors)
        targets = _expert_targets(architecture)
        experts = [key for key in mapped if key.target in targets]
        dense = tuple(tensors[key.key] for key in mapped if key.target not in targets)
        dtype = _expert_dtype(folder, [tensors[key.key] for key in experts])
        layout = ExpertLayout.from_shapes(architecture.expert_shapes, dtype, architecture.transposed_tensors)
        ranges = _ExpertFinder(folder, architecture, layout, tensors).find(experts)
        return cls(folder, architecture, _fingerprint(architecture, tensors.values()), layout, dense, ranges)

    @property
    def expert_bytes(self) -> int:
        """Of all experts as they are stored: slabs, so with their alignment."""
        return len(self.expert_ranges) * self.stored_layout.slab_bytes

    @property
    def dense_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.dense_tensors)

    def read_expert(self, layer: int, expert_id: int, out: NDArray[np.uint8]) -> None:
        """Fill one slab of the stored layout.

        Args:
            out: [slab_bytes] uint8, contiguous; its alignment gaps are left alone.
        Raises:
            CheckpointError: a shard has changed or gone since the checkpoint was opened.
        """
        assert out.shape == (self.stored_layout.slab_bytes,)
        with FileReader() as reader:
            reader.read(self.expert_ranges[layer, expert_id], out)


def _expert_targets(architecture: MoeArchitecture) -> set[str]:
    return {
        f"{module}.{name}" for module in architecture.experts_modules for name in architecture.expert_shapes
    }


def _expert_dtype(folder: Path, tensors: list[StoredTensor]) -> torch.dtype:
    names = sorted({tensor.dtype for tensor in tensors})
    if not names:
        raise CheckpointError(
            str(folder), "none of its tensors belongs to an expert; do config.json and the shards match?"
        )
    if len(names) > 1:
        raise UnsupportedModelError(str(folder), f"its expert tensors have mixed dtypes: {', '.join(names)}")
    if names[0] not in _DTYPES:
        raise UnsupportedModelError(
            str(folder), f"its expert tensors are {names[0]}, not one of {', '.join(_DTYPES)}"
        )
    return _DTYPES[names[0]]


class _ExpertFinder:
    """Turns the expert tensors of a checkpoint into the byte ranges of every expert, or says what is missing."""

    def __init__(
        self,
        folder: Path,
        architecture: MoeArchitecture,
        layout: ExpertLayout,
        tensors: Mapping[str, StoredTensor],
    ) -> None:
        self._folder, self._architecture, self._layout, self._tensors = folder, architecture, layout, tensors
        self._ranges: dict[tuple[int, int], list[FileRange]] = defaultdict(list)
        self._missing: list[str] = []

    def find(self, keys: Iterable[MappedKey]) -> dict[tuple[int, int], tuple[FileRange, ...]]:
        by_target: dict[str, list[MappedKey]] = defaultdict(list)
        for key in keys:
            by_target[key.target].append(key)
        for layer, module in enumerate(self._architecture.experts_modules):
            for slot in self._layout.tensors:
                self._find_tensor(
                    layer, slot, f"{module}.{slot.name}", by_target.get(f"{module}.{slot.name}", [])
                )
        if self._missing:
            raise CheckpointError(
                str(self._folder),
                f"{len(self._missing)} expert tensors are missing, the first is {self._missing[0]}; download it again",
            )
        return {expert: tuple(ranges) for expert, ranges in sorted(self._ranges.items())}

    def _find_tensor(self, layer: int, slot: ExpertTensor, target: str, keys: list[MappedKey]) -> None:
        if not keys:
            self._missing.append(target)
        elif keys[0].operations == _FUSED:
            self._add_fused(layer, slot, keys, (self._architecture.num_experts, *slot.stored_shape))
        elif keys[0].operations in _FLATTENED:
            num_rows, *columns = slot.stored_shape
            rows_per_part = self._architecture.num_experts * num_rows // keys[0].num_parts
            self._add_fused(layer, slot, keys, (rows_per_part, *columns))
        elif keys[0].operations in _MERGED:
            self._add_merged(layer, slot, target, keys)
        else:
            raise UnsupportedModelError(
                str(self._folder),
                f"its {target} is made by {' + '.join(keys[0].operations)}, which cannot be read in place",
            )

    def _add_fused(
        self, layer: int, slot: ExpertTensor, keys: list[MappedKey], shape: tuple[int, ...]
    ) -> None:
        """One tensor of `shape` holds all experts, or one part of all: each is a contiguous slice of it."""
        parts = {key.part: key.key for key in keys}
        if len(parts) < len(keys):
            raise CheckpointError(
                str(self._folder), f"{keys[0].key} and {keys[1].key} are both {keys[0].target}"
            )
        if len(parts) < keys[0].num_parts:
            self._missing.append(f"one part of {keys[0].target}")
            return
        num_experts, offset = self._architecture.num_experts, slot.offset_bytes
        for _, key in sorted(parts.items()):
            tensor = self._tensors[key]
            self._check_shape(tensor, shape)
            size = tensor.num_bytes // num_experts
            for expert_id in range(num_experts):
                start = tensor.file_offset + expert_id * size
                self._ranges[layer, expert_id].append(FileRange(tensor.path, start, size, offset))
            offset += size

    def _add_merged(self, layer: int, slot: ExpertTensor, target: str, keys: list[MappedKey]) -> None:
        """Every expert has tensors of its own, `num_parts` of them one after the other."""
        parts: list[dict[int, StoredTensor]] = [{} for _ in range(keys[0].num_parts)]
        for key in keys:
            parts[key.part][_expert_number(key.key)] = self._tensors[key.key]
        if any(not self._is_complete(part, target) for part in parts):
            return
        for expert_id in range(self._architecture.num_experts):
            offset = slot.offset_bytes
            for part in parts:
                tensor = part[expert_id]
                self._check_shape(tensor, (slot.shape[0] // len(parts), *slot.shape[1:]))
                self._ranges[layer, expert_id].append(
                    FileRange(tensor.path, tensor.file_offset, tensor.num_bytes, offset)
                )
                offset += tensor.num_bytes

    def _is_complete(self, part: dict[int, StoredTensor], target: str) -> bool:
        absent = [expert_id for expert_id in range(self._architecture.num_experts) if expert_id not in part]
        if absent and not part:
            self._missing.append(f"one part of {target}")
        elif absent:
            present = next(iter(part.values())).key
            self._missing += [_with_expert_number(present, expert_id) for expert_id in absent]
        elif len(part) > self._architecture.num_experts:
            extra = part[max(part)].key
            raise CheckpointError(
                str(self._folder), f"{extra} is more than the {self._architecture.num_experts} experts"
            )
        return not absent

    def _check_shape(self, tensor: StoredTensor, expected: tuple[int, ...]) -> None:
        if tensor.shape != expected:
            raise CheckpointError(
                str(self._folder),
                f"{tensor.key} has shape {list(tensor.shape)}, config.json makes it {list(expected)}",
            )


# The library numbers layers first, so the expert is the last number of a key's path: "3", or "expert_3".
_EXPERT_NUMBER = re.compile(r"(?P<before>.*\.(?:expert_)?)(?P<number>\d+)(?P<after>\..*)")


def _expert_number(key: str) -> int:
    return int(_split_at_expert(key)["number"])


def _with_expert_number(key: str, expert_id: int) -> str:
    parts = _split_at_expert(key)
    return f"{parts['before']}{expert_id}{parts['after']}"


def _split_at_expert(key: str) -> re.Match[str]:
    match = _EXPERT_NUMBER.fullmatch(key)
    assert match is not None
    return match


def _fingerprint(architecture: MoeArchitecture, tensors: Iterable[StoredTensor]) -> str:
    """Identifies the checkpoint: SHA-256 over its model type and sizes, every tensor's name, dtype and shape, and
    a sample of each shard (16 stretches of 4 KiB, evenly spaced), so that it costs the same for 60 GB as for 600.

    Two checkpoints whose weights differ only outside of the samples get the same one: a fine-tune that touches a
    few tensors of a large model may.
    """
    sizes = (architecture.model_type, architecture.num_layers, architecture.num_experts, architecture.top_k)
    digest = hashlib.sha256(repr(sizes).encode())
    ends: dict[str, int] = defaultdict(int)
    for tensor in sorted(tensors, key=lambda tensor: tensor.key):
        digest.update(f"{tensor.key} {tensor.dtype} {tensor.shape}\n".encode())
        ends[tensor.path] = max(ends[tensor.path], tensor.file_offset + tensor.num_bytes)
    for path, end in sorted(ends.items()):
        digest.update(_sample(path, end))
    return digest.hexdigest()[:16]


def _sample(path: str, end: int) -> bytes:
    starts = np.linspace(0, max(0, end - _SAMPLE_BYTES), _SAMPLES_PER_SHARD, dtype=np.int64)
    size = min(end, _SAMPLE_BYTES)
    sample = np.empty(len(starts) * size, np.uint8)
    with FileReader() as reader:
        reader.read((FileRange(path, int(start), size, i * size) for i, start in enumerate(starts)), sample)
    return sample.tobytes()
