"""The two files that hold what is cached of one blob, shared by every process that has them open.

``data`` is sparse and at least as large as the blob: what is cached stands where it stands in the blob. ``sums`` says
which units of it may be used: a header of 64 bytes, then a u32 per unit in this machine's byte order (0, or the
unit's checksum, which is written after its data), then a byte per unit (1: read since the eviction last came by).
So whatever was interrupted, a unit either has its data or does not match its sum and is fetched again. Nothing is
synced: after a power failure, too, the sums tell.

Every process maps ``sums``. The generation changes whenever sums were taken away, which tells the others to check
again what they have checked before. Space is given back only after that, so that a reader who got zeros from a hole
knows it. Who stores, makes or removes holds the lock of the whole cache (:mod:`obdlab.sources.cachespace`); who has a
blob open holds a shared lock on its ``sums``, so that its files are not removed under it.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import struct
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import numpy as np

from obdlab.formats.checksum import raw_crc32c

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from obdlab.blob import Buffer
    from obdlab.sources.cachespace import CacheSpace

logger = logging.getLogger(__name__)

# Magic, version, unit size, blob size; then the generation (u32), the mark of a verified blob (u32), the time of the
# last use (double, seconds since 1970), and where the eviction goes on (u32).
_HEADER = struct.Struct("=8sIIQ")
_MAGIC = b"OBDLCACH"
_VERSION = 2
_HEADER_SIZE = 64
_GENERATION = 6  # index of the word
_VERIFIED = 7
_LAST_USE = 4  # index of the double
_HAND = 10
_VERIFIED_MARK = 0x56524659
_FUTURE = float(1 << 33)  # a time of last use that is no time
# A checksum of 0 would read as "absent"; this one stands in for it. Any seed but 0 sees zeros, too.
_SEED = 100007
_ZERO_SUM = 0xFFFFFFFF

_PUNCH_HOLE_KEEP_SIZE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, linux/falloc.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def unit_sum(data: Buffer) -> int:
    """Return what ``sums`` holds for a unit with this content; never 0."""
    return raw_crc32c(data, _SEED) or _ZERO_SUM


class CacheFiles:
    """The open pair of files, made by :meth:`open` and :meth:`attach`.

    ``sums[unit]`` and ``used[unit]`` may be read by anyone; methods are safe between processes.
    """

    def __init__(self, directory: Path, fd: int, sums_fd: int) -> None:
        # Takes over both descriptors, unless it raises.
        header = os.pread(sums_fd, _HEADER_SIZE, 0)
        self.unit: int
        self.size: int
        _, _, self.unit, self.size = _HEADER.unpack_from(header)
        self.directory = directory
        self.units = -(-self.size // self.unit)
        self.fd = fd
        self._sums_fd = sums_fd
        self._map = mmap.mmap(sums_fd, _sums_size(self.units))
        self._words = memoryview(self._map).cast("I")
        self._times = memoryview(self._map).cast("d")
        self._used_start = _HEADER_SIZE + 4 * self.units
        self.sums = self._words[_HEADER_SIZE // 4 : self._used_start // 4]
        # One byte more than there are units: an empty read at the end asks for it.
        self.used = memoryview(self._map)[self._used_start :]

    @classmethod
    def open(cls, space: CacheSpace, directory: Path, size: int, unit: int) -> Self:
        """Open the files of a blob of ``size`` bytes, made anew if need be.

        Raises OSError if they cannot be made, the cache is full, or it stays locked by others.
        """
        files = cls._open_existing(directory, size, unit)
        if files is None:
            with space.growing(directory, _sums_size(-(-size // unit)) + (32 << 10)):
                files = cls._open_existing(directory, size, unit)
                if files is None:
                    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                    files = cls._use(directory, _new_pair(directory, size, unit), size)
        files.stamp()
        return files

    @classmethod
    def _open_existing(cls, directory: Path, size: int, unit: int) -> Self | None:
        # None: there is no such pair, or it is just being removed. Needs no lock but the one on sums.
        pair = _open_pair(directory, _HEADER.pack(_MAGIC, _VERSION, unit, size))
        if pair is None:
            return None
        try:
            files = cls._use(directory, pair, size)
        except BlockingIOError:
            return None
        if not files.is_deleted:
            return files
        files.close()
        return None

    @classmethod
    def _use(cls, directory: Path, pair: tuple[int, int], size: int) -> Self:
        # Takes over both descriptors, also if it raises.
        try:
            fcntl.flock(pair[1], fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.fstat(pair[0]).st_size < size:  # was cut
                os.ftruncate(pair[0], size)
            return cls(directory, *pair)
        except BaseException:
            _close_both(pair)
            raise

    @classmethod
    def attach(cls, directory: Path) -> Self | None:
        """Open an existing pair without using it; None if there is no sound one. Under the lock of the cache."""
        pair = _open_pair(directory, None)
        if pair is None:
            return None
        try:
            return cls(directory, *pair)
        except BaseException:
            _close_both(pair)
            raise

    @property
    def generation(self) -> int:
        """Changes when any process took sums away."""
        return self._words[_GENERATION]

    @property
    def verified(self) -> bool:
        """Whether the blob was complete and matched its digest, and nothing was taken away since."""
        return bool(self._words[_VERIFIED] == _VERIFIED_MARK)

    @property
    def is_deleted(self) -> bool:
        """Whether one of the files has no name any more."""
        return not all(os.fstat(fd).st_nlink for fd in (self.fd, self._sums_fd))

    @property
    def last_use(self) -> float:
        """Seconds since 1970; 0 if damaged."""
        value = self._times[_LAST_USE]
        return value if 0 <= value < _FUTURE else 0.0

    @property
    def in_use(self) -> bool:
        """Whether any process has the blob open; for pairs that were attached, under the lock of the cache.

        If not, nobody can begin to use it until this object is closed.
        """
        try:
            fcntl.flock(self._sums_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False

    def length_of(self, first: int, stop: int) -> int:
        """Return how many bytes the units ``[first, stop)`` have; the blob's last unit may be short."""
        return min(stop * self.unit, self.size) - first * self.unit

    def cached_units(self) -> int:
        """Return how many units are there."""
        return int(np.count_nonzero(np.frombuffer(self._map, np.uint32, self.units, _HEADER_SIZE)))

    def disk_bytes(self) -> int:
        """Return what both files take on disk."""
        return 512 * (os.fstat(self.fd).st_blocks + os.fstat(self._sums_fd).st_blocks)

    def touch(self, first: int, stop: int) -> None:
        """Note that the units were read."""
        self.used[first:stop] = b"\1" * (stop - first)

    def stamp(self) -> None:
        """Note that the blob is being read."""
        self._times[_LAST_USE] = time.time()

    def load(self, first: int, stop: int) -> bytes:
        """Return what the file holds for the units, unchecked; fewer bytes if it was cut short or cannot be read."""
        try:
            return os.pread(self.fd, self.length_of(first, stop), first * self.unit)
        except OSError as error:
            logger.warning("%s: cannot read cached data: %s", self.directory, error.strerror)
            return b""

    def store(self, space: CacheSpace, first: int, data: bytes) -> None:
        """Write whole units, then their sums. Raises OSError (cache or disk full): some units may be stored then."""
        view = memoryview(data)
        sums = [unit_sum(view[start : start + self.unit]) for start in range(0, len(view), self.unit)]
        offset = first * self.unit
        done = 0
        with space.room(self.fd, len(view)):
            if self.verified:  # and complete: this came by another way, or too late
                return
            changed = [unit for unit, value in enumerate(sums, first) if self.sums[unit] not in (0, value)]
            if changed:  # others may read these while they are overwritten
                self._take_away(np.array(changed))
            while done < len(view):
                done += os.pwrite(self.fd, view[done:], offset + done)
            for number, value in enumerate(sums, first):
                self.sums[number] = value
        self.touch(first, first + len(sums))
        self.stamp()

    def drop(self, first: int, stop: int) -> None:
        """Take the units' sums away and tell all processes."""
        self._take_away(np.arange(first, stop))

    def mark_verified(self, generation: int) -> bool:
        """Note that the blob matches its digest, unless sums were taken away since ``generation``."""
        with self._locked():
            if self.generation != generation:
                return False
            self._words[_VERIFIED] = _VERIFIED_MARK
            return True

    def reclaim(self, wanted: int) -> int:
        """Give back the space of units with ``wanted`` bytes together, or of all; return how much it was.

        Those not read since the last time go first, round and round (the CLOCK algorithm). Under the lock of the
        cache. Raises OSError.
        """
        before = self.disk_bytes()
        enough = -(-wanted // self.unit)
        for _ in range(2):
            enough -= self._sweep(enough)
            if enough <= 0:
                break
        return before - self.disk_bytes()

    def punch(self, first: int, stop: int) -> None:
        """Give back the space of units that were dropped. Under the lock of the cache. Raises OSError."""
        if _libc.fallocate(self.fd, _PUNCH_HOLE_KEEP_SIZE, first * self.unit, (stop - first) * self.unit):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self.directory / "data"))

    def close(self) -> None:
        """Unmap and close. Not while another thread uses the object."""
        for view in (self.sums, self.used, self._times, self._words):
            view.release()
        self._map.close()
        _close_both((self.fd, self._sums_fd))
        self.fd = self._sums_fd = -1

    def _sweep(self, enough: int) -> int:
        # Gives back at most ``enough`` units that nobody read since the last sweep, and returns how many.
        taken, found = self._choose(enough)
        if len(taken):
            # Also if none had a sum: whoever was killed between taking it away and saying so left others believing.
            self._take_away(taken)
            for run in np.split(taken, np.flatnonzero(np.diff(taken) != 1) + 1):
                self.punch(int(run[0]), int(run[-1]) + 1)
        return found

    def _choose(self, enough: int) -> tuple[npt.NDArray[np.int64], int]:
        # Returns the units that the hand takes, sorted, and how many of them are cached. The others have no sum;
        # a killed process may have left their data.
        sums = np.frombuffer(self._map, np.uint32, self.units, _HEADER_SIZE)
        used = np.frombuffer(self._map, np.uint8, self.units, self._used_start)
        hand = self._words[_HAND] % self.units
        order = np.roll(np.arange(self.units), -hand)
        present = sums[order] != 0
        kept = present & (used[order] != 0)
        found = np.cumsum(present & ~kept)
        stop = min(int(np.searchsorted(found, enough)) + 1, self.units)
        order, kept = order[:stop], kept[:stop]
        used[order] = 0
        self._words[_HAND] = (hand + stop) % self.units
        return np.sort(order[~kept]), int(found[stop - 1])

    def _take_away(self, numbers: npt.NDArray[np.int64]) -> None:
        with self._locked():
            self._words[_VERIFIED] = 0
            np.frombuffer(self._map, np.uint32, self.units, _HEADER_SIZE)[numbers] = 0
            self._words[_GENERATION] = (self._words[_GENERATION] + 1) & 0xFFFFFFFF

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # Between processes, and held for microseconds only.
        fcntl.flock(self.fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.fd, fcntl.LOCK_UN)


