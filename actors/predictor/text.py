"""Text for tracing and evaluation as token ids: files, folders, or arrays of ids. Read piece by piece: a text may be longer
than memory, as long as none of its files is an array.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer

from common.errors import ConfigError

SUFFIXES = (".txt", ".md", ".py", ".rst")
MAX_PIECE_CHARS = 1 << 22  # longer files are tokenized in parts that end with a line
NO_TOKEN = -1  # pads the rows of an array of sentences

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class TextSummary:
    """Equal for texts that give the same windows."""

    digest: str
    num_tokens: int
    num_windows: int


class TokenStream:
    """The token ids of a text in windows, as often as asked for; tokenized anew each time."""

    def __init__(self, text: str, model_folder: str | Path, window_tokens: int) -> None:
        """
        Args:
            text: a text file; a folder, read recursively; or `FILE.npz#NAME`, an array of token ids: [tokens], one
                stream that is cut into windows, or [sentences, tokens], padded with -1, one window a sentence.
        Raises:
            ConfigError: there is no such file or array, or a sentence is longer than a window.
        """
        self._text, self._folder, self._length = text, model_folder, window_tokens
        if self._is_array:
            self._check_sentences()
        elif not Path(text).exists():
            raise ConfigError("text", text, "an existing file or folder, or FILE.npz#NAME")

    def windows(self, first: int = 0) -> Iterator[Ids]:
        """Each window's ids from number `first` on; the last one of a stream, and a sentence, may be shorter."""
        if self._is_array and self._array.ndim == 2:
            for sentence in self._array[first:]:
                yield sentence[sentence != NO_TOKEN]
        else:
            yield from islice(self._cut(self.pieces()), first, None)

    def batches(self, batch_size: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows from number `first` on, padded on the right with 0: ids [windows, length] int64 and their mask."""
        windows = self.windows(first)
        while batch := list(islice(windows, batch_size)):
            yield _pad(batch, self._length)

    def pieces(self) -> Iterator[Ids]:
        """The whole text in its order, in pieces of any length."""
        if self._is_array:
            yield self._array[self._array != NO_TOKEN]
            return
        tokenizer = AutoTokenizer.from_pretrained(self._folder)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for file in _files(Path(self._text)):
            for part in _parts(file):
                ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
                yield np.asarray(ids, np.int64)
            yield np.asarray(end, np.int64)

    def summarise(self) -> TextSummary:
        """Reads the text once.

        Raises:
            ConfigError: there is no text in it.
        """
        digest, num_tokens, num_windows = hashlib.sha256(), 0, 0
        for window in self.windows():
            digest.update(window.tobytes())
            digest.update(b"|")
            num_tokens, num_windows = num_tokens + len(window), num_windows + 1
        if not num_tokens:
            raise ConfigError("text", self._text, "a file or folder with some text")
        return TextSummary(digest.hexdigest()[:16], num_tokens, num_windows)

    @property
    def _is_array(self) -> bool:
        return ".npz#" in self._text

    @cached_property
    def _array(self) -> Ids:
        path, _, name = self._text.partition("#")
        try:
            with np.load(path) as arrays:
                ids: Ids = arrays[name].astype(np.int64)
        except (OSError, KeyError, ValueError) as error:
            raise ConfigError(
                "text", self._text, f"FILE.npz#NAME, an array of token ids ({error})"
            ) from error
        return ids

    def _check_sentences(self) -> None:
        if self._array.ndim not in (1, 2):
            raise ConfigError("text", self._text, "an array [tokens] or [sentences, tokens]")
        longest = int((self._array != NO_TOKEN).sum(-1).max(initial=0)) if self._array.ndim == 2 else 0
        if longest > self._length:
            raise ConfigError("window_tokens", self._length, f"{longest} or more, the longest sentence")

    def _cut(self, pieces: Iterable[Ids]) -> Iterator[Ids]:
        rest = np.empty(0, np.int64)
        for piece in pieces:
            rest = np.concatenate([rest, piece])
            whole = len(rest) // self._length * self._length
            yield from rest[:whole].reshape(-1, self._length)
            rest = rest[whole:]
        if len(rest):
            yield rest


def read_tokens(text: str, model_folder: str | Path) -> Tensor:
    """The whole text as one stream, [tokens] int64; `text` as for `TokenStream`.

    Raises:
        ConfigError: there is no such file, array, or no text.
    """
    length = np.iinfo(np.int64).max
    ids = np.concatenate([np.empty(0, np.int64), *TokenStream(text, model_folder, length).pieces()])
    if not len(ids):
        raise ConfigError("text", text, "a file or folder with some text")
    return torch.from_numpy(ids)


def read_windows(text: str, model_folder: str | Path, window_tokens: int) -> tuple[Tensor, Tensor]:
    """All windows of a text at once: ids [windows, window_tokens] int64 and their mask.

    Raises:
        ConfigError: there is no such file, array, or no text.
    """
    stream = TokenStream(text, model_folder, window_tokens)
    found = list(stream.windows())
    if not found:
        raise ConfigError("text", text, "a file or folder with some text")
    return _pad(found, window_tokens)


def _pad(windows: list[Ids], length: int) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(window) for window in windows])
    ids = torch.zeros(len(windows), length, dtype=torch.int64)
    mask = torch.arange(length) < lengths[:, None]
    ids[mask] = torch.from_numpy(np.concatenate(windows))
    return ids, mask


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES)


def _parts(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        while part := lines.read(MAX_PIECE_CHARS):
            yield part + lines.readline()
