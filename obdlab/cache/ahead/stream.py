"""Fetching a whole blob ahead of its readers, if it is laid out in the order of their reads."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from obdlab.cache.cachedblob import CachedBlob

logger = logging.getLogger(__name__)

_FAILURES = 3
_PAUSE_S = 0.05
_LOOK_S = 0.002
# Longest time that a piece waits for readers of other layers.
_MOST_YIELDED_S = 0.5
# This much of a large blob's end is fetched by a second, parallel request: a connection needs some round trips to
# reach the link's speed, and until then there is room for another one. More would keep readers waiting.
_TAIL = 512 << 10
_LEAST_TAIL = 128 << 10
_TAIL_SHARE = 8


class StreamAhead:
    """Fetches one blob from its beginning to its end, by one request; the end of a large one in parallel by another.

    Its threads end when all is cached, the blob is closed, or several tries in a row have failed; the image works on
    without. Readers of unexpected units (of other layers) come first. The last ``left`` bytes are left to a reader
    that reads them at once, and fetched last. With ``stop``, only that many bytes from the beginning on are fetched.
    """

    def __init__(self, name: str, blob: CachedBlob, *, left: int = 0, stop: int | None = None) -> None:
        self.name = name
        self._blob = blob
        self._stopped = threading.Event()
        size = blob.size if stop is None else min(stop, blob.size)
        self._units = units = -(-size // blob.unit)
        end = max(0, size - left) // blob.unit if left else units
        tail = min(_TAIL, size // _TAIL_SHARE) // blob.unit if size >= _LEAST_TAIL * _TAIL_SHARE else 0
        begin = max(0, end - tail)
        # The thread of the first part continues with the units left over.
        parts = [(0, begin), *([(begin, end)] if tail else [])]
        self._threads = [
            threading.Thread(target=self._run, args=part, name="obdlab-stream", daemon=True) for part in parts
        ]
        self._guard = threading.Lock()
        self._running = 0

    def start(self) -> None:
        """Begin, unless all is cached; returns at once."""
        if self._blob.has(0, min(self._units * self._blob.unit, self._blob.size)):
            self._threads = []
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Send no further requests; does not wait for those in flight."""
        self._stopped.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end. Return False on timeout."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, first: int, stop: int) -> None:
        with self._blob.demand.announced:
            self._fetch(first, stop)

    def _fetch(self, first: int, stop: int) -> None:
        blob = self._blob
        if not blob.hold():
            return
        began = time.monotonic()
        self._count(1)
        try:
            failures = 0
            while failures < _FAILURES and not self._ends():
                before = blob.counters.prefetch_bytes
                try:
                    if self._stream(first, stop) and (first or self._stream(0, self._units)):
                        size = blob.length_of(first, stop)
                        logger.info("%s: %d bytes streamed in %.3f s", self.name, size, time.monotonic() - began)
                    return
                except ObdlabError as error:
                    failures = 1 if blob.counters.prefetch_bytes > before else failures + 1
                    level = logging.WARNING if failures == _FAILURES else logging.INFO
                    logger.log(level, "%s: streaming failed: %s", self.name, error)
                    self._stopped.wait(_PAUSE_S)
        except Exception:
            logger.exception("%s: streaming failed unexpectedly", self.name)
        finally:
            self._count(-1)
            blob.let_go()

    # Readers expect all of the blob while any part is being fetched.
    def _count(self, change: int) -> None:
        with self._guard:
            self._running += change
            self._blob.expect(b"\1" * self._units if self._running else b"")

    def _stream(self, first: int, stop: int) -> bool:
        # Returns True if it came to the end.
        pieces = self._blob.pieces_ahead(first, stop)
        try:
            while pieces.fetch_next():
                if self._ends():
                    return False
                self._yield_to_readers()
        finally:
            pieces.close()
        return True

    def _yield_to_readers(self) -> None:
        surprised = self._blob.demand.surprised
        end = time.monotonic() + _MOST_YIELDED_S
        while surprised.busy and time.monotonic() < end and not self._ends():
            time.sleep(_LOOK_S)

    def _ends(self) -> bool:
        return self._stopped.is_set() or self._blob.closed
