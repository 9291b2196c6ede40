"""Read-only segment indexes: lookup, the merge of a stack, splitting and coalescing (overlaybd LSMT layout).

Whole-index work is vectorised in numpy. Lookup is not: for one 4 KiB read a bisect over an ``array`` costs a fifth of
the numpy call, and an ``array`` of 25,000 segments a tenth of the memory of Python lists.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from obdlab.formats.lsmt.layout import MAX_SEGMENT_SECTORS, Segments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

#: ``(offset_sectors, length_sectors, source, moffset_sectors)``. A source of 0 or more is the tag of the layer file
#: that holds the sectors from ``moffset_sectors``; a negative one means zeros: HOLE, or ``~tag`` of a zeroed segment.
Run = tuple[int, int, int, int]
HOLE = -(1 << 15)
MAX_LAYERS = 255

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class RunTable:
    """Runs as columns of equal length; see :data:`Run` for their meaning."""

    offset_sectors: NDArray[np.int64]
    length_sectors: NDArray[np.int64]
    source: NDArray[np.int16]
    moffset_sectors: NDArray[np.int64]


class SegmentIndex:
    """An immutable sorted set of segments that do not overlap.

    Sectors and tags as in :class:`Segments`. Mappings are kept as ``shift = moffset - offset``: clipping the front
    of a segment leaves them unchanged.
    """

    __slots__ = ("_bucket", "_bucket_bits", "_ends", "_limit", "_starts", "shifts", "sources")

    def __init__(self, segments: Segments) -> None:
        """Index ``segments``, which ascend and do not overlap; ValueError if they do."""
        ends = segments.end_sectors
        if (segments.offset_sectors[1:] < ends[:-1]).any():
            raise ValueError("segments overlap or are out of order")
        tags = segments.tag.astype(np.int16)
        self._starts = _array("q", segments.offset_sectors)
        self._ends = _array("q", ends)
        #: For each segment, the distance from its sectors on the disk to those in the layer's file.
        self.shifts = _array("q", segments.moffset_sectors - segments.offset_sectors)
        #: For each segment, its source as in :data:`Run`.
        self.sources = _array("h", np.where(segments.zeroed, ~tags, tags))
        self._limit: int = self._ends[-1] if self._ends else 0
        # Where the bisect may begin, by the high bits of the sector. There is about one bucket per segment.
        self._bucket_bits = max(0, (self._limit // max(1, len(self))).bit_length() - 1)
        boundaries = np.arange((self._limit >> self._bucket_bits) + 2, dtype=np.int64) << self._bucket_bits
        self._bucket = _array("i", np.searchsorted(ends, boundaries, side="right").astype(np.int32))

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def end_sectors(self) -> int:
        """First sector after the last segment; 0 without segments."""
        return self._limit

    def lookup(self, begin: int, end: int) -> list[Run]:
        """Return the runs that cover the sectors ``[begin, end)``, in order, without gaps or overlap.

        Parts that no segment covers are runs of source HOLE. An empty range gives no runs.
        """
        if begin >= self._limit:
            return [(begin, end - begin, HOLE, 0)] if begin < end else []
        ends = self._ends
        bucket = begin >> self._bucket_bits
        i = bisect_right(ends, begin, self._bucket[bucket], self._bucket[bucket + 1])
        start = self._starts[i]
        if start <= begin and end <= ends[i]:  # inside one segment: nearly every small read
            return [(begin, end - begin, self.sources[i], begin + self.shifts[i])] if begin < end else []
        return self._lookup_several(i, begin, end)

    def find(self, begin: int, end: int) -> int:
        """Return the number of the segment that holds all sectors ``[begin, end)`` (not empty), or -1.

        :attr:`sources` and :attr:`shifts` describe the segment. Costs half of :meth:`lookup`.
        """
        if begin >= self._limit:
            return -1
        ends = self._ends
        bucket = begin >> self._bucket_bits
        i = bisect_right(ends, begin, self._bucket[bucket], self._bucket[bucket + 1])
        return i if self._starts[i] <= begin and end <= ends[i] else -1

    def _lookup_several(self, i: int, begin: int, end: int) -> list[Run]:
        runs: list[Run] = []
        starts, ends, shifts, sources = self._starts, self._ends, self.shifts, self.sources
        while begin < end:
            start = starts[i] if i < len(starts) else end
            if start > begin:
                hole_end = min(start, end)
                runs.append((begin, hole_end - begin, HOLE, 0))
                begin = hole_end
                continue
            stop = min(ends[i], end)
            runs.append((begin, stop - begin, sources[i], begin + shifts[i]))
            begin = stop
            i += 1
        return runs

    def lookup_batch(self, begin: NDArray[np.int64], end: NDArray[np.int64]) -> tuple[NDArray[np.int64], RunTable]:
        """Do :meth:`lookup` for many ranges ``[begin, end)`` at once, without the parts that no segment covers.

        Returns the number of runs of each range, and the runs of all ranges, in order, as columns.
        """
        starts, ends = np.frombuffer(self._starts, np.int64), np.frombuffer(self._ends, np.int64)
        if not len(starts):
            none = np.zeros(0, np.int64)
            return np.zeros(len(begin), np.int64), RunTable(none, none, none.astype(np.int16), none)
        first = self._first_ending_after(begin, ends)
        # Nearly all ranges end in the segment they begin in or before the next; only the others are searched.
        count = (np.append(starts, _NEVER)[first] < end).astype(np.int64)
        longer = np.flatnonzero(np.append(starts[1:], (_NEVER, _NEVER))[first] < end)
        if len(longer):
            count[longer] = np.searchsorted(starts, end[longer], side="left") - first[longer]
        count[begin >= end] = 0
        number, end_of = first, end
        if not (count == 1).all():
            of = np.repeat(np.arange(len(begin)), count)
            number = first[of] + (np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count))
            begin, end_of = begin[of], end[of]
        run_begin = np.maximum(starts[number], begin)
        return count, RunTable(
            offset_sectors=run_begin,
            length_sectors=np.minimum(ends[number], end_of) - run_begin,
            source=np.frombuffer(self.sources, np.int16)[number],
            moffset_sectors=run_begin + np.frombuffer(self.shifts, np.int64)[number],
        )

    def _first_ending_after(self, sector: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        # The bucket table gives the first guess: mostly exact, or one too low.
        bucket = np.minimum(sector, self._limit) >> self._bucket_bits
        first: NDArray[np.int64] = np.frombuffer(self._bucket, np.int32)[bucket].astype(np.int64)
        ends = np.append(ends, _NEVER)
        first += ends[first] <= sector
        left = np.flatnonzero(ends[first] <= sector)
        if len(left):
            first[left] = np.searchsorted(ends, sector[left], side="right")
        return first

    def segments(self) -> Segments:
        """Return the segments as columns (copies)."""
        starts = np.array(self._starts, dtype=np.int64)
        sources = np.array(self.sources, dtype=np.int16)
        zeroed = sources < 0
        return Segments(
            offset_sectors=starts,
            length_sectors=np.array(self._ends, dtype=np.int64) - starts,
            moffset_sectors=np.array(self.shifts, dtype=np.int64) + starts,
            zeroed=zeroed,
            tag=np.where(zeroed, ~sources, sources).astype(np.uint8),
        )


class LayeredIndex:
    """A lookup equal to that of :func:`add_on_top` without its merge: made at once, but slower to look up."""

    def __init__(self, merged: SegmentIndex | None, top: Callable[[int, int], list[Run]]) -> None:
        """``top`` looks up the topmost layer, which may still change; its tags are 0."""
        self._merged = merged
        self._top = top
        self.shifts: array[int] = array("q")
        self.sources: array[int] = array("h")

    def find(self, begin: int, end: int) -> int:
        """Return -1: only :meth:`lookup` is supported."""
        return -1

    def lookup(self, begin: int, end: int) -> list[Run]:
        """As :meth:`SegmentIndex.lookup`, but a run of zeros may follow another."""
        if self._merged is None:
            return self._top(begin, end)
        runs: list[Run] = []
        for run in self._top(begin, end):
            if run[2] == HOLE:
                runs += map(_one_lower, self._merged.lookup(run[0], run[0] + run[1]))
            else:
                runs.append(run)
        return runs


def _one_lower(run: Run) -> Run:
    begin, count, source, moffset = run
    return begin, count, source if source == HOLE else source + 1 if source >= 0 else source - 1, moffset


def merge(indexes: Sequence[SegmentIndex]) -> SegmentIndex:
    """Return one index for a stack of layers given as ``[bottom, ..., top]``, at most 255.

    A segment of an upper layer hides the sectors it covers below, also when it is zeroed. Tags of the result are the
    original's numbering: **0 is the topmost layer**, ``len(indexes) - 1`` the bottom. Tags of the given indexes are
    ignored. Segments are cut where they are hidden, never joined.
    """
    if not 1 <= len(indexes) <= MAX_LAYERS:
        raise ValueError(f"a stack has 1 to {MAX_LAYERS} layers (got {len(indexes)})")
    return SegmentIndex(merge_segments([index.segments() for index in indexes]))


def add_on_top(merged: SegmentIndex, top: SegmentIndex) -> SegmentIndex:
    """Return :func:`merge` of the layers of ``merged`` with ``top`` on them.

    Tags of ``merged`` are raised by one, those of ``top`` are ignored.
    """
    below = merged.segments()
    return SegmentIndex(overlay(replace(below, tag=below.tag + np.uint8(1)), top.segments().without_tags()))


def merge_segments(layers: Sequence[Segments]) -> Segments:
    """Do :func:`merge` on bare columns, each of which must ascend without overlap."""
    top = len(layers) - 1
    return _merged([replace(layer, tag=np.full_like(layer.tag, top - i)) for i, layer in enumerate(layers)])


def overlay(lower: Segments, upper: Segments) -> Segments:
    """Return ``lower`` where ``upper`` does not hide it, and all of ``upper``; tags are kept."""
    return _merged([lower, upper])


def _merged(layers: Sequence[Segments]) -> Segments:
    base = np.concatenate(([0], np.cumsum([len(layer) for layer in layers])))
    # While merging, a piece is (start, end, number of its segment); the other columns are looked up at the end.
    level = [
        (layer.offset_sectors, layer.end_sectors, np.arange(base[i], base[i + 1], dtype=np.int32))
        for i, layer in enumerate(layers)
    ]
    while len(level) > 1:  # neighbours in pairs: every segment takes part in log2(layers) overlays only
        pairs = [_overlay(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
    begin, end, number = level[0]
    pieces = Segments.concatenate(layers)[number]
    # Cutting the front of a zeroed segment does not move its mapped offset: it occupies nothing there.
    moved = np.where(pieces.zeroed, 0, begin - pieces.offset_sectors)
    return replace(
        pieces,
        offset_sectors=begin,
        length_sectors=end - begin,
        moffset_sectors=pieces.moffset_sectors + moved,
    )


_Pieces = tuple["NDArray[np.int64]", "NDArray[np.int64]", "NDArray[np.int32]"]


def _overlay(lower: _Pieces, upper: _Pieces) -> _Pieces:
    lower_begin, lower_end, lower_number = lower
    upper_begin, upper_end, upper_number = upper
    if not len(upper_begin):
        return lower
    if not len(lower_begin):
        return upper
    # Lower pieces survive in the gaps of the upper layer: one before each segment and one after the last.
    gap_begin = np.concatenate((np.zeros(1, np.int64), upper_end))
    gap_end = np.concatenate((upper_begin, np.full(1, np.iinfo(np.int64).max)))
    open_gap = gap_begin < gap_end
    gap_begin, gap_end = gap_begin[open_gap], gap_end[open_gap]
    first = _count_not_after(gap_end, lower_begin)
    count = np.maximum(_count_before(gap_begin, lower_end) - first, 0)
    of = np.repeat(np.arange(len(lower_begin)), count)
    gap = np.arange(len(of)) - (np.cumsum(count) - count - first)[of]
    begin = np.maximum(lower_begin[of], gap_begin[gap])
    end = np.minimum(lower_end[of], gap_end[gap])

    # Both are sorted: the place of each piece follows from how many lower pieces come before each upper one.
    upper_at = _count_before(begin, upper_begin) + np.arange(len(upper_begin))
    is_lower = np.ones(len(begin) + len(upper_begin), dtype=np.bool_)
    is_lower[upper_at] = False
    lower_at = np.flatnonzero(is_lower)  # assigning by number is three times as fast as by mask

    def interleave(low: NDArray[np.generic], high: NDArray[np.generic]) -> NDArray[np.generic]:
        out = np.empty(len(is_lower), dtype=low.dtype)
        out[upper_at] = high
        out[lower_at] = low
        return out

    return (  # type: ignore[return-value]  # the dtypes of the inputs
        interleave(begin, upper_begin),
        interleave(end, upper_end),
        interleave(lower_number[of], upper_number),
    )


# Like searchsorted for sorted needles: a stable sort of two sorted runs is one linear pass, a third faster.


def _count_before(values: NDArray[np.int64], limits: NDArray[np.int64]) -> NDArray[np.int64]:
    # For each of the sorted limits, the number of sorted values below it.
    order = np.argsort(np.concatenate((limits, values)), kind="stable")
    return np.flatnonzero(order < len(limits)) - np.arange(len(limits))


def _count_not_after(values: NDArray[np.int64], limits: NDArray[np.int64]) -> NDArray[np.int64]:
    # For each of the sorted limits, the number of sorted values below or equal.
    order = np.argsort(np.concatenate((values, limits)), kind="stable")
    return np.flatnonzero(order >= len(values)) - np.arange(len(limits))


def split(segments: Segments, limit_sectors: int, *, split_zeroed: bool = True) -> Segments:
    """Cut every segment longer than ``limit_sectors`` into pieces of that length and a remainder."""
    length = segments.length_sectors
    count = -(-length // limit_sectors)
    if not split_zeroed:
        count[segments.zeroed] = 1
    if (count <= 1).all():
        return segments
    of = np.repeat(np.arange(len(length)), count)
    before = (np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)) * limit_sectors
    pieces = segments[of]
    rest = pieces.length_sectors - before
    return Segments(
        offset_sectors=pieces.offset_sectors + before,
        length_sectors=np.where(count[of] > 1, np.minimum(rest, limit_sectors), rest),
        moffset_sectors=np.where(pieces.zeroed, pieces.moffset_sectors, pieces.moffset_sectors + before),
        zeroed=pieces.zeroed,
        tag=pieces.tag,
    )


def coalesce(segments: Segments) -> Segments:
    """Join neighbours that continue each other on the disk and in the file, as the original's "compress" does.

    Both must be zeroed or both not, with equal tags, and the joined length must stay below 16383 sectors (so the
    longest joined segment has 16382). Joins greedily from the front.
    """
    if len(segments) < 2:
        return segments
    mapped_end = segments.moffset_sectors + segments.mapped_sectors
    joins = (
        (segments.end_sectors[:-1] == segments.offset_sectors[1:])
        & (mapped_end[:-1] == segments.moffset_sectors[1:])
        & (segments.zeroed[:-1] == segments.zeroed[1:])
        & (segments.tag[:-1] == segments.tag[1:])
    )
    heads = _heads(joins, segments.length_sectors)
    joined = segments[heads]
    return Segments(
        offset_sectors=joined.offset_sectors,
        length_sectors=np.add.reduceat(segments.length_sectors, heads),
        moffset_sectors=joined.moffset_sectors,
        zeroed=joined.zeroed,
        tag=joined.tag,
    )


def _heads(joins: NDArray[np.bool_], length: NDArray[np.int64]) -> NDArray[np.int64]:
    # Indexes of the records that start a joined one. Chains that fit whole need no loop; in longer ones each step
    # jumps over all records that fit.
    chain_heads = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), ~joins)))
    chain_ends = np.append(chain_heads[1:], len(length))
    total = np.concatenate((np.zeros(1, np.int64), np.cumsum(length)))
    too_long = total[chain_ends] - total[chain_heads] >= MAX_SEGMENT_SECTORS
    more: list[int] = []
    for chain in np.flatnonzero(too_long & (chain_ends - chain_heads > 1)).tolist():
        head, end = int(chain_heads[chain]), int(chain_ends[chain])
        while True:
            fitting = int(np.searchsorted(total, total[head] + MAX_SEGMENT_SECTORS, side="left")) - 1
            head = max(fitting, head + 1)
            if head >= end:
                break
            more.append(head)
    return np.sort(np.concatenate((chain_heads, np.array(more, dtype=np.int64))))


def _array(code: str, column: NDArray[np.generic]) -> array[int]:
    out: array[int] = array(code)
    out.frombytes(np.ascontiguousarray(column).view(np.uint8).data)
    return out
