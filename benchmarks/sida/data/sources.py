"""The Python sources installed on this machine: which files are read, and which part each belongs to. Parses nothing."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = get_args(Part)

MIN_FILE_BYTES, MAX_FILE_BYTES = 500, 200_000  # longer ones are mostly generated tables
_OF_100 = {"validation": 6, "test": 10}  # by a hash of the contents; the rest is for training


@dataclass(frozen=True)
class SourceFile:
    name: str  # relative to the root it was found under
    text: str
    part: Part


def installed_roots() -> list[Path]:
    """The standard library, and installed packages, which may lie elsewhere."""
    paths = sysconfig.get_paths()
    return [Path(path) for path in sorted({paths[name] for name in ("stdlib", "purelib", "platlib")})]


def read_sources(roots: list[Path], max_bytes: int) -> Iterator[SourceFile]:
    """Up to max_bytes of sources in an order that depends on their names alone, equal files once."""
    seen: set[bytes] = set()
    total = 0
    for name, path in _ordered(roots):
        content = _read(path)
        digest = hashlib.sha256(content).digest()
        if not MIN_FILE_BYTES <= len(content) <= MAX_FILE_BYTES or digest in seen:
            continue
        seen.add(digest)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield SourceFile(name, text, part_of(digest))
        total += len(content)
        if total >= max_bytes:
            return


def part_of(digest: bytes) -> Part:
    """Args: digest: of a file's contents, so that renamed copies stay in one part."""
    number = int.from_bytes(digest[:4], "big") % 100
    if number < _OF_100["test"]:
        return "test"
    return "validation" if number < _OF_100["test"] + _OF_100["validation"] else "train"


def _ordered(roots: list[Path]) -> list[tuple[str, Path]]:
    """Files by the hash of their name below the innermost root."""
    names = {
        path: path.relative_to(root).as_posix()
        for root in sorted(roots, key=lambda root: len(root.parts))
        for path in root.rglob("*.py")
    }
    pairs = [(name, path) for path, name in names.items()]
    return sorted(pairs, key=lambda pair: (hashlib.sha256(pair[0].encode()).digest(), str(pair[1])))


def _read(path: Path) -> bytes:
    """Empty where nothing can be read."""
    try:
        return path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else b""
    except OSError:  # a dangling link
        return b""
