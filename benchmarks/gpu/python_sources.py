"""A corpus that every machine has: the Python sources installed on it, as token ids, split by file."""

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from models.reference.corpus import encode

MAX_FILE_BYTES = 400_000  # larger ones are mostly generated tables
HELD_OUT_BYTES = 2_000_000
FILES_PER_BATCH = 1024  # of the tokenizer, whose encodings take a hundred bytes per token
NUM_READERS = 16

Ids = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """Every document is closed by the end-of-text token."""

    train: Ids  # [tokens]
    held_out: Ids  # [tokens], of files that training does not see
    num_files: int
    num_bytes: int


def read_python_sources(tokenizer: Tokenizer, max_bytes: int, seed: int) -> Corpus:
    """Tokenize up to max_bytes of sources in random order, equal files once, the first few held out.

    Raises:
        RuntimeError: this Python has too few sources to hold any out.
    """
    paths = sorted({path for root in _roots() for path in root.rglob("*.py")})
    random.Random(seed).shuffle(paths)
    texts = list(_distinct_texts(paths, max_bytes))
    sizes = np.cumsum([len(text) for text in texts])
    num_held_out = int(np.searchsorted(sizes, min(HELD_OUT_BYTES, max_bytes // 10))) + 1
    if num_held_out >= len(texts):
        raise RuntimeError(f"only {len(texts)} Python sources under {', '.join(map(str, _roots()))}")
    held_out, train = texts[:num_held_out], texts[num_held_out:]
    return Corpus(_encode(tokenizer, train), _encode(tokenizer, held_out), len(texts), int(sizes[-1]))


def _roots() -> list[Path]:
    """The standard library, and installed packages, which may lie elsewhere."""
    paths = sysconfig.get_paths()
    return [Path(path) for path in sorted({paths[name] for name in ("stdlib", "purelib", "platlib")})]


def _distinct_texts(paths: list[Path], max_bytes: int) -> Iterator[str]:
    seen: set[bytes] = set()
    total = 0
    with ThreadPoolExecutor(NUM_READERS) as readers:
        for start in range(0, len(paths), FILES_PER_BATCH):
            for content in readers.map(_read, paths[start : start + FILES_PER_BATCH]):
                digest = hashlib.sha1(content, usedforsecurity=False).digest()
                if not content or digest in seen:
                    continue
                seen.add(digest)
                total += len(content)
                yield content.decode("utf-8", errors="replace")
                if total >= max_bytes:
                    return


def _read(path: Path) -> bytes:
    """Empty for what is no source to learn from."""
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else b""
    except OSError:  # a dangling link
        return b""
    return content.strip()


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Ids:
    starts = range(0, len(texts), FILES_PER_BATCH)
    return np.concatenate([encode(tokenizer, texts[start : start + FILES_PER_BATCH]) for start in starts])
