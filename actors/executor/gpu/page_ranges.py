"""Arithmetic on ranges of addresses: which pages views touch, and what is left to register. Calls no CUDA.

A `range` is an interval of byte addresses. Lists of them that functions here return are sorted and disjoint.
"""

import mmap
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from torch import Tensor

PAGE_BYTES = mmap.PAGESIZE


def span(view: Tensor) -> range:
    """The bytes of a contiguous view."""
    assert view.is_contiguous()
    return range(view.data_ptr(), view.data_ptr() + view.nbytes)


def touched_pages(spans: Iterable[range], gap_bytes: int) -> list[range]:
    """Ranges of whole pages that hold the spans; neighbours that are at most `gap_bytes` apart become one."""
    merged: list[range] = []
    for bytes_ in sorted(spans, key=_start):
        start, stop = bytes_.start // PAGE_BYTES * PAGE_BYTES, -(-bytes_.stop // PAGE_BYTES) * PAGE_BYTES
        if merged and start - merged[-1].stop <= gap_bytes:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, stop))
        else:
            merged.append(range(start, stop))
    return merged


def outside(ranges: Iterable[range], taken: Sequence[range]) -> list[range]:
    """The parts of `ranges` that lie in none of `taken`; both sorted and disjoint."""
    parts = []
    for wanted in ranges:
        start = wanted.start
        for index in range(_first_overlap(taken, wanted), len(taken)):
            if taken[index].start >= wanted.stop:
                break
            if taken[index].start > start:
                parts.append(range(start, taken[index].start))
            start = taken[index].stop
        if start < wanted.stop:
            parts.append(range(start, wanted.stop))
    return parts


def split(ranges: Iterable[range], max_bytes: int) -> list[range]:
    """The same bytes in ranges of at most `max_bytes`, which is rounded down to whole pages."""
    step = max(PAGE_BYTES, max_bytes // PAGE_BYTES * PAGE_BYTES)
    return [
        range(start, min(start + step, whole.stop))
        for whole in ranges
        for start in range(whole.start, whole.stop, step)
    ]


def overlaps(ranges: Sequence[range], wanted: range) -> bool:
    """Whether `wanted` shares a byte with one of `ranges`, which are sorted and disjoint."""
    index = _first_overlap(ranges, wanted)
    return index < len(ranges) and ranges[index].start < wanted.stop


def contains(ranges: Sequence[range], wanted: range) -> bool:
    """Whether all of `wanted` lies in a single one of `ranges`, which are sorted and disjoint."""
    index = _first_overlap(ranges, wanted)
    return index < len(ranges) and ranges[index].start <= wanted.start and wanted.stop <= ranges[index].stop


def _first_overlap(ranges: Sequence[range], wanted: range) -> int:
    """The index of the first range that ends behind the start of `wanted`."""
    return bisect_right(ranges, wanted.start, key=_stop)


def _start(interval: range) -> int:
    return interval.start


def _stop(interval: range) -> int:
    return interval.stop
