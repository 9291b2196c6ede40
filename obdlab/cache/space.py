"""The cache directory as a whole: its lock, its size on disk, and its limits.

``<directory>/usage`` is the lock (flock) for making, storing, evicting and removing, and has the sum of all disk
blocks below the directory. The sum is raised before a write and corrected right after it, so a killed process leaves
it too large, never too small. It is counted again from the files' block counts after a reboot, and when an eviction
cannot bring it down.

A store without room stores nothing. A store that finds the directory above its high mark calls ``start_eviction``
(:mod:`obdlab.cache.eviction`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.system.boot import boot_id
from obdlab.system.keptfree import kept_free
from obdlab.system.locks import lock_until
from obdlab.system.ownfiles import check_own_directory, open_own

if TYPE_CHECKING:
    from collections.abc import Iterator

_LEDGER = struct.Struct("=8s40sq")  # magic, boot id, bytes
_MAGIC = b"OBDLUSED"
_BLOCK = 4096
# A store must not wait long: a reader may wait for it. Nor must opening: it is tried again later.
_WAIT_TO_STORE_S = 0.25
_WAIT_TO_OPEN_S = 1.0
_WAIT_TO_EVICT_S = 10.0
# The high mark lies one spare below the limit, the low mark two: room for stores while others evict.
_SPARE_SHARE = 16
_FREE_SPARE_SHARE = 4
# Space that the file system allocates when it writes files back, after their blocks were counted: ext4 takes a block
# per 340 extents, of one unit each at worst.
_FILE_SYSTEM_SHARE = 256


class CacheFullError(OSError):
    """The cache is full, until the eviction has freed space."""


class CacheSpace:
    """The shared state of all blobs of one cache directory. The constructor does no I/O; it holds nothing open.

    The directory takes at most ``quota`` bytes on disk (0: no limit), and the cache evicts rather than leave less
    than ``min_free`` bytes (at most a 16th of it) free on the file system.
    """

    def __init__(self, directory: Path | str, *, quota: int = 0, min_free: int = 0) -> None:
        self.directory = Path(directory)
        self.blobs = self.directory / "blobs"
        self._usage = self.directory / "usage"
        #: True once the log says that this process may not write here.
        self.refusal_said = False
        self._quota = quota
        self._min_free = min_free
        self._lock = threading.Lock()  # threads queue here instead of polling for the file's lock
        #: Bytes for which a store found no room.
        self._wanted = 0

    def check_owner(self) -> None:
        """Raise OSError if other users can change the directory: its entries could be links, or theirs.

        The first store makes a missing directory.
        """
        with suppress(FileNotFoundError):
            check_own_directory(self.directory)

    @contextmanager
    def room(self, fd: int, length: int) -> Iterator[None]:
        """Hold the lock with room for ``length`` more bytes in the file ``fd``.

        Raises CacheFullError if there is no room, OSError if the file was deleted (ESTALE) or stays locked.
        """
        with self._locked(_WAIT_TO_STORE_S) as ledger:
            wanted = self._check_room(ledger, length)
            before = os.fstat(fd)
            if before.st_nlink == 0:
                raise OSError(errno.ESTALE, "cache file was deleted", str(self.directory))
            used = ledger.used
            ledger.set(used + wanted)
            try:
                yield
            finally:
                ledger.set(used + 512 * (os.fstat(fd).st_blocks - before.st_blocks))
                full = self._excess(ledger.used, 1) > 0
        if full:
            self.start_eviction()

    @contextmanager
    def changing(self, directory: Path, length: int = 0, *, patient: bool = False) -> Iterator[None]:
        """Hold the lock to make, replace or remove files of the blob in ``directory``, with room for ``length`` more.

        Raises OSError as :meth:`room`; ``patient`` waits longer for the lock.
        """
        with self._locked(_WAIT_TO_EVICT_S if patient else _WAIT_TO_OPEN_S) as ledger:
            if length:
                self._check_room(ledger, length)
            before = self._usage_of(directory)
            used = ledger.used
            ledger.set(used + _rounded(length))
            try:
                yield
            finally:
                ledger.set(max(0, used + self._usage_of(directory) - before))

    def count(self) -> int:
        """Count the directory's bytes on disk again, and return them. Raises OSError."""
        with self._locked(_WAIT_TO_EVICT_S) as ledger:
            ledger.set(disk_usage(self.directory))
            return ledger.used

    def excess(self) -> int:
        """Return the bytes to evict down to the low mark; 0 or less if the directory is below it.

        Raises OSError.
        """
        with self._locked(_WAIT_TO_EVICT_S) as ledger:
            return self._excess(ledger.used + self._wanted, 2)

    def make_room(self, wanted: int) -> int:
        """Return the bytes that may be stored. Raises OSError.

        :class:`obdlab.cache.eviction.EvictingSpace` evicts until that is ``wanted``.
        """
        del wanted
        return max(0, -self.excess())

    def start_eviction(self, wanted: int = 0) -> None:
        """Do nothing: :class:`obdlab.cache.eviction.EvictingSpace` makes room for ``wanted`` bytes here."""

    def _usage_of(self, directory: Path) -> int:
        # Includes the parent directories, which may be new.
        total = disk_usage(directory) if directory.exists() else 0
        while (directory := directory.parent) != self.directory:
            total += 512 * directory.lstat().st_blocks if directory.exists() else 0
        return total

    def _check_room(self, ledger: _Ledger, length: int) -> int:
        # Returns the disk space that so many bytes may take.
        wanted = _rounded(length)
        if self._excess(ledger.used + wanted, 0) > 0:
            if not self._quota or wanted < self._quota - 2 * self._quota // _SPARE_SHARE:  # else it never fits
                self.start_eviction(wanted)
            raise CacheFullError(errno.ENOSPC, "cache is full", str(self.directory))
        return wanted

    def _excess(self, used: int, spares: int) -> int:
        # Returns the bytes above the limits, lowered by that number of spares.
        if not spares:
            used += used // _FILE_SYSTEM_SHARE + 2 * _BLOCK
        status = os.statvfs(self.directory)
        floor = kept_free(status.f_blocks * status.f_frsize, self._min_free)
        floor += spares * floor // _FREE_SPARE_SHARE
        excess = floor - status.f_bavail * status.f_frsize
        if not self._min_free:
            excess = min(0, excess)
        if self._quota:
            excess = max(excess, used - self._quota + spares * self._quota // _SPARE_SHARE)
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
        # Each use opens its own descriptor, so that it excludes all others, and nothing stays open.
        try:
            check_own_directory(self.directory)
        except FileNotFoundError:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            check_own_directory(self.directory)
        path = self._usage
        fd = open_own(path, os.O_RDWR | os.O_CREAT)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not lock_until(fd, deadline):
                        raise self._locked_too_long() from None
                if os.fstat(fd).st_nlink:
                    return fd
                # The cache was deleted by hand, and this lock file with it.
                os.close(fd)
                fd = -1
                fd = open_own(path, os.O_RDWR | os.O_CREAT)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise

    def _locked_too_long(self) -> OSError:
        return TimeoutError(errno.ETIMEDOUT, "cache is locked by another process", str(self._usage))


class _Ledger:
    # The content of the locked file.
    def __init__(self, fd: int, directory: Path) -> None:
        self._fd = fd
        self._boot = _boot_id()
        self.used: int
        content = os.pread(fd, _LEDGER.size, 0)
        if len(content) == _LEDGER.size:
            magic, boot, self.used = _LEDGER.unpack(content)
            if magic == _MAGIC and boot == self._boot and self.used >= 0:
                return
        os.pwrite(fd, bytes(_LEDGER.size), 0)  # so that its own block counts, too
        self.set(disk_usage(directory))

    def set(self, used: int) -> None:
        self.used = used
        os.pwrite(self._fd, _LEDGER.pack(_MAGIC, self._boot, used), 0)


def _rounded(length: int) -> int:
    # Upper bound of the disk space of so many bytes: whole blocks, and one of the file's extents.
    return length + -length % _BLOCK + _BLOCK if length else 0


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


def _boot_id() -> bytes:
    return boot_id().encode()[:40].ljust(40, b"\0")
