"""The open pair of files with the cached units of one blob, shared by every process that has them open.

Their layout: :mod:`obdlab.cache.layout`. Nothing is mapped: if another process truncates or removes a file
under a running device, the device only loses its caching. Three locks:

* Storing, making, evicting and removing hold the lock of the whole cache (:mod:`obdlab.cache.space`).
* A process that has a blob open holds a shared lock on its ``sums``, so that its files are not removed.
* A process that fetches units holds a lock on their range of ``data``, so that others wait instead of fetching the
  same. The kernel releases it when the process dies.

The generation changes whenever sums are dropped. The eviction drops a unit's sums before its space, so that a reader
that got zeros from a hole finds no sum for them when it checks again.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import struct
import threading
import time
from array import array
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import numpy as np

from obdlab.cache.layout import (
    GENERATION_AT,
    HAND_AT,
    HEADER_SIZE,
    LAST_USE_AT,
    PAGE,
    Header,
    close_all,
    generation_bytes,
    new_pair,
    open_pair,
    pages_of,
    sums_size,
    unit_sums,
    used_at,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from obdlab.cache.space import CacheSpace

logger = logging.getLogger(__name__)

# struct flock (fcntl.h) with 64-bit offsets; l_pid is 0 for locks of an open file.
_FLOCK = struct.Struct("=hh4xqqi4x")

_PUNCH_HOLE_KEEP_SIZE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, linux/falloc.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class CacheFiles:
    """The open pair, made by :meth:`open`, :meth:`attach` or :meth:`absent`. Safe between threads and processes."""

    def __init__(self, directory: Path, fd: int, sums_fd: int, header: Header) -> None:
        self.directory = directory
        self.unit = header.unit
        self.size = header.size
        self.units = -(-self.size // self.unit)
        self.fd = fd
        #: True if there are files, open for storing.
        self.attached = True
        #: True if there are files that can only be read: on a read-only file system, or another user's.
        self.read_only = False
        self._sums_fd = sums_fd
        self._pages = pages_of(self.size)
        self._unit_pages = self.unit // PAGE
        self._used_at = used_at(self.size)
        self._header_lock = threading.Lock()

    @classmethod
    def absent(cls, directory: Path, size: int, unit: int) -> Self:
        """Return a pair without files, which holds and keeps nothing, until :meth:`replace`."""
        fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        files = cls(directory, fd, os.dup(fd), Header.new(size, unit))
        files.attached = False
        return files

    @classmethod
    def open(cls, space: CacheSpace, directory: Path, size: int, unit: int) -> Self:
        """Open the files of a blob of ``size`` bytes, making them if necessary; existing ones keep their unit.

        Raises OSError if they cannot be made, other users can change the cache's directory, the cache is full or
        stays locked by others, or others use the blob with another size or have stored parts of it with another size.
        """
        space.check_owner()
        files = cls._open_existing(directory, size)
        if files is None:
            with space.changing(directory, sums_size(size, unit) + (32 << 10)):
                files = cls._open_existing(directory, size)
                if files is None:
                    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                    files = cls._use(directory, new_pair(directory, size, unit))
        files.stamp()
        return files

    @classmethod
    def open_read_only(cls, directory: Path, size: int) -> Self | None:
        """Open the files of a blob for reading only; None if they are missing or cannot be opened."""
        try:
            pair = open_pair(directory, os.O_RDONLY)
            files = None if pair is None else cls._use(directory, pair)
        except OSError:
            return None
        if files is None:
            return None
        files.attached, files.read_only = False, True
        if files.size == size and files.current_header() is not None:
            return files
        files.close()
        return None

    @classmethod
    def _open_existing(cls, directory: Path, size: int) -> Self | None:
        # Returns None if there is no such pair, or it is being removed. Needs only the lock on sums.
        pair = open_pair(directory)
        if pair is None:
            if (directory / "sums").exists():
                logger.warning("%s: its files are not those of a cached blob, and are made again", directory)
            return None
        try:
            files = cls._use(directory, pair)
        except BlockingIOError:
            return None
        if files.size == size and files.current_header() is not None:
            if os.fstat(files.fd).st_size < size:  # was truncated
                os.ftruncate(files.fd, size)
            return files
        # Only a registry's answers are stored, and those must be of a blob of that size. The size wanted here has
        # only a label's word so far.
        kept = files.size != size and (files.header.verified or files.in_use or files.holds_any)
        found = files.size
        files.close()
        if kept:
            what = f"blob is cached with another size (got {size} bytes, wanted {found})"
            raise OSError(errno.EBUSY, what, str(directory))
        return None

    @classmethod
    def _use(cls, directory: Path, pair: tuple[int, int]) -> Self:
        # Owns both descriptors, also if it raises.
        try:
            fcntl.flock(pair[1], fcntl.LOCK_SH | fcntl.LOCK_NB)
            return cls._made(directory, pair)
        except BaseException:
            close_all(pair)
            raise

    @classmethod
    def _made(cls, directory: Path, pair: tuple[int, int]) -> Self:
        header = Header.from_bytes(os.pread(pair[1], HEADER_SIZE, 0))
        if header is None:
            raise OSError(errno.ESTALE, "cache file was changed by others", str(directory))
        return cls(directory, *pair, header)

    @classmethod
    def attach(cls, directory: Path) -> Self | None:
        """Open an existing pair without using it; None if there is no sound one. Needs the lock of the cache."""
        pair = open_pair(directory)
        if pair is None:
            return None
        try:
            return cls._made(directory, pair)
        except BaseException:
            close_all(pair)
            raise

    def replace(self, other: CacheFiles) -> None:
        """Replace the open files by those of ``other``, keeping the descriptors' numbers; same size and unit."""
        self.attached = False
        for mine, new in ((self.fd, other.fd), (self._sums_fd, other._sums_fd)):
            os.dup2(new, mine, inheritable=False)
        self.attached, self.read_only = other.attached, other.read_only
        other.close()

    # -- reading -----------------------------------------------------------------------------------------------------

    @property
    def header(self) -> Header:
        """Read the header. Returns an empty one if it is damaged."""
        found = Header.from_bytes(self._pread(self._sums_fd, HEADER_SIZE, 0))
        return found if found is not None else Header.new(self.size, self.unit)

    def current_header(self) -> Header | None:
        """Read the header; None if one of the files has been unlinked, or it is of another blob or unit."""
        found = Header.from_bytes(self._pread(self._sums_fd, HEADER_SIZE, 0))
        if found is None or (found.size, found.unit) != (self.size, self.unit):
            return None
        linked = os.fstat(self.fd).st_nlink and os.fstat(self._sums_fd).st_nlink
        return found if linked else None

    @property
    def in_use(self) -> bool:
        """True if the blob is open elsewhere, too. Needs the lock of the cache.

        If it is False, the blob cannot be opened elsewhere until this object is closed.
        """
        try:
            fcntl.flock(self._sums_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False

    def length_of(self, first: int, stop: int) -> int:
        """Return the number of bytes in the units ``[first, stop)``; the blob's last unit may be short."""
        return min(stop * self.unit, self.size) - first * self.unit

    def sums(self, first: int, stop: int) -> memoryview:
        """Return the values of the units' pages; 0 for pages that are not cached."""
        begin, end = first * self._unit_pages, min(stop * self._unit_pages, self._pages)
        length = 4 * (end - begin)
        try:
            raw = os.pread(self._sums_fd, length, HEADER_SIZE + 4 * begin)
        except OSError as error:
            raw = self._not_read(error)
        if len(raw) < length:
            raw = raw.ljust(length, b"\0")
        return memoryview(raw).cast("I")

    def present(self, first: int, stop: int) -> list[bool]:
        """Return for each unit True if it is cached."""
        sums = self.sums(first, stop)
        step = self._unit_pages
        last = sums[step - 1 :: step].tolist()  # of each whole unit
        if len(sums) % step:
            last.append(sums[-1])
        return list(map(bool, last))

    def cached_units(self) -> int:
        """Return the number of cached units."""
        return int(np.count_nonzero(self._presence()))

    @property
    def holds_any(self) -> bool:
        """True if any unit is cached."""
        return os.fstat(self.fd).st_blocks > 0 and self.cached_units() > 0

    def disk_bytes(self) -> int:
        """Return the bytes that both files take on disk."""
        return 512 * (os.fstat(self.fd).st_blocks + os.fstat(self._sums_fd).st_blocks)

    def load(self, first: int, stop: int) -> bytes:
        """Return the file's bytes of the units, unchecked; fewer if it was truncated or cannot be read."""
        return self._pread(self.fd, self.length_of(first, stop), first * self.unit)

    def _pread(self, fd: int, length: int, offset: int) -> bytes:
        try:
            return os.pread(fd, length, offset)
        except OSError as error:
            return self._not_read(error)

    def _not_read(self, error: OSError) -> bytes:
        logger.warning("%s: cannot read what is cached: %s", self.directory, error.strerror)
        return b""

    # -- fetching, storing, dropping ---------------------------------------------------------------------------------

    def claim(self, first: int, stop: int) -> int | None:
        """Claim the units for a fetch by this object's owner. Returns None, or the first unit claimed elsewhere.

        A failed claim leaves nothing claimed.
        """
        if not self.attached:
            return None
        start, length = first * self.unit, (stop - first) * self.unit
        for command in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK):
            lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
            try:
                answer = fcntl.fcntl(self.fd, command, lock)
            except BlockingIOError:
                continue
            except OSError as error:  # a file system without locks: each process fetches by itself
                logger.debug("%s: no lock: %s", self.directory, error.strerror)
                return None
            if command == fcntl.F_OFD_SETLK:
                return None
        kind, _, taken, _, _ = _FLOCK.unpack(answer)
        return first if kind == fcntl.F_UNLCK else max(first, taken // self.unit)

    def unclaim(self, first: int, stop: int) -> None:
        """Release a :meth:`claim`."""
        if self.attached:
            lock = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, first * self.unit, (stop - first) * self.unit, 0)
            try:
                fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, lock)
            except OSError as error:
                logger.debug("%s: no lock: %s", self.directory, error.strerror)

    def store(self, space: CacheSpace, first: int, data: bytes) -> array[int]:
        """Write whole units, then their sums, which are returned.

        Raises OSError (cache or disk full, files removed); some units may be stored then.
        """
        view = memoryview(data)
        units: list[array[int]] = []
        for start in range(0, len(view), self.unit):
            units.append(unit_sums(view[start : start + self.unit]))  # noqa: PERF401 - a call less in 3.11
        sums = array("I", b"".join(units))
        stop = first + len(units)
        with space.room(self.fd, len(view)):
            header = self.current_header()
            if header is None:
                raise OSError(errno.ESTALE, "cache file was changed by others", str(self.directory))
            if header.verified:  # and complete: these units came another way, or too late
                return sums
            there = self.sums(first, stop)
            if there != memoryview(sums):
                if any(there):
                    self._drop_others(first, there, units)
                raw, at = memoryview(sums).cast("B"), HEADER_SIZE + 4 * first * self._unit_pages
                for fd, part, offset in ((self.fd, view, first * self.unit), (self._sums_fd, raw, at)):
                    done = os.pwrite(fd, part, offset)
                    if done < len(part):  # a call less for each store in the usual case
                        _pwrite_all(fd, part[done:], offset + done)
        return sums

    def _drop_others(self, first: int, there: memoryview, units: list[array[int]]) -> None:
        # Units cached with other content may be read by others while they are overwritten, so drop them first.
        step = self._unit_pages
        changed = [
            first + number
            for number, mine in enumerate(units)
            if (old := there[number * step : number * step + len(mine)])[-1] and old != memoryview(mine)
        ]
        if changed:
            self._take_away([(unit, unit + 1) for unit in changed])

    def touch(self, first: int, stop: int) -> None:
        """Note that the units were read."""
        if self.read_only:
            return
        try:
            os.pwrite(self._sums_fd, b"\1" * (stop - first), self._used_at + first)
        except OSError as error:
            self._not_noted(error)

    def stamp(self) -> None:
        """Note that the blob is being read."""
        if self.read_only:
            return
        try:
            os.pwrite(self._sums_fd, struct.pack("=d", time.time()), LAST_USE_AT)
        except OSError as error:
            self._not_noted(error)

    def _not_noted(self, error: OSError) -> None:
        # Only a hint for the eviction.
        logger.debug("%s: cannot note the use: %s", self.directory, error.strerror)

    def drop(self, first: int, stop: int) -> None:
        """Drop the units' sums."""
        self._take_away([(first, stop)])

    def mark_verified(self, generation: int) -> bool:
        """Note that the blob matches its digest, unless sums were dropped since ``generation``."""
        with self._locked():
            if self.read_only or self.header.generation != generation or self.current_header() is None:
                return False
            if self.cached_units() < self.units:  # files made meanwhile, which begin with the same generation
                return False
            os.pwrite(self._sums_fd, generation_bytes(generation, verified=True), GENERATION_AT)
            return True

    # -- evicting; all of it under the lock of the cache -------------------------------------------------------------

    def sweep(self, wanted: int, *, spare_used: bool = True) -> int:
        """Evict up to about ``wanted`` bytes of units; return the evicted bytes of units.

        A clock hand goes on from its last position, one round at most. Units that were read since its last pass are
        spared this time, and evicted the next time unless they were read again. Raises OSError.
        """
        taken, found = self._choose(-(-wanted // self.unit), spare_used)
        if len(taken):
            runs = [
                (int(run[0]), int(run[-1]) + 1) for run in np.split(taken, np.flatnonzero(np.diff(taken) != 1) + 1)
            ]
            # Also units without a sum: a killed process may have left their data.
            self._take_away(runs)
            for run in runs:
                self.punch(*run)
        return found * self.unit

    def punch(self, first: int, stop: int) -> None:
        """Free the disk space of dropped units. Raises OSError."""
        if _libc.fallocate(self.fd, _PUNCH_HOLE_KEEP_SIZE, first * self.unit, (stop - first) * self.unit):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self.directory / "data"))

    def close(self) -> None:
        """Close both files. Not while another thread uses the object."""
        self.attached = False
        # The numbers first: a late caller must not use one that is another file's by then.
        pair = self.fd, self._sums_fd
        self.fd = self._sums_fd = -1
        close_all(pair)

    def _presence(self) -> npt.NDArray[np.bool_]:
        sums = np.frombuffer(self.sums(0, self.units), np.uint32)
        ends = np.minimum(np.arange(1, self.units + 1) * self._unit_pages, self._pages) - 1
        present: npt.NDArray[np.bool_] = sums[ends] != 0
        return present

    def _choose(self, enough: int, spare_used: bool) -> tuple[npt.NDArray[np.int64], int]:
        # Returns the units that the hand takes, sorted, and how many of them are cached. The others have no sum; a
        # killed process may have left their data.
        header = self.header
        raw = self._pread(self._sums_fd, self.units, self._used_at).ljust(self.units, b"\0")
        used = np.frombuffer(raw, np.uint8).copy()
        hand = header.hand % self.units
        order = np.roll(np.arange(self.units), -hand)
        present = self._presence()[order]
        kept = present & (used[order] != 0) if spare_used else np.zeros(self.units, bool)
        found = np.cumsum(present & ~kept)
        stop = min(int(np.searchsorted(found, enough)) + 1, self.units)
        order, kept = order[:stop], kept[:stop]
        used[order] = 0
        os.pwrite(self._sums_fd, used.tobytes(), self._used_at)
        # Readers check this count, and note again what they read.
        hand, sweeps = (hand + stop) % self.units, (header.sweeps + 1) & 0xFFFFFFFF
        os.pwrite(self._sums_fd, struct.pack("=II", hand, sweeps), HAND_AT)
        return np.sort(order[~kept]), int(found[stop - 1])

    def _take_away(self, runs: list[tuple[int, int]]) -> None:
        with self._locked():
            generation = self.header.generation
            os.pwrite(self._sums_fd, generation_bytes(generation + 1, verified=False), GENERATION_AT)
            for first, stop in runs:
                begin, end = first * self._unit_pages, min(stop * self._unit_pages, self._pages)
                _pwrite_all(self._sums_fd, memoryview(bytes(4 * (end - begin))), HEADER_SIZE + 4 * begin)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # Between threads and then between processes, as threads share the lock of one open file; held for
        # microseconds only.
        with self._header_lock:
            if not self.attached:
                yield
                return
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self.fd, fcntl.LOCK_UN)


def _pwrite_all(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
