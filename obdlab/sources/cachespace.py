"""The cache directory as a whole: its lock, what it holds on disk, and how it is kept within its limits.

``<directory>/usage`` is the lock (flock) of everybody who makes, stores, gives back or removes, and holds the sum of
all disk blocks below the directory. The sum is raised before a write and set right after it, so a killed process
leaves it too large, never too small; it is counted anew from the files' block counts when that matters (before
anything is evicted) and after a reboot.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.sources.eviction import evict

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_LEDGER = struct.Struct("=8s40sq")  # magic, boot id, bytes
_MAGIC = b"OBDLUSED"
_BLOCK = 4096
# Storing is worth no long wait: a reader may stand behind it.
_WAIT_TO_STORE_S = 1.0
_WAIT_TO_OPEN_S = 10.0
# An eviction frees this much more than was asked for, so that it is not needed at every store.
_SPARE_SHARE = 32
# The free space kept on the file system is no more than this share of it.
_FREE_SHARE = 16
# After an eviction that did not help, the next is not tried at once.
_REST_S = 1.0


class CacheSpace:
    """What all blobs of one cache directory share. Making one touches nothing; it holds nothing open.

    The directory holds at most ``quota`` bytes on disk (0: no limit), and the cache gives back what it holds rather
    than leave less than ``min_free`` bytes (at most a 16th of it) free on the file system.
    """

    def __init__(self, directory: Path | str, *, quota: int = 0, min_free: int = 0) -> None:
        self.directory = Path(directory)
        self.blobs = self.directory / "blobs"
        #: Bytes given back so far, by this object.
        self.evicted_bytes = 0
        self._quota = quota
        self._min_free = min_free
        self._lock = threading.Lock()  # threads queue here, and do not poll for the file's lock
        self._no_eviction_before = 0.0

    @contextmanager
    def room(self, fd: int, length: int) -> Iterator[None]:
        """Hold the lock with room for ``length`` more bytes in the file ``fd``.

        Raises OSError if there is none (ENOSPC), the file was deleted (ESTALE) or others hold the lock too long.
        """
        length += -length % _BLOCK
        with self._locked(_WAIT_TO_STORE_S) as ledger:
            self._make_room(ledger, length)
            before = os.fstat(fd)
            if before.st_nlink == 0:
                raise OSError(errno.ESTALE, "cache file was deleted", str(self.directory))
            used = ledger.used
            ledger.set(used + length)
            try:
                yield
            finally:
                ledger.set(used + 512 * (os.fstat(fd).st_blocks - before.st_blocks))

    @contextmanager
    def growing(self, directory: Path, length: int) -> Iterator[None]:
        """As :meth:`room`, for files below ``directory`` that are made or replaced."""
        with self._locked(_WAIT_TO_OPEN_S) as ledger:
            self._make_room(ledger, length)
            before = self._usage_of(directory)
            used = ledger.used
            ledger.set(used + length)
            try:
                yield
            finally:
                ledger.set(used + self._usage_of(directory) - before)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock to give back or remove; what the directory holds is counted anew afterwards."""
        with self._locked(_WAIT_TO_OPEN_S) as ledger:
            try:
                yield
            finally:
                ledger.set(disk_usage(self.directory))

    def _usage_of(self, directory: Path) -> int:
        # With the directories that lead to it, which may be new.
        total = disk_usage(directory) if directory.exists() else 0
        while (directory := directory.parent) != self.directory:
            total += 512 * directory.lstat().st_blocks if directory.exists() else 0
        return total

    def _make_room(self, ledger: _Ledger, length: int) -> None:
        excess = self._excess(ledger.used, length)
        if excess <= 0:
            return
        if time.monotonic() >= self._no_eviction_before:
            used = disk_usage(self.directory)
            excess = self._excess(used, length)
            if excess > 0:
                evict(self.blobs, excess + (self._quota or used) // _SPARE_SHARE)
                left = disk_usage(self.directory)
                logger.info("%s: gave back %d of %d bytes", self.directory, used - left, used)
                self.evicted_bytes += used - left
                used = left
                excess = self._excess(used, length)
            ledger.set(used)
            if excess <= 0:
                return
            self._no_eviction_before = time.monotonic() + _REST_S
        raise OSError(errno.ENOSPC, "cache is full", str(self.directory))

    def _excess(self, used: int, length: int) -> int:
        excess = used + length - self._quota if self._quota else 0
        if self._min_free:
            status = os.statvfs(self.directory)
            floor = min(self._min_free, status.f_blocks * status.f_frsize // _FREE_SHARE)
            excess = max(excess, floor + length - status.f_bavail * status.f_frsize)
        return excess

    @contextmanager
    def _locked(self, wait_s: float) -> Iterator[_Ledger]:
        deadline = time.monotonic() + wait_s
        if not self._lock.acquire(timeout=wait_s):
            raise self._locked_too_long()
        try:
            fd = self._lock_file(deadline)
            try:
                yield _Ledger(fd, self.directory)
            finally:
                os.close(fd)
        finally:
            self._lock.release()

    def _lock_file(self, deadline: float) -> int:
        # A descriptor of its own for each use, so that it excludes everybody, and nothing stays open.
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.directory / "usage"
        pause_s = 0.0001
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise self._locked_too_long() from None
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, 0.005)
                    continue
                if os.fstat(fd).st_nlink:
                    return fd
                # The cache was deleted by hand, and this is the lock of nothing.
                os.close(fd)
                fd = -1
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise

    def _locked_too_long(self) -> OSError:
        return TimeoutError(errno.ETIMEDOUT, "cache is locked by another process", str(self.directory / "usage"))


class _Ledger:
    # The file's content, while it is locked.
    def __init__(self, fd: int, directory: Path) -> None:
        self._fd = fd
        content = os.pread(fd, _LEDGER.size, 0)
        if len(content) == _LEDGER.size:
            magic, boot, self.used = _LEDGER.unpack(content)
            if magic == _MAGIC and boot == _boot_id() and self.used >= 0:
                return
        os.pwrite(fd, bytes(_LEDGER.size), 0)  # so that its own block counts, too
        self.set(disk_usage(directory))

    def set(self, used: int) -> None:
        self.used = used
        os.pwrite(self._fd, _LEDGER.pack(_MAGIC, _boot_id(), used), 0)


def disk_usage(directory: Path | str) -> int:
    """Return the bytes on disk of everything below ``directory`` and of itself, by the files' block counts."""
    total = 512 * os.lstat(directory).st_blocks
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    total += disk_usage(entry.path)
                else:
                    total += 512 * entry.stat(follow_symlinks=False).st_blocks
            except FileNotFoundError:
                pass  # deleted by hand, meanwhile
    return total


_boot: bytes | None = None


def _boot_id() -> bytes:
    global _boot
    if _boot is None:
        try:
            text = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
        except OSError:
            text = b"unknown"
        _boot = text[:40].ljust(40, b"\0")
    return _boot
