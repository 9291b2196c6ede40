"""The mutable index of a writable layer (overlaybd's Index0): later insertions override earlier ones."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import chain
from typing import TYPE_CHECKING, Self

import numpy as np

from obdlab.formats.lsmt.index import HOLE, split
from obdlab.formats.lsmt.layout import MAX_SEGMENT_SECTORS, Segments, encode_segments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from obdlab.formats.lsmt.index import Run

# (begin, end, moffset, source); source is the tag, or ~tag if zeroed.
_Segment = tuple[int, int, int, int]
# Segments live in chunks of at most twice this many, so that an insertion moves little memory.
_CHUNK = 256


# A chunk unchanged since it was frozen: as rows of an array, and as encoded records once these were asked for.
class _Frozen:
    __slots__ = ("records", "table")

    def __init__(self, table: NDArray[np.int64]) -> None:
        self.table = table
        self.records: bytes | None = None


class SegmentMap:
    """A sorted set of segments that do not overlap, changed by :meth:`insert` and :meth:`remove`.

    Not safe for use by several threads at once. With ``join``, an inserted segment grows into neighbours that it
    continues on the disk and in the file; without, segments stay as they were written (as the original keeps them).
    Segments may be of any length; :meth:`to_index` cuts them to the limit of a record.
    """

    __slots__ = ("_chunks", "_first", "_frozen", "_join")

    def __init__(self, *, join: bool = False) -> None:
        self._join = join
        self._chunks: list[list[_Segment]] = [[]]
        self._first: list[int] = [0]  # chunk k holds the segments that begin in [first[k], first[k + 1])
        # For each chunk its frozen form, None if it has changed since: a copy of the map costs only the changed
        # chunks.
        self._frozen: list[_Frozen | None] = [None]

    @classmethod
    def of(cls, segments: Segments, *, join: bool = False) -> Self:
        """Return a map that holds ``segments``, which ascend and do not overlap."""
        made = cls(join=join)
        sources = np.where(segments.zeroed, ~segments.tag.astype(np.int64), segments.tag)
        columns = (segments.offset_sectors, segments.end_sectors, segments.moffset_sectors, sources)
        all_: list[_Segment] = list(zip(*(column.tolist() for column in columns), strict=True))
        if all_:
            made._chunks = [all_[k : k + _CHUNK] for k in range(0, len(all_), _CHUNK)]
            made._first = [0, *(chunk[0][0] for chunk in made._chunks[1:])]
            table = np.column_stack(columns).astype(np.int64)
            made._frozen = [_Frozen(table[k : k + _CHUNK]) for k in range(0, len(table), _CHUNK)]
        return made

    def __len__(self) -> int:
        return sum(map(len, self._chunks))

    def insert(self, begin: int, end: int, moffset: int, *, zeroed: bool = False, tag: int = 0) -> None:
        """Map the disk's sectors ``[begin, end)`` to those from ``moffset``, or to zeros."""
        if begin < 0 or end < begin:
            raise ValueError(f"no range of sectors: [{begin}, {end})")
        if begin == end:
            return
        segment = (begin, end, moffset, ~tag if zeroed else tag)
        if self._join:
            grown = self._grown(segment)
            if grown is None:
                return
            segment = grown
        self._replace(segment[0], segment[1], segment)

    def remove(self, begin: int, end: int) -> None:
        """Remove the mapping of the sectors ``[begin, end)``, so that lower layers show through."""
        if begin < end:
            self._replace(begin, end, None)

    def lookup(self, begin: int, end: int) -> list[Run]:
        """Return the runs of the sectors ``[begin, end)`` as :meth:`SegmentIndex.lookup` does."""
        runs: list[Run] = []
        c, i = self._find(begin)
        chunk = self._chunks[c]
        while begin < end:
            if i == len(chunk):
                c, i = c + 1, 0
                if c == len(self._chunks):
                    runs.append((begin, end - begin, HOLE, 0))
                    break
                chunk = self._chunks[c]
                continue
            start, stop, moffset, source = chunk[i]
            if start > begin:
                hole_end = min(start, end)
                runs.append((begin, hole_end - begin, HOLE, 0))
                begin = hole_end
                continue
            if stop > end:
                stop = end
            runs.append((begin, stop - begin, source, moffset + (begin - start if source >= 0 else 0)))
            begin = stop
            i += 1
        return runs

    def to_segments(self) -> Segments:
        """Return the segments as columns, those longer than 16383 sectors cut as the original cuts them."""
        return _segments(np.concatenate([self._frozen_chunk(k).table for k in range(len(self._chunks))]))

    def to_records(self) -> bytes:
        """Return :meth:`to_segments` as records of an index. ValueError if a number does not fit its field."""
        return b"".join([self._frozen_records(k) for k in range(len(self._chunks))])

    def freeze(self, first: int, count: int) -> int:
        """Do part of the work of the next :meth:`to_records`: for ``count`` chunks from number ``first`` on.

        Returns the number to continue with, 0 after the last.
        """
        end = min(first + count, len(self._chunks))
        for k in range(first, end):
            self._frozen_records(k)
        return end if end < len(self._chunks) else 0

    def _frozen_chunk(self, k: int) -> _Frozen:
        frozen = self._frozen[k]
        if frozen is None:
            chunk = self._chunks[k]
            numbers = np.fromiter(chain.from_iterable(chunk), dtype=np.int64, count=4 * len(chunk))
            frozen = self._frozen[k] = _Frozen(numbers.reshape(-1, 4))
        return frozen

    def _frozen_records(self, k: int) -> bytes:
        frozen = self._frozen_chunk(k)
        if frozen.records is None:
            frozen.records = encode_segments(_segments(frozen.table))
        return frozen.records

    def _find(self, sector: int) -> tuple[int, int]:
        # Chunk and place of the first segment that ends after `sector`; the place may be just past a chunk's last.
        # No segment reaches into the range of the next chunk, so one chunk is enough.
        c = bisect_right(self._first, sector) - 1
        chunk = self._chunks[c]
        i = bisect_left(chunk, (sector,))
        if i and chunk[i - 1][1] > sector:
            i -= 1
        return c, i

    def _grown(self, segment: _Segment) -> _Segment | None:
        # The segment joined with all neighbours it continues, or None if the map already contains it.
        begin, end, moffset, source = segment
        step = 1 if source >= 0 else 0
        c, i = self._find(begin - 1 if begin else 0)
        while True:
            if i == len(self._chunks[c]):
                c, i = c + 1, 0
                if c == len(self._chunks):
                    break
                continue
            start, stop, at, kind = self._chunks[c][i]
            if start > end:
                break
            # A neighbour or an overlapped segment with the same shift from disk to file: absorb it.
            if kind == source and at - start * step == moffset - begin * step:
                if start <= begin and end <= stop:
                    return None
                if start < begin:
                    moffset -= (begin - start) * step
                    begin = start
                end = max(end, stop)
            i += 1
        return begin, end, moffset, source

    def _replace(self, begin: int, end: int, segment: _Segment | None) -> None:
        # Cut [begin, end) out of the map and put `segment`, if any, in its place.
        first_chunk, i = self._find(begin)
        chunk = self._chunks[first_chunk]
        new: list[_Segment] = []
        if i < len(chunk) and chunk[i][0] < begin:
            start, _, at, source = chunk[i]
            new.append((start, begin, at, source))
        if segment is not None:
            new.append(segment)

        # All chunks that the range touches become one; _balance cuts it again.
        last_chunk = bisect_left(self._first, end, first_chunk + 1) - 1
        last = self._chunks[last_chunk]
        j = bisect_left(last, (end,), i if last_chunk == first_chunk else 0)
        if j > (i if last_chunk == first_chunk else 0):
            start, stop, at, source = last[j - 1]
            if stop > end:
                new.append((end, stop, at + (end - start if source >= 0 else 0), source))
        if last_chunk == first_chunk:
            chunk[i:j] = new
        else:
            chunk[i:] = new + last[j:]
            del self._chunks[first_chunk + 1 : last_chunk + 1]
            del self._first[first_chunk + 1 : last_chunk + 1]
            del self._frozen[first_chunk + 1 : last_chunk + 1]
        self._frozen[first_chunk] = None
        self._balance(first_chunk)

    def _balance(self, c: int) -> None:
        chunk = self._chunks[c]
        if not chunk:
            if len(self._chunks) > 1:
                del self._chunks[c], self._first[c], self._frozen[c]
                self._first[0] = 0
        elif len(chunk) > 2 * _CHUNK:
            parts = [chunk[k : k + _CHUNK] for k in range(0, len(chunk), _CHUNK)]
            self._chunks[c : c + 1] = parts
            self._frozen[c : c + 1] = [None] * len(parts)
            self._first[c + 1 : c + 1] = [part[0][0] for part in parts[1:]]


def _segments(table: NDArray[np.int64]) -> Segments:
    begin, end, moffset, source = np.ascontiguousarray(table.T)
    zeroed = source < 0
    segments = Segments(
        offset_sectors=begin,
        length_sectors=end - begin,
        moffset_sectors=moffset,
        zeroed=zeroed,
        tag=np.where(zeroed, ~source, source).astype(np.uint8),
    )
    return split(segments, MAX_SEGMENT_SECTORS)
