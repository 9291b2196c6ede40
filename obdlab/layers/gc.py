"""Garbage collection of an append-mode layer in use: freeing the space of overwritten data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from obdlab.formats.lsmt.layout import HEADER_SPACE, SECTOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from obdlab.formats.lsmt.layout import Segments
    from obdlab.layers.append import AppendUpper

# A file system frees whole blocks of its own, 4 KiB nearly everywhere.
_BLOCK = 4096 // SECTOR
# Data in partly used blocks is moved once these waste more than one part in this many of all data.
_TOLERATED_WASTE = 10
# Parts moved with one sync, and holes punched between two reports of progress.
_AT_ONCE = 4096
# The log is rewritten once less than half of its records are visible, and there are more than these.
_SHORT_LOG_RECORDS = 256


@dataclass(frozen=True, slots=True)
class Collected:
    """Storage of the two files (data file) and number of log records, before and after a collection."""

    allocated_before: int
    allocated_after: int
    moved_size: int
    records_before: int
    records_after: int


def _silent(step: str, done: int, total: int) -> None:
    pass


def collect(upper: AppendUpper, progress: Callable[[str, int, int], None] = _silent) -> Collected:
    """Free the storage of overwritten data and overridden records of a layer that may be in use.

    Holes are punched where no data is visible any more. If too many blocks of the file are only partly in use, their
    data is appended again first. A log of mostly overridden records is replaced. Reads and writes go on, and a crash
    at any point leaves the layer's content as it was. The original can open the result. ``progress`` is called with
    the name of a step, the amount done and the total; an error it raises ends the collection. Raises SourceError as
    writing does, also when the layer is sealed meanwhile; the layer is whole then, too.
    """
    with upper.collecting:
        allocated_before, records_before = upper.data.allocated_size, upper.log_records
        segments = _punch_unused(upper, progress)
        parts = _worth_moving(segments)
        moved_sectors = 0
        for at in range(0, len(parts), _AT_ONCE):
            progress("moving", at, len(parts))
            moved_sectors += upper.relocate(parts[at : at + _AT_ONCE])
        if moved_sectors:
            segments = _punch_unused(upper, progress)
        if upper.log_records > 2 * len(segments) + _SHORT_LOG_RECORDS:
            progress("index", 0, 1)
            upper.compact_log()
        return Collected(
            allocated_before=allocated_before,
            allocated_after=upper.data.allocated_size,
            moved_size=moved_sectors * SECTOR,
            records_before=records_before,
            records_after=upper.log_records,
        )


def _punch_unused(upper: AppendUpper, progress: Callable[[str, int, int], None]) -> Segments:
    progress("flushing", 0, 1)
    upper.data.write_out()
    segments, end = upper.snapshot()
    upper.flush()  # a crash must not bring back overridden records, whose data is freed next
    upper.wait_for_readers()  # a reader that looked up the map before the snapshot may still read overridden data
    unused = _unused(segments, end)
    todo = [gap for gap in unused if gap not in upper.punched]
    for at in range(0, len(todo), _AT_ONCE):
        progress("freeing", at, len(todo))
        upper.punch(todo[at : at + _AT_ONCE])
    upper.punched = frozenset(unused)
    return segments


def _unused(segments: Segments, end: int) -> list[tuple[int, int]]:
    # Returns the whole blocks of the data file, up to the sector `end`, that no segment maps.
    begins, ends = _used(segments)
    gap_begin = np.concatenate(([HEADER_SPACE // SECTOR], ends))
    gap_end = np.concatenate((begins, [end]))
    first, last = -(-gap_begin // _BLOCK) * _BLOCK, gap_end // _BLOCK * _BLOCK
    open_gap = first < last
    return list(zip(first[open_gap].tolist(), last[open_gap].tolist(), strict=True))


def _used(segments: Segments) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # Returns the mapped sectors of the data file as ascending ranges with gaps between them.
    data = segments[~segments.zeroed]
    order = np.argsort(data.moffset_sectors, kind="stable")
    begin = data.moffset_sectors[order]
    if not len(begin):
        return begin, begin
    reach = np.maximum.accumulate(begin + data.length_sectors[order])
    heads = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), begin[1:] > reach[:-1])))
    return begin[heads], reach[np.append(heads[1:], len(begin)) - 1]


def _worth_moving(segments: Segments) -> list[tuple[int, int, int]]:
    # Returns disk ranges, as (begin, length, mapped sector) in disk order, whose data lies in partly used blocks;
    # empty if these waste little.
    begins, ends = _used(segments)
    partly = np.unique(np.concatenate((begins[begins % _BLOCK != 0], ends[ends % _BLOCK != 0])) // _BLOCK)
    partly = partly[partly < (ends[-1] // _BLOCK if len(ends) else 0)]  # the last one is still being filled
    data = segments[~segments.zeroed]
    begin = data.moffset_sectors
    end = begin + data.length_sectors
    head_end = np.minimum(end, (begin // _BLOCK + 1) * _BLOCK)
    tail_begin = np.maximum(head_end, (end - 1) // _BLOCK * _BLOCK)
    has_head = np.isin(begin // _BLOCK, partly)
    has_tail = np.isin((end - 1) // _BLOCK, partly) & (tail_begin < end)
    used = int((head_end - begin)[has_head].sum()) + int((end - tail_begin)[has_tail].sum())
    if (len(partly) * _BLOCK - used) * _TOLERATED_WASTE <= int((ends - begins).sum()):
        return []
    shift = data.offset_sectors - begin
    parts = [
        (data.offset_sectors[has_head], (head_end - begin)[has_head], begin[has_head]),
        ((tail_begin + shift)[has_tail], (end - tail_begin)[has_tail], tail_begin[has_tail]),
    ]
    columns = [np.concatenate(both) for both in zip(*parts, strict=True)]
    order = np.argsort(columns[0])
    return list(zip(*(column[order].tolist() for column in columns), strict=True))
