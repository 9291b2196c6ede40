"""Fetching a large part of a blob in order by one request; readers get each piece as soon as it has arrived."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from obdlab.errors import SourceError

if TYPE_CHECKING:
    from obdlab.blob import Blob, ByteStream
    from obdlab.cache.fetching import Fetches
    from obdlab.cache.flights import Flight
    from obdlab.call import Call

# Readers of the next units, up to this many bytes, wait for them; readers further ahead fetch themselves. It takes
# 80 ms at 100 Mbit/s.
_CLAIMED = 1 << 20
# Readers get a piece when all of it has arrived. The first ones are small, as an image's opening waits for them;
# later ones are as large as arrives in this time, since the processor's cost is per piece.
_FIRST = 32 << 10
_LEAST = 64 << 10
_SOONEST_S, _LATEST_S = 0.0045, 0.01
# Units that are cached already are read and thrown away, up to this size: that is sooner than another request.
_MOST_SKIPPED = 256 << 10


class PiecesAhead:
    """The units ``[first, stop)`` of a blob, each of ``unit`` bytes, in order and in pieces of up to ``most``.

    For one thread, which must :meth:`close` it in the end.
    """

    def __init__(self, origin: Blob, fetches: Fetches, first: int, stop: int, *, unit: int, most: int) -> None:
        self._origin = origin
        self._fetches = fetches
        self._next = first
        self._stop = stop
        self._unit = unit
        self._most = most
        self._piece = _FIRST
        self._claimed: deque[Flight] = deque()
        self._stream: ByteStream | None = None

    def fetch_next(self) -> bool:
        """Fetch the next piece. Return False at the end. Raises what the origin raises; may be called again."""
        self._claim()
        if not self._claimed:
            return False
        # With the next one: another process that follows this one must not come between two pieces.
        for flight in list(self._claimed)[:2]:
            self._fetches.hold_claimed(flight)
        self._fetches.fetch_claimed(self._claimed.popleft(), self._read)
        return True

    def close(self) -> None:
        """Abandon the pieces that have not arrived; their readers fetch them."""
        while self._claimed:
            self._fetches.give_back(self._claimed.popleft())
        self._close_stream()

    def _claim(self) -> None:
        while self._next < self._claim_end():
            stop = min(self._stop, self._next + max(1, self._piece // self._unit))
            flight = self._fetches.claim_ahead(self._next, stop)
            self._next = stop if flight is None else flight.stop
            if flight is not None:
                self._claimed.append(flight)
                self._piece = max(self._piece, min(_LEAST, self._most))

    def _claim_end(self) -> int:
        if not self._claimed:
            return self._stop
        return min(self._stop, self._claimed[0].first + max(1, _CLAIMED // self._unit))

    def _read(self, flight: Flight, call: Call) -> bytes:
        offset, length = self._fetches.range_of(flight)
        began = time.monotonic()
        try:
            stream = self._stream_at(flight, offset, call)
            if stream is None:
                return self._fetches.read_origin(flight, call)
            if offset > stream.position:
                stream.read(offset - stream.position, call)
            data = stream.read(length, call)
            if len(data) != length:
                what = f"short read of a stream (got {len(data)} bytes, wanted {length})"
                raise SourceError(what, blob=self._origin.name, offset=offset)
        except BaseException:
            self._close_stream()
            raise
        self._fit(time.monotonic() - began)
        return data

    def _fit(self, took_s: float) -> None:
        if took_s > _LATEST_S:
            self._piece = max(self._piece // 2, min(_LEAST, self._most))
        elif took_s < _SOONEST_S:
            self._piece = min(self._piece * 2, self._most)

    def _stream_at(self, flight: Flight, offset: int, call: Call) -> ByteStream | None:
        stream = self._stream
        if stream is not None and stream.position <= offset <= stream.position + _MOST_SKIPPED:
            flight.streamed = True  # the flight that opened the stream counts as its request
            return stream
        self._close_stream()
        self._stream = self._origin.stream(offset, self._fetches.end_of(self._stop) - offset, call)
        return self._stream

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