def last_use(directory: Path) -> float:
    """Return when the blob in ``directory`` was last read (seconds since 1970); 0 if that is not known."""
    try:
        with (directory / "sums").open("rb") as file:
            (value,) = struct.unpack_from("=d", file.read(_HEADER_SIZE), 8 * _LAST_USE)
    except (OSError, struct.error):
        return 0.0
    return float(value) if 0 <= value < _FUTURE else 0.0


def remove_blob(directory: Path) -> int:
    """Delete a blob's files and directory; return what they took on disk. Under the lock of the cache.

    Who has them open goes on with the deleted files, in which nothing is stored any more.
    """
    freed = 0
    names = sorted(os.listdir(directory), reverse=True)  # sums before data: no sums, no data
    for name in names:
        freed += 512 * (directory / name).lstat().st_blocks
        (directory / name).unlink()
    directory.rmdir()
    try:
        directory.parent.rmdir()
    except OSError:
        pass  # there are others
    return freed


def _sums_size(units: int) -> int:
    size = _HEADER_SIZE + 4 * units + units + 1
    return size + -size % 8


def _open_pair(directory: Path, header: bytes | None) -> tuple[int, int] | None:
    # ``header`` is what sums must begin with; None: with whatever is sound.
    descriptors: list[int] = []
    try:
        for name in ("data", "sums"):
            descriptors.append(os.open(directory / name, os.O_RDWR | os.O_CLOEXEC))  # noqa: PERF401 - kept on errors
        found = os.pread(descriptors[1], _HEADER.size, 0)
        if _is_sound(found, os.fstat(descriptors[1]).st_size) and header in (None, found):
            return descriptors[0], descriptors[1]
        if header is not None:
            logger.warning("%s: sums are not for this size and unit, starting anew", directory)
    except FileNotFoundError:
        pass
    except BaseException:
        _close_both(descriptors)
        raise
    _close_both(descriptors)
    return None


