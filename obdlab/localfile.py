"""A local file or block device as a blob."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from typing import TYPE_CHECKING

from obdlab.blob import Blob, check_range
from obdlab.errors import SourceError
from obdlab.observe import audit

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.call import Call


# Closed with its last reference. A read in progress holds one: after an early close, a late pread could hit another
# file with the same number. Counting readers under a lock does the same, and costs as much as the pread of a block.
class _Descriptor:
    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # when the interpreter ends, os may be gone
        close(self.number)


def open_regular(path: str | os.PathLike[str]) -> FileIO:
    """Open a regular file for reading, unbuffered, without ever blocking.

    A pipe, a terminal or a device may be at the path: opening one can block forever, and reading it may have no end.
    Raises OSError (EINVAL for anything but a regular file).
    """
    file = FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY))
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """Return the content of a regular file, of one larger than ``most`` the first ``most + 1`` bytes.

    The buffer has the file's size: one of ``most`` bytes for each small file, cut down afterwards, fragments the heap
    by 60 bytes a file (measured with 4 MiB over 650,000 files). Raises as :func:`open_regular`.
    """
    with open_regular(path) as file:
        left = min(os.fstat(file.fileno()).st_size, most) + 1
        parts = []
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
    return b"".join(parts)


class LocalFile(Blob):
    """A regular file or block device, read by position.

    The size is taken when it is opened. Raises SourceError naming the path if it cannot be opened or read, is neither
    kind, or has become shorter.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self._pread = audit.pread_of("file:pread", self.name, audit.SLOW_LAYER_READ_S)
        try:
            # Does not block on a FIFO, which is refused below.
            file = _Descriptor(os.open(self.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            raise SourceError(f"cannot open ({error.strerror})", blob=self.name) from error
        self._size = self._find_size(file.number)
        self._file: _Descriptor | None = file

    def _find_size(self, fd: int) -> int:
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode):
                return status.st_size
            if stat.S_ISBLK(status.st_mode):
                return os.lseek(fd, 0, os.SEEK_END)
        except OSError as error:
            raise SourceError(f"cannot tell its size ({error.strerror})", blob=self.name) from error
        kind = "directory" if stat.S_ISDIR(status.st_mode) else "special file"
        raise SourceError(f"is a {kind} (wanted a regular file or block device)", blob=self.name)

    @property
    def size(self) -> int:
        return self._size

    @property
    def descriptor(self) -> _Descriptor | None:
        """The open file's descriptor; None after :meth:`close`. It stays open while the caller holds it."""
        return self._file

    def in_file(self) -> tuple[LocalFile, int] | None:
        return (self, 0) if self._pread is os.pread else None  # else slow reads are logged

    def identity(self) -> str:
        """Return an identity of this very file, which also changes with its content. Raises SourceError."""
        file = self._open_file(0)
        try:
            status = os.fstat(file.number)
        except OSError as error:
            raise SourceError(f"cannot tell its identity ({error.strerror})", blob=self.name) from error
        # The time of the last change cannot be set; a tar or `cp -p` sets the other one, often to the same value.
        times = f"{status.st_mtime_ns} ns, {status.st_ctime_ns} ns"
        return f"file {status.st_dev}:{status.st_ino}, {status.st_size} bytes, changed at {times}"

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        if offset < 0 or length < 0 or offset + length > self._size:
            check_range(self, offset, length)
        file = self._file or self._open_file(offset)  # held until the read is over
        try:
            data = self._pread(file.number, length, offset)
            if len(data) == length:
                return data
            return self._read_rest(file.number, data, offset, length)
        except OSError as error:
            raise SourceError(f"read failed ({error.strerror})", blob=self.name, offset=offset) from error

    def _open_file(self, offset: int) -> _Descriptor:
        if self._file is None:
            raise SourceError("read after close", blob=self.name, offset=offset)
        return self._file

    def _read_rest(self, fd: int, start: bytes, offset: int, length: int) -> bytes:
        # Linux reads at most 2 GiB - 4 KiB in one call; a truncated file returns nothing.
        data = bytearray(start)
        while len(data) < length:
            more = os.pread(fd, length - len(data), offset + len(data))
            if not more:
                raise SourceError(
                    f"file was cut short (got {len(data)} of {length} bytes)", blob=self.name, offset=offset
                )
            data += more
        return bytes(data)

    def close(self) -> None:
        self._file = None
