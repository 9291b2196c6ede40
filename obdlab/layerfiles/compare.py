"""Comparing two disks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from obdlab.formats.lsmt.layout import SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.formats.lsmt.index import SegmentIndex
    from obdlab.layerfiles.writing import Progress
    from obdlab.layers.stack import Stack

_STEP_SECTORS = (1 << 20) // SECTOR


@dataclass(frozen=True, slots=True)
class Difference:
    """The differences of two disks: byte ranges ``[begin, end)`` of whole sectors. Past its end a disk is zeros.

    ``compared`` is the number of bytes read of each disk. The rest is in neither, or in the same file for both.
    """

    old_size: int
    new_size: int
    ranges: tuple[tuple[int, int], ...]
    compared: int

    @property
    def size(self) -> int:
        """Bytes that differ."""
        return sum(end - begin for begin, end in self.ranges)

    @property
    def same(self) -> bool:
        """True if the disks have the same size and content."""
        return not self.ranges and self.old_size == self.new_size


def compare(old: Stack, new: Stack, progress: Progress | None = None) -> Difference:
    """Compare two disks byte by byte. ``progress`` gets all bytes of the larger disk. Raises as reading does."""
    end_sectors = max(old.size, new.size) // SECTOR
    old_names, new_names = _names(old), _names(new)
    ranges: list[tuple[int, int]] = []
    compared = done = 0
    for begin, end in _steps(_bounds(old.index, new.index), end_sectors):
        if _runs(old.index, old_names, begin, end) != _runs(new.index, new_names, begin, end):
            compared += (end - begin) * SECTOR
            for first, last in _differing(_read(old, begin, end), _read(new, begin, end)):
                if ranges and ranges[-1][1] == (begin + first) * SECTOR:
                    ranges[-1] = (ranges[-1][0], (begin + last) * SECTOR)
                else:
                    ranges.append(((begin + first) * SECTOR, (begin + last) * SECTOR))
        if progress is not None:
            progress(end * SECTOR - done)
            done = end * SECTOR
    if progress is not None:
        progress(end_sectors * SECTOR - done)
    return Difference(old.size, new.size, tuple(ranges), compared)


def _bounds(*indexes: SegmentIndex) -> list[tuple[int, int]]:
    # Returns the ranges that have a segment in any index, joined, in sectors.
    segments = [index.segments() for index in indexes]
    begin = np.concatenate([part.offset_sectors for part in segments])
    end = np.concatenate([part.end_sectors for part in segments])
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], end[order]
    if not len(begin):
        return []
    reach = np.maximum.accumulate(end)
    heads = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), begin[1:] > reach[:-1])))
    tails = np.append(heads[1:], len(begin)) - 1
    return list(zip(begin[heads].tolist(), reach[tails].tolist(), strict=True))


def _steps(bounds: list[tuple[int, int]], end_sectors: int) -> Iterator[tuple[int, int]]:
    for begin, end in bounds:
        for at in range(begin, min(end, end_sectors), _STEP_SECTORS):
            yield at, min(at + _STEP_SECTORS, end, end_sectors)


def _names(disk: Stack) -> list[str]:
    return [os.path.realpath(blob.name) if os.path.exists(blob.name) else blob.name for blob in disk.blobs]


def _runs(index: SegmentIndex, names: list[str], begin: int, end: int) -> list[tuple[int, int, str, int]]:
    # Returns the sources of a range. Equal results for two disks mean equal bytes.
    return [
        (at, count, names[source] if source >= 0 else "", moffset if source >= 0 else 0)
        for at, count, source, moffset in index.lookup(begin, end)
    ]


def _read(disk: Stack, begin_sectors: int, end_sectors: int) -> bytes:
    begin, end = begin_sectors * SECTOR, end_sectors * SECTOR
    here = max(0, min(end, disk.size) - begin)
    return (disk.read_at(begin, here) if here else b"").ljust(end - begin, b"\0")


def _differing(old: bytes, new: bytes) -> list[tuple[int, int]]:
    # Returns the sector numbers [first, last) of each run of differing sectors.
    if old == new:
        return []
    differs = (np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8)).reshape(-1, SECTOR).any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], differs.view(np.int8), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
