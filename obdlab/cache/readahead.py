"""Streams of readers, and the pieces fetched ahead of them. Pure bookkeeping in units; the caller holds a lock.

A stream is a reader that reads one unit after another; any number of them may be interleaved. The first unit of each
piece fetched ahead carries a mark: a reader that arrives there triggers the next pieces, so that several are
always in flight and the link never idles. The window is half of the way that the reader has come, up to its maximum:
a long reader gets there soon, a short one leaves little unused, and a random one next to nothing. The kernel reads
ahead on the device as well, so a few units in a row are no stream yet: importing pandas from a cold image fetched 46
MB without read-ahead, 50 MB with this, and 57 MB with a window as wide as the way.
"""

from __future__ import annotations

from dataclasses import dataclass

from obdlab.cache.policy import piece_of, window

_STREAMS = 32
# A reader may skip this many units (compressed blocks that it does not need) and still count as sequential.
_MAX_GAP = 1
# This many fetches of a miss in a row make a stream.
_MIN_WAY = 4


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
        ahead = window(way, growth * self._min_way, self._max_window)
        end = min(position + ahead, self._units)
        piece = piece_of(ahead, self._max_piece)
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
