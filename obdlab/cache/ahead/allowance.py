"""The bytes that this host may still download today to complete images, of all processes that share a cache.

``<cache dir>/allowance/today`` has the day (UTC) and the bytes taken. A killed process has taken bytes that it never
fetched, not the reverse. A damaged file counts as one of another day.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from typing import TYPE_CHECKING

from obdlab.system.ownfiles import open_own

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.cache.space import CacheSpace

_ENTRY = struct.Struct("<8sQQ")  # magic, day since 1970, bytes
_MAGIC = b"OBDLDAYS"
_DAY_S = 86_400
# Bytes taken from the file at a time, so that it is not locked for each piece.
_LUMP = 16 << 20


class Allowance:
    """``per_day`` bytes (0: no limit) for the cache directory of ``space``. Any thread may take from it."""

    def __init__(self, space: CacheSpace, per_day: int, clock: Callable[[], float] = time.time) -> None:
        self._space = space
        self._per_day = per_day
        self._clock = clock
        self._lock = threading.Lock()
        self._day = -1
        self._mine = 0

    def left(self, wanted: int) -> float:
        """Return the bytes that may be fetched now: at least ``wanted``, unless the day's are used up; inf: no limit.

        Without access to the file it is 0.
        """
        if not self._per_day:
            return float("inf")
        with self._lock:
            today = int(self._clock() // _DAY_S)
            if today != self._day:
                self._day, self._mine = today, 0
            if self._mine < wanted:
                try:
                    self._mine += self._take(today, max(wanted - self._mine, _LUMP))
                except OSError:
                    return 0
            return self._mine

    def spend(self, length: int) -> None:
        """Note that ``length`` bytes are being fetched."""
        with self._lock:
            self._mine = max(0, self._mine - length)

    def give_back(self) -> None:
        """Return the bytes taken and not spent."""
        with self._lock:
            today, mine = self._day, self._mine
            self._mine = 0
            if mine:
                try:
                    self._take(today, -mine)
                except OSError:
                    return

    def _take(self, today: int, wanted: int) -> int:
        directory = self._space.directory / "allowance"
        with self._space.changing(directory, _ENTRY.size):
            directory.mkdir(mode=0o700, exist_ok=True)
            fd = open_own(directory / "today", os.O_RDWR | os.O_CREAT)
            try:
                day, taken = _parsed(os.pread(fd, _ENTRY.size, 0))
                if day != today:
                    if wanted < 0:  # of a day that is over
                        return 0
                    taken = 0
                got = min(wanted, max(0, self._per_day - taken))
                os.pwrite(fd, _ENTRY.pack(_MAGIC, today, max(0, taken + got)), 0)
                return got
            finally:
                os.close(fd)


def _parsed(content: bytes) -> tuple[int, int]:
    if len(content) != _ENTRY.size:
        return -1, 0
    magic, day, taken = _ENTRY.unpack(content)
    return (day, taken) if magic == _MAGIC else (-1, 0)
