"""Files to which several processes append lines, renamed aside when they have reached a size."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_MODE = 0o600


class RotatingFile:
    """Appends lines to ``path``, each by one write; any number of processes may do so at once.

    A file that has reached ``size`` bytes becomes ``<path>.1``, the one before ``<path>.2`` and so on; ``count``
    files are kept, the current one included. The first process to notice renames, under a lock on the file itself;
    the others follow at their next line. ``follow`` are descriptors (such as standard output) that shall refer to the
    current file.

    Raises OSError if the file cannot be opened; nothing is opened before the first line.
    """

    def __init__(self, path: Path | str, *, size: int, count: int, follow: Sequence[int] = ()) -> None:
        if size < 1 or count < 1:
            raise ValueError(f"log rotation: size and count must be at least 1 (got {size} and {count})")
        # Absolute: servers change the working directory.
        self.path = Path(path).absolute()
        self._size = size
        self._count = count
        self._follow = tuple(follow)
        # A path that is no link when the service starts must not become one.
        self._flags = os.O_CLOEXEC | (0 if self.path.is_symlink() else os.O_NOFOLLOW)
        self._fd = -1
        # Re-entrant, like logging's own locks: a signal's handler may log while it interrupts the writing of a line.
        self._lock = threading.RLock()

    def write(self, line: bytes) -> None:
        """Append ``line``, a line end included. Raises OSError (disk full)."""
        with self._lock:
            if self._fd < 0:
                self._reopen()
            status = os.fstat(self._fd)
            if status.st_nlink == 0:  # deleted by hand
                self._reopen()
            elif status.st_size >= self._size:
                self._rotate()
                self._reopen()
            os.write(self._fd, line)

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        with self._lock:
            former, self._fd = self._fd, -1
            if former >= 0:
                os.close(former)

    def _reopen(self) -> None:
        # Open the new file first: if that fails, lines still go to the old one.
        fresh = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | self._flags, _MODE)
        former, self._fd = self._fd, fresh
        if former >= 0:
            os.close(former)
        for follower in self._follow:
            os.dup2(fresh, follower)

    def _rotate(self) -> None:
        # A new descriptor for the lock: processes that share a forked one would share the lock.
        try:
            current = os.open(self.path, os.O_WRONLY | self._flags)
        except FileNotFoundError:  # moved by hand
            return
        try:
            fcntl.flock(current, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(current), os.stat(self.path)):
                return  # another process was faster
            if os.fstat(current).st_size < self._size:
                return
            for number in range(self._count - 1, 0, -1):
                newer = self._aside(number - 1)
                if newer.exists():
                    newer.replace(self._aside(number))
            if self._count == 1:
                os.ftruncate(current, 0)
        except (BlockingIOError, FileNotFoundError):  # another process is rotating
            pass
        finally:
            os.close(current)

    def _aside(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path