def _is_sound(header: bytes, size: int) -> bool:
    if len(header) < _HEADER.size:
        return False
    magic, version, unit, blob_size = _HEADER.unpack(header)
    return (
        (magic, version) == (_MAGIC, _VERSION)
        and unit >= 4096
        and unit & (unit - 1) == 0
        and blob_size > 0
        and size == _sums_size(-(-blob_size // unit))
    )


def _new_pair(directory: Path, size: int, unit: int) -> tuple[int, int]:
    # Others may have the old files open, so they are replaced, not changed. At every moment what has the name
    # ``sums`` belongs to what has the name ``data``.
    (directory / "sums").unlink(missing_ok=True)
    descriptors: list[int] = []
    try:
        for name, length in (("data", 0), ("sums", _sums_size(-(-size // unit)))):
            fd, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
            descriptors.append(fd)
            try:
                if length:
                    # A hole in a mapped file on a full disk would be a SIGBUS at the first write.
                    os.posix_fallocate(fd, 0, length)
                    os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, unit, size), 0)
                else:
                    os.ftruncate(fd, size)
                os.rename(temporary, directory / name)
            except BaseException:
                os.unlink(temporary)
                raise
    except BaseException:
        _close_both(descriptors)
        raise
    return descriptors[0], descriptors[1]


def _close_both(descriptors: tuple[int, ...] | list[int]) -> None:
    for fd in descriptors:
        os.close(fd)
