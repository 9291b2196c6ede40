"""A least speed for a thread's answers, so that a slow connection costs seconds, not half of a read's deadline.

A server that drips is never silent for long, and a connection that loses packets stalls: another connection is likely
to be faster. If the whole link is slow, another connection does not help. So the least speed is low, and only a few
tries must keep it (`registry.client`).
"""

from __future__ import annotations

import threading
import time

#: Least bytes in each window. At 100 kbit/s a window has 61 KiB; one of fifteen connections gets 4 of them.
WINDOW_S = 5.0
LEAST_IN_WINDOW = 4 << 10


class Pace:
    """Bytes received in the current window. A request, and every LEAST_IN_WINDOW bytes, begin another one."""

    __slots__ = ("_received", "end")

    def __init__(self) -> None:
        #: The end of the window (time.monotonic); None before the first byte.
        self.end: float | None = None
        self._received = 0

    def sent(self) -> None:
        """Note that a request was sent. The wait for its answer does not count."""
        self.end = None

    def received(self, size: int) -> None:
        """Count received bytes."""
        self._received += size
        if self.end is None or self._received >= LEAST_IN_WINDOW:
            self.end, self._received = time.monotonic() + WINDOW_S, 0


class _OfThread(threading.local):
    pace: Pace | None = None


#: The pace that answers to the calling thread must keep, else a read raises TimeoutError. An attribute, as every
#: operation of a socket looks it up.
OF_THREAD = _OfThread()
