"""A least speed for a thread's answers, so that a slow connection costs seconds, not half of a read's deadline.

A server that drips is never silent for long, and a connection that loses packets stalls: another connection is likely
to be faster. If the whole link is slow, another connection does not help. So the least speed is low, and only a few
tries must keep it (`registry.client`).
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Least bytes in each window. At 100 kbit/s a window has 61 KiB; one of fifteen connections gets 4 of them.
WINDOW_S = 5.0
LEAST_IN_WINDOW = 4 << 10

_local = threading.local()


class Pace:
    """Bytes received in the current window. A request, and every LEAST_IN_WINDOW bytes, begin another one."""

    __slots__ = ("_began", "_received")

    def __init__(self) -> None:
        self._began: float | None = None
        self._received = 0

    def sent(self) -> None:
        """Note that a request was sent. The wait for its answer does not count."""
        self._began = None

    def received(self, size: int) -> None:
        """Count received bytes."""
        self._received += size
        if self._began is None or self._received >= LEAST_IN_WINDOW:
            self._began, self._received = time.monotonic(), 0

    @property
    def end(self) -> float | None:
        """The end of the window (time.monotonic); None before the first byte."""
        return None if self._began is None else self._began + WINDOW_S


@contextmanager
def least_pace() -> Iterator[None]:
    """Break off answers to this thread's requests that come too slowly: the read raises TimeoutError."""
    outer = pace_of_thread()
    _local.pace = Pace()
    try:
        yield
    finally:
        _local.pace = outer


def pace_of_thread() -> Pace | None:
    """Return the calling thread's pace, or None."""
    return getattr(_local, "pace", None)
