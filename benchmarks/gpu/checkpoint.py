"""Writes a checkpoint of Qwen3-30B-A3B's shape with random weights, as the published one is laid out.

For measuring what needs a checkpoint folder, offline: the expert store, the application. One shard per layer and one for
the rest, every expert's tensors under names of their own. The tokenizer is the reference model's, whose vocabulary is
smaller: the output layer's rows beyond it are zero, so that greedy tokens have a text. No token ends a sequence.

    python -m benchmarks.gpu.checkpoint --layers 16 --out /dev/shm/model    # 21 GB
"""

import argparse
import json
import re
import shutil
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PretrainedConfig

from benchmarks.gpu.shapes import STD, TINY, meta_causal_model, qwen3_30b
from common.config import REFERENCE_MODEL
from common.safetensors_index import INDEX_FILE, LENGTH_BYTES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
WRITERS = 4  # shards under way at once
_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
_HEADER_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class Shard:
    """A file and the tensors in it, in their order."""

    name: str
    shapes: dict[str, tuple[int, ...]]

    @property
    def num_elements(self) -> int:
        return sum(map(prod, self.shapes.values()))


def write_checkpoint(
    config: PretrainedConfig,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    text_tokens: int | None = None,
) -> int:
    """
    Args:
        device: draws the weights.
        text_tokens: ids from there on are never the likeliest; None for all of the vocabulary.
    Returns:
        Bytes of weights written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(meta_causal_model(config)).__name__]
    config.save_pretrained(folder)
    shards = plan_shards(config)

    def write(number: int) -> None:
        elements = draw_shard(shards[number], config.dtype, device, seed + number, text_tokens)
        write_shard(folder / shards[number].name, shards[number], elements)

    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(write, range(len(shards))))
    num_bytes = sum(shard.num_elements for shard in shards) * int(config.dtype.itemsize)
    weight_map = {key: shard.name for shard in shards for key in shard.shapes}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return num_bytes


def plan_shards(config: PretrainedConfig) -> list[Shard]:
    """One shard per layer, and the first for what belongs to none."""
    groups: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key, parameter in meta_causal_model(config).named_parameters():
        layer = re.match(r"model\.layers\.(\d+)\.", key)
        groups[int(layer[1]) + 1 if layer else 0].update(_published(key, tuple(parameter.shape)))
    return [
        Shard(f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors", groups[number])
        for number in range(len(groups))
    ]


def _published(key: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The published checkpoint's names for a parameter of the library's model, which fuses experts."""
    module, _, name = key.rpartition(".")
    if not module.endswith(".experts"):
        return {key: shape}
    num_experts, rows, columns = shape
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[name]
    return {
        f"{module}.{expert}.{part}.weight": (rows // len(parts), columns)
        for expert in range(num_experts)
        for part in parts
    }


def draw_shard(
    shard: Shard, dtype: torch.dtype, device: torch.device, seed: int, text_tokens: int | None = None
) -> Tensor:
    """The shard's elements one after the other, on the CPU: normal, and norms of 1."""
    generator = torch.Generator(device).manual_seed(seed)
    elements = torch.empty(shard.num_elements, dtype=dtype, device=device).normal_(
        std=STD, generator=generator
    )
    parts = elements.split([prod(shape) for shape in shard.shapes.values()])
    for (key, shape), part in zip(shard.shapes.items(), parts, strict=True):
        if len(shape) == 1:
            part.fill_(1.0)
        elif key == "lm_head.weight" and text_tokens is not None:
            part.view(shape)[text_tokens:] = 0
    return elements.cpu()


def write_shard(path: Path, shard: Shard, elements: Tensor) -> None:
    """A safetensors file: the length of the header, the header, the elements."""
    header, end = {}, 0
    for key, shape in shard.shapes.items():
        begin, end = end, end + prod(shape) * elements.itemsize
        header[key] = {
            "dtype": _DTYPE_NAMES[elements.dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        file.write(elements.view(torch.uint8).numpy().data)


def main() -> None:
    arguments = parse_arguments()
    started = time.perf_counter()
    text_tokens = Tokenizer.from_file(str(REFERENCE_MODEL / "tokenizer.json")).get_vocab_size()
    changes = {**TINY, "vocab_size": text_tokens} if arguments.tiny else {}
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    config = qwen3_30b(arguments.layers, dtype, **changes)
    num_bytes = write_checkpoint(
        config, arguments.out, torch.device(arguments.device), arguments.seed, text_tokens
    )
    for name in TOKENIZER_FILES:
        shutil.copy(REFERENCE_MODEL / name, arguments.out / name)
    seconds = time.perf_counter() - started
    record = {
        "benchmark": "gpu_checkpoint",
        "folder": str(arguments.out),
        "layers": arguments.layers,
        "gigabytes": round(num_bytes / 1e9, 2),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(record))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16, help="of 48; 1.2 GB of experts each")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy of the same architecture")
    return parser.parse_args()


if __name__ == "__main__":
    main()
