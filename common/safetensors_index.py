"""Where every tensor of a checkpoint folder lies: the headers of its safetensors shards. Reads no tensor data and
gives names no meaning.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from common.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LENGTH_BYTES = 8  # a shard begins with the length of its JSON header, little-endian
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a shard."""

    key: str
    path: str
    dtype: str  # as the format names it: "BF16"
    shape: tuple[int, ...]
    file_offset: int
    num_bytes: int


def index_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in the folder's shards, by key.

    The shards are `model.safetensors`, or those that `model.safetensors.index.json` names, or all `*.safetensors`.

    Raises:
        CheckpointError: no shards, a shard missing, truncated or garbled, or a key missing or stored twice.
    """
    weight_map = _read_weight_map(folder)
    paths = sorted({folder / name for name in weight_map.values()}) or _unindexed_shards(folder)
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(
            str(folder),
            f"{len(missing)} of {len(paths)} shards are missing: {', '.join(missing)}; download them",
        )
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in read_shard_header(path):
            if tensor.key in tensors:
                raise CheckpointError(
                    str(folder),
                    f"{tensor.key} is both in {Path(tensors[tensor.key].path).name} and in {path.name}",
                )
            tensors[tensor.key] = tensor
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise CheckpointError(
            str(folder), f"{len(absent)} tensors of {INDEX_FILE} are in no shard, the first is {absent[0]}"
        )
    return tensors


def read_shard_header(path: Path) -> list[StoredTensor]:
    """
    Raises:
        CheckpointError: not a safetensors file, or the file is shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if not 0 < header_bytes <= min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
            raise CheckpointError(str(path), f"is truncated or no safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError as error:
            raise CheckpointError(str(path), f"has an unreadable header ({error})") from error
    data_start = LENGTH_BYTES + header_bytes
    tensors = [
        _parse_entry(path, key, entry, data_start) for key, entry in header.items() if key != "__metadata__"
    ]
    end = max((tensor.file_offset + tensor.num_bytes for tensor in tensors), default=0)
    if end > size:
        raise CheckpointError(
            str(path),
            f"is truncated: its header needs {end} bytes, the file has {size}; copy or download it again",
        )
    return tensors


def _parse_entry(path: Path, key: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        expected = prod(shape) * ITEM_BYTES[dtype] if dtype in ITEM_BYTES else end - begin
        consistent = begin >= 0 and end - begin == expected
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(str(path), f"has no valid header entry for {key}") from error
    if not consistent:
        raise CheckpointError(
            str(path), f"stores {end - begin} bytes for {key} {dtype} {list(shape)}, not {expected}"
        )
    return StoredTensor(key, str(path), dtype, shape, data_start + begin, end - begin)


def _read_weight_map(folder: Path) -> dict[str, str]:
    """Key -> shard name of the index file; empty when the library would not read one."""
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        return {}
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            str(index), "is no valid index: it needs a JSON object with a weight_map"
        ) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(str(index), "has an empty weight_map")
    return weight_map


def _unindexed_shards(folder: Path) -> list[Path]:
    single = folder / SINGLE_FILE
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(str(folder), "has no *.safetensors files; save the model with save_pretrained")
    return paths
