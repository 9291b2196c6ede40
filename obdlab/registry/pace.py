"""A least speed for what a thread receives, so that one slow connection costs seconds, not half of a read's deadline.

A server that drips is never silent for long, and a connection whose packets get lost comes to a standstill: another
connection is likely to do better. A link that is slow for everybody is not helped by that, hence the slowness that
is put up with, and the few tries that have to keep pace (`registry.client`).
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: In each window so much must come at least. 100 kbit/s are 61 KiB in it, the share of one in fifteen connections 4.
WINDOW_S = 5.0
LEAST_IN_WINDOW = 4 << 10

_local = threading.local()


class Pace:
    """What has come since the window began; a request that is sent, and a window's worth of bytes, begin another."""

    __slots__ = ("_began", "_received")

    def __init__(self) -> None:
        self._began: float | None = None
        self._received = 0

    def sent(self) -> None:
        """A request went out. How long its answer takes to begin is not this one's business."""
        self._began = None

    def received(self, size: int) -> None:
        """Count what came."""
        self._received += size
        if self._began is None or self._received >= LEAST_IN_WINDOW:
            self._began, self._received = time.monotonic(), 0

    @property
    def end(self) -> float | None:
        """When the window is over (time.monotonic); None as long as nothing has come."""
        return None if self._began is None else self._began + WINDOW_S


@contextmanager
def least_pace() -> Iterator[None]:
    """Break off answers to this thread's requests that come too slowly: their reader gets a TimeoutError."""
    outer = pace_of_thread()
    _local.pace = Pace()
    try:
        yield
    finally:
        _local.pace = outer


def pace_of_thread() -> Pace | None:
    """Return what the calling thread has to keep pace with, if anything."""
    return getattr(_local, "pace", None)
