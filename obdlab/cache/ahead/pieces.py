"""Fetching a large part of a blob in order by one request; readers get each piece as soon as it has arrived."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from obdlab.observe.counters import DOWNLOAD_BYTES
from obdlab.registry.deadline import deadline_of_thread

if TYPE_CHECKING:
    from obdlab.blob import Blob
    from obdlab.cache.fetching import Fetches
    from obdlab.cache.flights import Flight
    from obdlab.registry.rangestream import RangeStream

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


@runtime_checkable
class Streams(Protocol):
    """A blob with ranges that can be read as they arrive."""

    def open_range(self, offset: int, length: int) -> RangeStream:
        """Request the range."""


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
        self._stream: RangeStream | None = None

    def fetch_next(self) -> bool:
        """Fetch the next piece. Return False at the end. Raises what the origin raises; may be called again."""
        self._claim()
        if not self._claimed:
            return False
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

    def _read(self, flight: Flight, deadline: float) -> bytes:
        offset, length = self._fetches.range_of(flight)
        if not isinstance(self._origin, Streams):
            return self._origin.read_at(offset, length)
        flight.streamed = True
        began = time.monotonic()
        with deadline_of_thread(deadline):
            try:
                data = self._streamed(self._origin, offset, length)
            except BaseException:
                self._close_stream()
                raise
        DOWNLOAD_BYTES.add(length)
        self._fit(time.monotonic() - began)
        return data

    def _fit(self, took_s: float) -> None:
        if took_s > _LATEST_S:
            self._piece = max(self._piece // 2, min(_LEAST, self._most))
        elif took_s < _SOONEST_S:
            self._piece = min(self._piece * 2, self._most)

    def _streamed(self, origin: Streams, offset: int, length: int) -> bytes:
        stream = self._stream
        if stream is None or not stream.position <= offset <= stream.position + _MOST_SKIPPED:
            self._close_stream()
            self._fetches.count_request()
            stream = self._stream = origin.open_range(offset, self._fetches.end_of(self._stop) - offset)
        if offset > stream.position:
            stream.read(offset - stream.position)
        return stream.read(length)

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
