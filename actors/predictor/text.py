"""Text for tracing and evaluation as one stream of token ids: files, folders, or arrays of ids."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from common.errors import ConfigError

SUFFIXES = (".txt", ".md", ".py", ".rst")


def read_tokens(text: str, model_folder: str | Path) -> Tensor:
    """[tokens] int64.

    Args:
        text: a text file; a folder, read recursively; or `FILE.npz#NAME`, an array of token ids.
    Raises:
        ConfigError: there is no such file, array, or no text.
    """
    if ".npz#" in text:
        return _read_array(text)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in _read_documents(text):
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
    if not ids:
        raise ConfigError("text", text, "a file or folder with some text")
    return torch.tensor(ids, dtype=torch.int64)


def _read_array(text: str) -> Tensor:
    path, _, name = text.partition("#")
    try:
        with np.load(path) as arrays:
            return torch.from_numpy(arrays[name].astype(np.int64))
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError("text", text, f"FILE.npz#NAME, an array of token ids ({error})") from error


def _read_documents(text: str) -> Iterator[str]:
    path = Path(text)
    if not path.exists():
        raise ConfigError("text", text, "an existing file or folder, or FILE.npz#NAME")
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES)
    for file in files:
        yield file.read_text(encoding="utf-8", errors="replace")
