"""What to fetch before it is asked for. Pure bookkeeping in units of the cache; the caller holds a lock.

A stream is a reader that asked for one unit after another; any number of them may be interleaved. The first unit of
each piece fetched ahead carries a mark: the reader coming by there has the next pieces fetched, so that several are
always under way and the link never idles. The window doubles at each mark up to its maximum, and someone who reads
at random costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

_STREAMS = 32
# A reader may leave out this many units (compressed blocks it does not need) and still count as sequential.
_MAX_GAP = 2
_FIRST_WINDOW = 2


@dataclass(slots=True)
class _Stream:
    ahead: int  # end of what has been asked for on behalf of the reader, exclusive
    window: int  # how far ahead of the reader that may be


class ReadAhead:
    """Streams of one blob. Ranges it returns are lists of (first unit, end), each piece to be one request."""

    def __init__(self, units: int, max_window: int, max_piece: int) -> None:
        self._units = units
        self._max_window = max_window
        self._max_piece = max(1, max_piece)
        self._streams: dict[int, _Stream] = {}  # by .ahead, least recently used first
        self._marks: dict[int, _Stream] = {}

    def is_mark(self, unit: int) -> bool:
        """Whether the reader's arrival at ``unit`` must be told to :meth:`passed`."""
        return unit in self._marks

    def missed(self, first: int, stop: int) -> list[tuple[int, int]]:
        """The reader asked for ``[first, stop)``, which nobody had asked for. Return what to fetch ahead."""
        stream = self._find(first)
        if stream is None:
            self._remember(_Stream(stop, 0))
            return []
        stream.ahead = stop
        self._grow(stream, max(_FIRST_WINDOW, 2 * (stop - first)))
        return self._advance(stream, stop)

    def passed(self, unit: int) -> list[tuple[int, int]]:
        """The reader came to a marked unit. Return what to fetch ahead."""
        stream = self._marks.pop(unit, None)
        if stream is None or self._streams.get(stream.ahead) is not stream:
            return []
        del self._streams[stream.ahead]
        self._grow(stream, _FIRST_WINDOW)
        return self._advance(stream, unit + 1)

    def _grow(self, stream: _Stream, least: int) -> None:
        stream.window = min(max(least, 2 * stream.window), self._max_window)

    def _find(self, first: int) -> _Stream | None:
        for ahead in range(first, first - _MAX_GAP - 1, -1):
            stream = self._streams.pop(ahead, None)
            if stream is not None:
                return stream
        return None

    def _advance(self, stream: _Stream, position: int) -> list[tuple[int, int]]:
        end = min(position + stream.window, self._units)
        pieces = []
        while stream.ahead < end:
            first = stream.ahead
            stream.ahead = min(first + self._max_piece, end)
            self._marks[first] = stream
            pieces.append((first, stream.ahead))
        self._remember(stream)
        return pieces

    def _remember(self, stream: _Stream) -> None:
        while len(self._streams) >= _STREAMS:
            self._streams.pop(next(iter(self._streams)))
        self._streams[stream.ahead] = stream
