"""A whole blob fetched ahead of its readers, as it is laid out in the order in which they will want it."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from obdlab.sources.cachedblob import CachedBlob

logger = logging.getLogger(__name__)

_FAILURES = 3
_PAUSE_S = 0.05
_LOOK_S = 0.002
# So long at most a piece waits for readers of something else.
_MOST_YIELDED_S = 0.5


class StreamAhead:
    """Fetches one blob from its beginning to its end, in a thread of its own that ends when all is there.

    Ends early when the blob is closed, or several tries in a row failed; the image works on without. Readers of what
    nobody expected (of other layers, that is) come first.
    """

    def __init__(self, name: str, blob: CachedBlob) -> None:
        self.name = name
        self._blob = blob
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="obdlab-stream", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Ask for nothing more; what is under way is not waited for."""
        self._stopped.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; tell whether it has come."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        blob = self._blob
        if not blob.hold():
            return
        began = time.monotonic()
        units = -(-blob.size // blob.unit)
        blob.expect(b"\1" * units)
        try:
            failures = 0
            while failures < _FAILURES and not self._ends():
                before = blob.counters.prefetch_bytes
                try:
                    if self._stream(units):
                        fetched = blob.counters.prefetch_bytes
                        logger.info("%s: %d bytes streamed in %.3f s", self.name, fetched, time.monotonic() - began)
                    return
                except ObdlabError as error:
                    failures = 1 if blob.counters.prefetch_bytes > before else failures + 1
                    level = logging.WARNING if failures == _FAILURES else logging.INFO
                    logger.log(level, "%s: streaming failed: %s", self.name, error)
                    self._stopped.wait(_PAUSE_S)
        except Exception:
            logger.exception("%s: streaming failed unexpectedly", self.name)
        finally:
            blob.expect(b"")
            blob.let_go()

    def _stream(self, units: int) -> bool:
        # Whether it came to the end.
        pieces = self._blob.pieces_ahead(0, units)
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
