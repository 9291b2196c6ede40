"""Locks of whole files between processes (flock(2)), at once or by a deadline.

The kernel releases a lock when its last descriptor is closed, so a killed process leaves none behind.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FIRST_PAUSE_S = 0.0001
_LONGEST_PAUSE_S = 0.005


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file. Return False if another process has it locked. Raises OSError where there are no locks."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_until(descriptor: int, deadline: float, *, longest_pause_s: float = _LONGEST_PAUSE_S) -> bool:
    """Lock an open file, trying again until ``deadline`` (time.monotonic()). Return False if it is still locked.

    Raises OSError where there are no locks.
    """
    # A waiting flock has no deadline, and a signal would interrupt the main thread alone.
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, longest_pause_s)


@contextmanager
def directory_locked(
    directory: str | Path, timeout_s: float = 0.0, *, longest_pause_s: float = _LONGEST_PAUSE_S
) -> Iterator[bool]:
    """Lock a directory for the block; yield False if another process still has it locked after ``timeout_s``.

    Raises OSError if it cannot be opened, or where there are no locks.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield lock_until(descriptor, time.monotonic() + timeout_s, longest_pause_s=longest_pause_s)
    finally:
        os.close(descriptor)
