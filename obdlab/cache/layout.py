"""Layout of the two files with the cached units of one blob, and how they are made and removed.

``data`` is sparse and at least as large as the blob: units lie at their offsets in the blob. ``sums`` shows which
units are cached: a header of 64 bytes, then a u32 for each 4 KiB page in this machine's byte order, then a byte per
unit (1: read since the eviction's last pass). The u32 of a page is the CRC-32C of its unit from the unit's beginning
to the page's end, so that one call checks any run of pages within a unit: the CRC seeded with the value before the
run must give the one at its end. The value at a unit's end, never 0, marks the unit as cached. It is written after
its data: after any interruption, a unit either has its data or does not match and is fetched again. Nothing is
synced: the sums also find damage of a power failure.
"""

from __future__ import annotations

import errno
import os
import struct
import tempfile
from array import array
from typing import TYPE_CHECKING, NamedTuple, Self

from crc32c import crc32c

from obdlab.system.ownfiles import open_own

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from obdlab.blob import Buffer

#: Ends the name of a registry's directory of blobs whose content is another one's, decompressed. Such a blob is named
#: by a digest of all that it is made of, not of its own content.
DECOMPRESSED = "+tar"

PAGE_SHIFT = 12
PAGE = 1 << PAGE_SHIFT
HEADER_SIZE = 64
# With any seed but 0 the CRC depends on a unit's leading zeros, too.
SEED = 100007
# Replaces the checksum 0 at a unit's end.
_ZERO_SUM = 0xFFFFFFFF

_MAGIC = b"OBDLCACH"
_VERSION = 3
# Magic, version, unit, blob size; the generation and the mark of a verified blob; the time of the last use (seconds
# since 1970); the eviction's position, and the number of its passes.
_HEADER = struct.Struct("=8sIIQIIdII")
_VERIFIED_MARK = 0x56524659
_FUTURE = float(1 << 33)  # larger times of last use are damaged
# One of the files is missing, or not a regular file of this user (a link, a pipe).
_UNSOUND = (errno.ENOENT, errno.ELOOP, errno.EINVAL)
GENERATION_AT = 24  # followed by the mark
LAST_USE_AT = 32
HAND_AT = 40  # followed by the count


class Header(NamedTuple):
    """The header of ``sums``."""

    magic: bytes
    version: int
    unit: int
    size: int
    generation: int = 0
    mark: int = 0
    last_use_s: float = 0.0
    hand: int = 0
    sweeps: int = 0

    @classmethod
    def new(cls, size: int, unit: int) -> Self:
        return cls(_MAGIC, _VERSION, unit, size)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self | None:
        """Return the header; None if it is malformed or of another version."""
        if len(data) < _HEADER.size:
            return None
        header = cls(*_HEADER.unpack_from(data))
        sound = (
            (header.magic, header.version) == (_MAGIC, _VERSION)
            and PAGE <= header.unit <= 1 << 30
            and header.unit & (header.unit - 1) == 0
            and header.size > 0
        )
        return header if sound else None

    def to_bytes(self) -> bytes:
        return _HEADER.pack(*self)

    @property
    def verified(self) -> bool:
        """True if the blob was complete and matched its digest, and no sums were dropped since."""
        return self.mark == _VERIFIED_MARK

    @property
    def last_use(self) -> float:
        """Seconds since 1970; 0 if damaged."""
        return self.last_use_s if 0 <= self.last_use_s < _FUTURE else 0.0


def generation_bytes(generation: int, *, verified: bool) -> bytes:
    """Return the bytes at :data:`GENERATION_AT`."""
    return struct.pack("=II", generation & 0xFFFFFFFF, _VERIFIED_MARK if verified else 0)


def pages_of(size: int) -> int:
    return -(-size // PAGE)


def used_at(size: int) -> int:
    """Return the offset in ``sums`` of the bytes per unit."""
    return HEADER_SIZE + 4 * pages_of(size)


def sums_size(size: int, unit: int) -> int:
    """Return the size of ``sums``."""
    return used_at(size) - -size // unit


def unit_sums(content: Buffer) -> array[int]:
    """Return the values of a unit's pages."""
    view = memoryview(content)
    state = SEED
    sums = array("I")
    for start in range(0, len(view), PAGE):
        state = crc32c(view[start : start + PAGE], state)
        sums.append(state)
    sums[-1] = sums[-1] or _ZERO_SUM
    return sums


def last_use(directory: Path) -> float:
    """Return the time at which the blob in ``directory`` was last read (seconds since 1970); 0 if unknown."""
    try:
        with open(open_own(directory / "sums", os.O_RDONLY), "rb") as file:
            header = Header.from_bytes(file.read(HEADER_SIZE))
    except OSError:
        return 0.0
    return header.last_use if header is not None else 0.0


def open_pair(directory: Path, mode: int = os.O_RDWR) -> tuple[int, int] | None:
    """Open both files; None if one is missing or they are unsound. Raises OSError."""
    descriptors: list[int] = []
    try:
        for name in ("data", "sums"):
            descriptors.append(open_own(directory / name, mode))  # noqa: PERF401 - kept on errors
        header = Header.from_bytes(os.pread(descriptors[1], HEADER_SIZE, 0))
        if header is not None and os.fstat(descriptors[1]).st_size == sums_size(header.size, header.unit):
            return descriptors[0], descriptors[1]
    except OSError as error:
        if error.errno not in _UNSOUND:
            close_all(descriptors)
            raise
    except BaseException:
        close_all(descriptors)
        raise
    close_all(descriptors)
    return None


def new_pair(directory: Path, size: int, unit: int) -> tuple[int, int]:
    """Make both files, replacing old ones. Needs the lock of the cache. Raises OSError.

    Others may have the old files open, so they are replaced, not changed. At every moment the file named ``sums``
    belongs to the file named ``data``.
    """
    (directory / "sums").unlink(missing_ok=True)
    descriptors: list[int] = []
    try:
        for name in ("data", "sums"):
            fd, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
            descriptors.append(fd)
            try:
                if name == "data":
                    os.ftruncate(fd, size)
                else:
                    # Its space is allocated at once, so that storing a sum never grows it.
                    os.posix_fallocate(fd, 0, sums_size(size, unit))
                    os.pwrite(fd, Header.new(size, unit).to_bytes(), 0)
                os.rename(temporary, directory / name)
            except BaseException:
                os.unlink(temporary)
                raise
    except BaseException:
        close_all(descriptors)
        raise
    return descriptors[0], descriptors[1]


def remove_blob(directory: Path) -> None:
    """Delete a blob's files and directory. Needs the lock of the cache.

    Processes that have them open go on with the deleted files, in which nothing is stored any more.
    """
    for name in sorted(os.listdir(directory), reverse=True):  # sums before data: data without sums is not used
        (directory / name).unlink()
    directory.rmdir()
    try:
        directory.parent.rmdir()
    except OSError:
        pass  # not empty: there are other blobs


def close_all(descriptors: Iterable[int]) -> None:
    for fd in descriptors:
        os.close(fd)
