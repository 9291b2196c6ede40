"""Deciding what a miss fetches, and what is fetched ahead. Pure bookkeeping in units; the caller holds a lock.

A miss fetches an aligned extent: a larger one for links whose waits cost much compared to their bytes.

A stream is a reader that reads one unit after another; any number of them may be interleaved. The first unit of each
piece fetched ahead carries a mark: a reader that arrives there triggers the next pieces, so that several are
always in flight and the link never idles. The window is half of the way that the reader has come, up to its maximum:
a long reader gets there soon, a short one leaves little unused, and a random one next to nothing. The kernel reads
ahead on the device as well, so a few units in a row are no stream yet: importing pandas from a cold image fetched 46
MB without read-ahead, 50 MB with this, and 57 MB with a window as wide as the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from obdlab.blob import LinkSpeed

_STREAMS = 32
# A reader may skip this many units (compressed blocks that it does not need) and still count as sequential.
_MAX_GAP = 1
# This many fetches of a miss in a row make a stream.
_MIN_WAY = 4
_MIN_PIECE = 2


@dataclass(slots=True)
class _Stream:
    start: int  # the reader's first position
    ahead: int  # end of the units requested for the reader, exclusive


class ReadAhead:
    """Streams of one blob. Ranges it returns are lists of (first unit, end), one request each."""

    def __init__(self, units: int, max_window: int, max_piece: int, *, min_way: int = _MIN_WAY) -> None:
        self._units = units
        self._min_way = min_way
        self._max_window = max_window
        self._max_piece = max(1, max_piece)
        self._streams: dict[int, _Stream] = {}  # by .ahead, least recently used first
        #: The streams by their marks.
        self.marks: dict[int, _Stream] = {}

    def is_mark(self, unit: int) -> bool:
        """Return True if the reader's arrival at ``unit`` must be reported to :meth:`passed`."""
        return unit in self.marks

    def missed(self, first: int, stop: int, growth: int = 1) -> list[tuple[int, int]]:
        """Note a reader's miss of ``[first, stop)``, which was not in flight. Return the pieces to fetch ahead.

        If the miss fetches ``growth`` times the usual, a stream must have come that much further.
        """
        stream = self._find(first) if self._streams else None
        if stream is None:
            self._remember(_Stream(first, stop))
            return []
        stream.ahead = stop
        return self._advance(stream, stop, growth)

    def passed(self, unit: int) -> list[tuple[int, int]]:
        """Note that the reader came to a marked unit. Return the pieces to fetch ahead."""
        stream = self.marks.pop(unit, None)
        if stream is None or self._streams.get(stream.ahead) is not stream:
            return []
        del self._streams[stream.ahead]
        return self._advance(stream, unit + 1)

    def _find(self, first: int) -> _Stream | None:
        for ahead in range(first, first - _MAX_GAP - 1, -1):
            stream = self._streams.pop(ahead, None)
            if stream is not None:
                return stream
        return None

    def _advance(self, stream: _Stream, position: int, growth: int = 1) -> list[tuple[int, int]]:
        way = position - stream.start
        window = min(way // 2 if way >= growth * self._min_way else 0, self._max_window)
        end = min(position + window, self._units)
        piece = min(max(_MIN_PIECE, window // 2), self._max_piece)  # at least two should be in flight
        pieces: list[tuple[int, int]] = []
        while stream.ahead < end:
            first = stream.ahead
            if first > position and first + piece > end < self._units:
                break  # a fragment: the next mark makes it a whole piece
            stream.ahead = min(first + piece, end)
            self.marks[first] = stream
            pieces.append((first, stream.ahead))
        self._remember(stream)
        return pieces

    def _remember(self, stream: _Stream) -> None:
        while len(self._streams) >= _STREAMS:
            self._streams.pop(next(iter(self._streams)))
        self._streams[stream.ahead] = stream


# -- extents ---------------------------------------------------------------------------------------------------------

# A start needs half or less of the bytes fetched around its misses. This many times the link's bytes per wait gives
# extents of 64, 256 and 512 KiB at 100 Mbit/s and round trips of 0, 5 and 20 ms, about the best of those that were
# tried there.
_WAITS = 3.4
# With shorter waits, extents above the usual would save next to nothing, and cost the registry bytes.
_SHORT_WAIT_S = 0.005
#: The extent may be smaller than the usual by this factor.
SMALLEST = 4


class Extent:
    """Aligned runs of a power of two of units: ``usual`` many as long as the link is unknown.

    With ``most`` above 0 the link decides: up to ``most``, or down to a quarter of the usual.
    """

    def __init__(self, usual: int, most: int, unit: int) -> None:
        self._usual = usual
        self._unit = unit
        self._least = max(1, usual // SMALLEST) if most else usual
        self._most = max(usual, most)

    def units(self, link: LinkSpeed | None) -> int:
        """Return the number of units that a miss fetches now."""
        if link is None or not link.bytes_per_wait or self._least == self._most:
            return self._usual
        worthwhile = _WAITS * link.bytes_per_wait / self._unit
        most = self._usual if link.wait_s < _SHORT_WAIT_S else self._most
        units = self._least
        while 2 * units <= min(worthwhile, most):
            units *= 2
        return units

    def growth(self, units: int) -> int:
        """Return the ratio of that many units to the usual, at least 1."""
        return max(1, units // self._usual)


#: Used while an image is opened: opening reads few, known places.
SINGLE = Extent(1, 0, 1)
