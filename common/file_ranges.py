"""Byte ranges of files, and reading them to their places in memory. Knows no checkpoint, imports no torch, so that a
process that only reads starts at once.
"""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import CheckpointError


@dataclass(frozen=True)
class FileRange:
    """`num_bytes` at `file_offset` of the file at `path`, to be read to `out_offset` of a buffer."""

    path: str
    file_offset: int
    num_bytes: int
    out_offset: int


class FileReader:
    """Reads ranges of files it keeps open. Used as a context manager; reads from several threads are safe if each
    thread has a reader of its own.
    """

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._open_files = ExitStack()

    def __enter__(self) -> "FileReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._descriptors.clear()
        self._open_files.close()

    def read(self, ranges: Iterable[FileRange], out: NDArray[np.uint8]) -> None:
        """Fill `out` (uint8, contiguous) from the ranges; bytes that no range covers are left alone.

        Raises:
            CheckpointError: a file is gone or ends before one of its ranges.
        """
        buffer = out.data.cast("B")
        for file_range in ranges:
            start = file_range.out_offset
            self._read_range(file_range, buffer[start : start + file_range.num_bytes])

    def _read_range(self, file_range: FileRange, buffer: memoryview) -> None:
        descriptor, done = self._descriptor(file_range.path), 0
        while done < file_range.num_bytes:
            count = os.preadv(descriptor, [buffer[done:]], file_range.file_offset + done)
            if count == 0:
                end = file_range.file_offset + file_range.num_bytes
                raise CheckpointError(
                    file_range.path, f"ends before byte {end}; copy or download the file again"
                )
            done += count

    def _descriptor(self, path: str) -> int:
        if path not in self._descriptors:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(
                    path, f"cannot be opened on node {os.uname().nodename} ({error.strerror})"
                ) from error
            self._open_files.callback(os.close, descriptor)
            self._descriptors[path] = descriptor
        return self._descriptors[path]
