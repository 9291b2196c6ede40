"""A span of a gzip layer that is too long to be decoded at once, as of one giant deflate block.

The original begins at the entry for every read in it. Here the inflater's state is copied every few MiB on the way: a
later read begins at the last copy before it, and reading in order goes on with the state there is.
"""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_right
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from obdlab.call import UNBOUND
from obdlab.errors import CorruptBlobError, FormatError, SourceError
from obdlab.formats.gzipindex import WINDOW
from obdlab.formats.gzipmember import begin_inside_byte
from obdlab.layers.inflater import Inflater

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Blob
    from obdlab.call import Call

#: Content between two copies of the state, and most copies: each has about 50 KiB.
DISTANCE = 4 << 20
MOST_POINTS = 256
#: Most content between two copies, which is in memory at a time.
MOST_DISTANCE = 64 << 20
# Compressed bytes given at a time: at deflate's best rate they are 16 MiB of content.
_STEP = 16 << 10
# Longest wait for another thread that decodes in the same span: it may have to inflate all of it.
_LONGEST_WAIT_S = 300.0


class _Point(NamedTuple):
    content: int  # from the span's beginning
    stored: int  # in the gzip file
    inflater: Inflater  # stays as it is: reads go on with copies
    sum: int  # CRC-32 of the piece before it


class LongSpan:
    """One span: the range ``stored`` of ``below``, of whose first byte it has only the upper ``bits`` if not 0.

    ``inflater`` begins there, has zlib as its library, and stays as it is; ``window`` is the content before.

    At its end ``check`` is called with the last 32 KiB, the inflater and the call, and raises if they are wrong. With
    ``trusted`` False that happens before the first byte is returned. ``keep`` gets a piece's number, a function that
    decodes it and the call; it may call the function or not, if it has kept the piece. Thread-safe. Raises
    FormatError for a span of more than MOST_POINTS * MOST_DISTANCE.
    """

    def __init__(
        self,
        below: Blob,
        stored: tuple[int, int],
        bits: int,
        inflater: Inflater,
        window: bytes,
        *,
        last: bool,
        trusted: bool,
        check: Callable[[bytes, Inflater, Call | None], None],
        keep: Callable[[int, Callable[[], bytes], Call | None], bytes],
    ) -> None:
        self._below = below
        (self._begin, self._end), self._bits = stored, bits
        self._first, self._window = inflater, window
        self._distance = max(DISTANCE, inflater.left // MOST_POINTS)
        if self._distance > MOST_DISTANCE:
            raise FormatError(
                "gzip layer has too much content between two places at which its index begins",
                blob=below.name,
                got=inflater.left,
                wanted=f"at most {MOST_POINTS * MOST_DISTANCE}",
            )
        self._last = last
        self._trusted = trusted
        self._check = check
        self._keep = keep
        self._lock = threading.Lock()
        self._points: list[_Point] = []
        self._before = 0  # pieces of earlier rounds, which may be kept and must not be found again
        #: As :class:`obdlab.layers.spannedtarget.Long` has it.
        self.decoded_bytes = 0
        self._stale = False
        self._begin_again()

    def forget(self) -> None:
        """Begin once more from the entry: the next read does, as the lock may be held for long."""
        self._stale = True

    def _begin_again(self) -> None:
        self._before += len(self._points)
        self._points = [_Point(0, self._begin, self._first, 0)]
        self._complete = False
        self._tail = self._window

    def close(self) -> None:
        """Do nothing: the caller keeps the pieces, and the copies go with this object."""

    def read(self, offset: int, length: int, call: Call | None = None) -> bytes:
        """Return bytes of the span. Raises CorruptBlobError; SourceError if another thread takes too long."""
        terms = call or UNBOUND
        terms.about_to_wait()
        if not self._lock.acquire(timeout=terms.left_s(_LONGEST_WAIT_S)):
            what = "another thread has not decoded the same part in time"
            raise SourceError(what, blob=self._below.name, temporary=True)
        try:
            if self._stale:
                self._stale = False
                self._begin_again()
            while not (self._trusted or self._complete):
                self._advance(call)
            parts = []
            while length:
                begin, piece = self._piece_at(offset, call)
                parts.append(piece[offset - begin : offset - begin + length])
                offset += len(parts[-1])
                length -= len(parts[-1])
            return b"".join(parts)
        finally:
            self._lock.release()

    def piece(self, offset: int) -> tuple[int, int] | None:
        """Return the range that is decoded with a byte; None if that is not known yet."""
        points = self._points
        number = bisect_right(points, offset, key=lambda point: point.content)
        return (points[number - 1].content, points[number].content) if number < len(points) else None

    # Returns where the piece begins that has a byte, and the piece. Needs the lock.
    def _piece_at(self, offset: int, call: Call | None) -> tuple[int, bytes]:
        while True:
            number = bisect_right(self._points, offset, key=lambda point: point.content) - 1
            if number < len(self._points) - 1:
                again = partial(self._again, number, call)
                return self._points[number].content, self._keep(self._before + number, again, call)
            begin = self._points[number].content
            piece = self._advance(call)
            if offset < begin + len(piece):
                return begin, piece

    # Decodes from the last point on, and adds the next; an error leaves the last one as it is. Needs the lock.
    def _advance(self, call: Call | None) -> bytes:
        content, stored, inflater, _ = self._points[-1]
        frontier = inflater.copy()
        parts: list[bytes] = []
        size = 0
        while size < self._distance and stored < self._end:
            stored = self._take(frontier, stored, call)
            part = frontier.taken()
            size += len(part)
            parts.append(part)
        piece = b"".join(parts)
        self.decoded_bytes += size
        tail = (self._tail + piece)[-WINDOW:]
        if stored == self._end:
            frontier.end(last=self._last)
            self._check(tail, frontier, call)
            self._complete = True
        self._tail = tail
        number = len(self._points) - 1
        self._points.append(_Point(content + size, stored, frontier, zlib.crc32(piece)))
        return self._keep(self._before + number, lambda: piece, call)

    def _again(self, number: int, call: Call | None) -> bytes:
        point, end = self._points[number], self._points[number + 1].stored
        inflater, stored = point.inflater.copy(), point.stored
        while stored < end:
            stored = self._take(inflater, stored, call)
        piece = inflater.taken()
        self.decoded_bytes += len(piece)
        after = self._points[number + 1]
        if len(piece) != after.content - point.content or zlib.crc32(piece) != after.sum:
            raise CorruptBlobError(
                "gzip data inflates to other content than before", blob=self._below.name, offset=point.stored
            )
        return piece

    def _take(self, inflater: Inflater, stored: int, call: Call | None) -> int:
        length = min(_STEP, self._end - stored)
        data = self._below.read_at(stored, length, call)
        if stored == self._begin and self._bits:
            data = begin_inside_byte(data[0], self._bits) + data[1:]
        inflater.take(data)
        return stored + length
