"""The order of a layer's data in its file.

The index of a sealed layer is in disk order, but its records may point anywhere into the data (overlaybd LSMT
layout). So the data a start reads can lie together, in the order of use, and one request fetches it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from obdlab.formats.lsmt.index import SegmentIndex
from obdlab.formats.lsmt.layout import SECTOR, Segments

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    #: [begin, end) in sectors of the disk.
    SectorRange = tuple[int, int]

# File systems and the page cache read whole blocks of this size; smaller parts are never needed alone.
_BLOCK_SECTORS = 4096 // SECTOR


def first_uses(ranges: Iterable[SectorRange]) -> list[SectorRange]:
    """Return the 4 KiB blocks that the ranges touch, each once, in the order of first use; neighbours joined."""
    pieces = [
        np.arange(begin // _BLOCK_SECTORS, -(-end // _BLOCK_SECTORS), dtype=np.int64)
        for begin, end in ranges
        if begin < end
    ]
    if not pieces:
        return []
    blocks = np.concatenate(pieces)
    blocks = blocks[np.sort(np.unique(blocks, return_index=True)[1])]
    heads = np.flatnonzero(np.concatenate(([True], np.diff(blocks) != 1)))
    counts = np.diff(np.append(heads, len(blocks)))
    begins = blocks[heads] * _BLOCK_SECTORS
    return list(zip(begins.tolist(), (begins + counts * _BLOCK_SECTORS).tolist(), strict=True))


def data_first(segments: Segments, ranges: Iterable[SectorRange]) -> Segments:
    """Return the parts of ``segments`` that have data and lie in the ranges, in the order of :func:`first_uses`."""
    index = SegmentIndex(segments)
    rows = [
        (offset, length, moffset, False, tag)
        for begin, end in first_uses(ranges)
        for offset, length, tag, moffset in index.lookup(begin, end)
        if tag >= 0
    ]
    return Segments.from_rows(rows)


def all_data_first(segments: Segments, ranges: Iterable[SectorRange]) -> Segments:
    """Return all of ``segments``: first those of :func:`data_first`, then the rest in disk order."""
    first = data_first(segments, ranges)
    if not len(first):
        return segments
    return Segments.concatenate([first, _without(segments, first)])


def sectors_in_file(segments: Segments) -> list[SectorRange]:
    """Return the sectors of the disk that have data, in the order of the data in the file."""
    data = segments[~segments.zeroed]
    data = data[np.argsort(data.moffset_sectors, kind="stable")]
    return list(zip(data.offset_sectors.tolist(), data.end_sectors.tolist(), strict=True))


def in_disk_order(segments: Segments) -> Segments:
    """Return the segments in the order of an index."""
    return segments[np.argsort(segments.offset_sectors, kind="stable")]


def _without(segments: Segments, taken: Segments) -> Segments:
    # Every part of `taken` lies inside of one segment: cut the segments at its edges, and drop pieces that begin in
    # it.
    taken = in_disk_order(taken)
    edges = np.union1d(taken.offset_sectors, taken.end_sectors)
    pieces = _cut(segments, edges)
    before = np.searchsorted(taken.offset_sectors, pieces.offset_sectors, side="right") - 1
    inside = (before >= 0) & (pieces.offset_sectors < taken.end_sectors[before])
    return pieces[~inside]


def _cut(segments: Segments, edges: NDArray[np.int64]) -> Segments:
    # Cuts each segment at the edges inside of it.
    first = np.searchsorted(edges, segments.offset_sectors, side="right")
    count = np.searchsorted(edges, segments.end_sectors, side="left") - first + 1
    of = np.repeat(np.arange(len(segments)), count)
    number = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    begin = np.where(number == 0, segments.offset_sectors[of], edges[np.minimum(first[of] + number, len(edges)) - 1])
    last = number == count[of] - 1
    end = np.where(last, segments.end_sectors[of], edges[np.minimum(first[of] + number, len(edges) - 1)])
    moved = np.where(segments.zeroed[of], 0, begin - segments.offset_sectors[of])
    return Segments(
        offset_sectors=begin,
        length_sectors=end - begin,
        moffset_sectors=segments.moffset_sectors[of] + moved,
        zeroed=segments.zeroed[of],
        tag=segments.tag[of],
    )
