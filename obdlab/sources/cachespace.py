"""The cache directory as a whole: its lock, what it holds on disk, and how it is kept within its limits.

``<directory>/usage`` is the lock (flock) of everybody who makes, stores, gives back or removes, and holds the sum of
all disk blocks below the directory. The sum is raised before a write and set right after it, so a killed process
leaves it too large, never too small; it is counted anew from the files' block counts after a reboot, and when an
eviction cannot bring it down.

A store that finds no room stores nothing. Whoever finds the directory fuller than its high mark starts a thread that
gives back until it is below the low mark; the lock is held for one blob's part of that at a time, and only one
process does it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.observe import audit
from obdlab.ownfiles import check_own_directory, open_own
from obdlab.sources.eviction import evict

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_LEDGER = struct.Struct("=8s40sq")  # magic, boot id, bytes
_MAGIC = b"OBDLUSED"
_BLOCK = 4096
# Storing is worth no long wait: a reader may stand behind it. Nor is opening: it is tried again later.
_WAIT_TO_STORE_S = 0.25
_WAIT_TO_OPEN_S = 1.0
_WAIT_TO_EVICT_S = 10.0
# The high mark lies so much below the limit, the low mark twice as much: room for what comes while others evict.
_SPARE_SHARE = 16
_FREE_SPARE_SHARE = 4
# What the file system takes for itself when it writes files back, after their blocks were counted: ext4 a block for
# each 340 extents, of one unit each at worst.
_FILE_SYSTEM_SHARE = 256
# The free space kept on the file system is no more than this share of it.
_FREE_SHARE = 16
# An eviction that did not help is not tried again at once.
_REST_S = 1.0


class CacheFullError(OSError):
    """There is no room within the cache's limits, until the eviction has come by."""


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
        #: Whether the log says already that this process may not write here.
        self.refusal_said = False
        self._quota = quota
        self._min_free = min_free
        self._lock = threading.Lock()  # threads queue here, and do not poll for the file's lock
        self._evicting = threading.Lock()
        self._wanted = 0
        self._no_eviction_before = 0.0

    def check_owner(self) -> None:
        """Raise OSError if other users can change the directory: what is in it could be links, or theirs.

        A directory that is not there yet is made by the first store.
        """
        with suppress(FileNotFoundError):
            check_own_directory(self.directory)

    @contextmanager
    def room(self, fd: int, length: int) -> Iterator[None]:
        """Hold the lock with room for ``length`` more bytes in the file ``fd``.

        Raises CacheFullError if there is none, OSError if the file was deleted (ESTALE), or is locked too long.
        """
        with self._locked(_WAIT_TO_STORE_S) as ledger:
            self._check_room(ledger, length)
            before = os.fstat(fd)
            if before.st_nlink == 0:
                raise OSError(errno.ESTALE, "cache file was deleted", str(self.directory))
            used = ledger.used
            ledger.set(used + _rounded(length))
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

        Raises OSError as :meth:`room`; whoever is ``patient`` waits for the lock longer.
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
        """Count anew what the directory holds on disk, and return it. Raises OSError."""
        with self._locked(_WAIT_TO_EVICT_S) as ledger:
            ledger.set(disk_usage(self.directory))
            return ledger.used

    def excess(self) -> int:
        """Return how much more the directory holds than it should after an eviction; 0 or less if it is fine.

        Raises OSError.
        """
        with self._locked(_WAIT_TO_EVICT_S) as ledger:
            return self._excess(ledger.used + self._wanted, 2)

    def start_eviction(self, wanted: int = 0) -> None:
        """Have space given back by a thread, so that there is room for ``wanted`` bytes; returns at once.

        Nothing happens if one does it already, or nothing came of it a moment ago.
        """
        if time.monotonic() < self._no_eviction_before or not self._evicting.acquire(blocking=False):
            return
        self._wanted = wanted
        try:
            threading.Thread(target=self._evict, name="obdlab-evict", daemon=True).start()
        except RuntimeError:  # the system has no more threads: the next store tries again
            self._evicting.release()

    def wait_for_eviction(self, timeout_s: float) -> bool:
        """Wait until this object's eviction is over, if there is one; tell whether it is."""
        over = self._evicting.acquire(timeout=timeout_s)
        if over:
            self._evicting.release()
        return over

    def _evict(self) -> None:
        try:
            with self._sole_evictor() as mine:
                if mine:
                    freed = evict(self)
                    self.evicted_bytes += freed
                    logger.info("%s: gave back %d bytes", self.directory, freed)
                    if audit.enabled():
                        audit.record_values("eviction", actualEvict=freed, totalUsed=self.count())
                if not mine or not freed:
                    self._no_eviction_before = time.monotonic() + _REST_S
        except OSError as error:
            logger.warning("%s: eviction failed: %s", self.directory, error)
            self._no_eviction_before = time.monotonic() + _REST_S
        except Exception:
            logger.exception("%s: eviction failed unexpectedly", self.directory)
            self._no_eviction_before = time.monotonic() + _REST_S
        finally:
            self._evicting.release()

    @contextmanager
    def _sole_evictor(self) -> Iterator[bool]:
        # Between processes: two would take twice as much as is needed. Tells whether it is us.
        fd = os.open(self.blobs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = True
            except BlockingIOError:
                mine = False
            yield mine
        finally:
            os.close(fd)

    def _usage_of(self, directory: Path) -> int:
        # With the directories that lead to it, which may be new.
        total = disk_usage(directory) if directory.exists() else 0
        while (directory := directory.parent) != self.directory:
            total += 512 * directory.lstat().st_blocks if directory.exists() else 0
        return total

    def _check_room(self, ledger: _Ledger, length: int) -> None:
        wanted = _rounded(length)
        if self._excess(ledger.used + wanted, 0) > 0:
            if not self._quota or wanted < self._quota - 2 * self._quota // _SPARE_SHARE:  # else it never fits
                self.start_eviction(wanted)
            raise CacheFullError(errno.ENOSPC, "cache is full", str(self.directory))

    def _excess(self, used: int, spares: int) -> int:
        # By how much the limits, made stricter by so many spares, are exceeded.
        if not spares:
            used += used // _FILE_SYSTEM_SHARE + 2 * _BLOCK
        excess = used - self._quota + spares * self._quota // _SPARE_SHARE if self._quota else 0
        if self._min_free:
            status = os.statvfs(self.directory)
            floor = min(self._min_free, status.f_blocks * status.f_frsize // _FREE_SHARE)
            floor += spares * floor // _FREE_SPARE_SHARE
            excess = max(excess, floor - status.f_bavail * status.f_frsize)
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
        self.check_owner()
        path = self.directory / "usage"
        pause_s = 0.0001
        fd = open_own(path, os.O_RDWR | os.O_CREAT)
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
                fd = open_own(path, os.O_RDWR | os.O_CREAT)
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
        self.used: int
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


def _rounded(length: int) -> int:
    # What so many bytes may take on disk: whole blocks, and one of the file's extents.
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
