"""The two files that hold what is cached of one blob, shared by every process that has them open.

``data`` is sparse and at least as large as the blob: what is cached stands where it stands in the blob. ``sums`` says
which units of it may be used: a header of 64 bytes (magic, version, unit size, generation; the rest zero), then a u32
per unit in this machine's byte order: 0, or the unit's checksum, which is written after its data. So whatever was
interrupted, a unit either has its data or does not match its sum and is fetched again. Nothing is synced: after a
power failure, too, the sums tell.

Every process maps ``sums``. The generation changes whenever sums were taken away, which tells the others to check
again what they have checked before.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.formats.checksum import raw_crc32c

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.blob import Buffer

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("=8sII")
_MAGIC = b"OBDLCACH"
_VERSION = 1
_HEADER_WORDS = 16
_GENERATION = 4  # index of the word
# A checksum of 0 would read as "absent"; this one stands in for it. Any seed but 0 sees zeros, too.
_SEED = 100007
_ZERO_SUM = 0xFFFFFFFF


def unit_sum(data: Buffer) -> int:
    """Return what ``sums`` holds for a unit with this content; never 0."""
    return raw_crc32c(data, _SEED) or _ZERO_SUM


class CacheFiles:
    """The open pair of files. ``sums[unit]`` may be read by anyone; methods are safe between processes.

    Raises OSError if the files cannot be made or the disk is full.
    """

    def __init__(self, directory: Path, size: int, unit: int) -> None:
        self.directory = directory
        self._size = size
        self._unit = unit
        self.units = -(-size // unit)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.fd = os.open(directory / "data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with self._locked():
                # Never made smaller: a manifest that lies about a size must not cut a file others are reading.
                if os.fstat(self.fd).st_size < size:
                    os.ftruncate(self.fd, size)
                self._map = self._open_sums()
        except BaseException:
            os.close(self.fd)
            raise
        self._words = memoryview(self._map).cast("I")
        self.sums = self._words[_HEADER_WORDS:]

    @property
    def generation(self) -> int:
        """Changes when any process took sums away."""
        return self._words[_GENERATION]

    def length_of(self, first: int, stop: int) -> int:
        """Return how many bytes the units ``[first, stop)`` have; the blob's last unit may be short."""
        return min(stop * self._unit, self._size) - first * self._unit

    def load(self, first: int, stop: int) -> bytes:
        """Return what the file holds for the units, unchecked; fewer bytes if it was cut short or cannot be read."""
        try:
            return os.pread(self.fd, self.length_of(first, stop), first * self._unit)
        except OSError as error:
            logger.warning("%s: cannot read cached data: %s", self.directory, error.strerror)
            return b""

    def store(self, first: int, data: bytes) -> None:
        """Write whole units, then their sums. Raises OSError (disk full): some units may be stored then."""
        view = memoryview(data)
        offset = first * self._unit
        done = 0
        while done < len(view):
            done += os.pwrite(self.fd, view[done:], offset + done)
        for number, start in enumerate(range(0, len(view), self._unit)):
            self.sums[first + number] = unit_sum(view[start : start + self._unit])

    def drop(self, first: int, stop: int) -> None:
        """Take the units' sums away and tell all processes."""
        with self._locked():
            for unit in range(first, stop):
                self.sums[unit] = 0
            self._words[_GENERATION] = (self._words[_GENERATION] + 1) & 0xFFFFFFFF

    def close(self) -> None:
        """Unmap and close. Not while another thread uses the object."""
        self.sums.release()
        self._words.release()
        self._map.close()
        os.close(self.fd)
        self.fd = -1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # Between processes, and held for microseconds only.
        fcntl.flock(self.fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.fd, fcntl.LOCK_UN)

    def _open_sums(self) -> mmap.mmap:
        path = self.directory / "sums"
        wanted = 4 * (_HEADER_WORDS + self.units)
        header = _HEADER.pack(_MAGIC, _VERSION, self._unit)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            fd = self._new_sums(path, wanted, header)
        else:
            if os.fstat(fd).st_size != wanted or os.pread(fd, _HEADER.size, 0) != header:
                # Others may have the old file mapped, so it is replaced, not changed.
                logger.warning("%s: sums are not for this size and unit, starting anew", self.directory)
                os.close(fd)
                fd = self._new_sums(path, wanted, header)
        try:
            return mmap.mmap(fd, wanted)
        finally:
            os.close(fd)

    def _new_sums(self, path: Path, size: int, header: bytes) -> int:
        fd, temporary = tempfile.mkstemp(prefix=".sums.", dir=self.directory)
        try:
            # A hole in a mapped file on a full disk would be a SIGBUS at the first write.
            os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, header, 0)
            os.rename(temporary, path)
        except BaseException:
            os.close(fd)
            os.unlink(temporary)
            raise
        return fd
