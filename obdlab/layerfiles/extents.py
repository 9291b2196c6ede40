"""Data extents of a disk, for readers that skip zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.blob import check_range
from obdlab.formats.lsmt.index import HOLE
from obdlab.formats.lsmt.layout import SECTOR
from obdlab.layers.stack import Stack, WritableStack

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The longest range that one call examines.
_MOST = 256 << 20


def extents(disk: Stack | WritableStack, offset: int, length: int) -> list[tuple[int, bool]]:
    """Return lengths and kinds of the extents from ``offset`` on: True for data, False for zeros, alternating.

    They add up to ``length`` bytes or, for a large range, cover its beginning. Zeros stored in a layer count as data.
    Raises OutOfRangeError if the range is not inside the disk.
    """
    check_range(disk, offset, length)
    end = offset + min(length, _MOST)
    found: list[tuple[int, bool]] = []
    for begin, stop, data in _runs(disk, offset // SECTOR, -(-end // SECTOR)):
        size = min(end, stop * SECTOR) - max(offset, begin * SECTOR)
        if found and found[-1][1] == data:
            found[-1] = (found[-1][0] + size, data)
        else:
            found.append((size, data))
    return found


# Yields the first sector, one past the last, and True for data.
def _runs(disk: Stack | WritableStack, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
    if isinstance(disk, Stack):
        for start, count, source, _ in disk.index.lookup(begin, end):
            yield start, start + count, source >= 0
        return
    lowers = disk.lowers
    for start, count, source, _ in disk.upper.lookup(begin, end):
        if source == HOLE and lowers is not None:
            shown = max(start, min(start + count, lowers.size // SECTOR))
            if start < shown:
                yield from _runs(lowers, start, shown)
            if shown < start + count:
                yield shown, start + count, False
        else:
            yield start, start + count, source >= 0
