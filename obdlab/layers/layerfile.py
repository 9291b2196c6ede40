"""A writable layer's own file: positional reads and writes, holes, and errors that say where."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

from obdlab.blob import Blob, check_range
from obdlab.errors import FormatError, SourceError
from obdlab.formats.lsmt.layout import STRUCT_SIZE, Flags, Header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.blob import Buffer

# linux/falloc.h
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class LayerFile(Blob):
    """An open file that may grow. What the system refuses is raised as SourceError, with the OSError as its cause."""

    def __init__(self, path: str | os.PathLike[str], flags: int) -> None:
        """Open ``path`` with these flags of :func:`os.open`, creating it with mode 0644 if they say so."""
        self.name = os.fspath(path)
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._failed("opening", None, error) from error

    @property
    def _open_descriptor(self) -> int:
        # After closing, the number may be another file's.
        if self._descriptor < 0:
            raise SourceError("layer file is closed", blob=self.name)
        return self._descriptor

    @property
    def size(self) -> int:
        return os.fstat(self._open_descriptor).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        descriptor = self._open_descriptor
        try:
            data = os.pread(descriptor, length, offset)
            while len(data) < length:  # one call gives at most 2 GiB
                more = os.pread(descriptor, length - len(data), offset + len(data))
                if not more:
                    check_range(self, offset, length)
                    raise SourceError("file ends early", blob=self.name, offset=offset + len(data))
                data += more
        except OSError as error:
            raise self._failed("reading", offset, error) from error
        return data

    def write_some(self, offset: int, data: Buffer) -> int:
        """Write at least one byte of ``data``; returns how many."""
        try:
            return os.pwrite(self._open_descriptor, data, offset)
        except OSError as error:
            raise self._failed("writing", offset, error) from error

    def write_at(self, offset: int, data: bytes) -> None:
        """Write all of ``data``."""
        written = 0
        while written < len(data):
            written += self.write_some(offset + written, data[written:])

    def resize(self, size: int) -> None:
        """Cut the file, or extend it by a hole."""
        try:
            os.ftruncate(self._open_descriptor, size)
        except OSError as error:
            raise self._failed(f"resizing to {size} bytes", None, error) from error

    def punch_hole(self, offset: int, length: int) -> None:
        """Make the range read as zeros and free its blocks."""
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        while _libc.fallocate(self._open_descriptor, mode, offset, length):
            code = ctypes.get_errno()
            if code != errno.EINTR:
                error = OSError(code, os.strerror(code))
                raise self._failed("punching a hole", offset, error) from error

    def sync(self) -> None:
        """Return once everything written is on stable storage."""
        try:
            os.fdatasync(self._open_descriptor)
        except OSError as error:
            raise self._failed("flushing", None, error) from error

    def data_extents(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges inside ``[begin, end)`` that the file system holds data for, in its own block size."""
        descriptor = self._open_descriptor
        while begin < end:
            try:
                data = os.lseek(descriptor, begin, os.SEEK_DATA)
                begin = os.lseek(descriptor, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole from here on
                    return
                raise self._failed("looking for data", begin, error) from error
            if data < end:
                yield data, min(begin, end)

    def read_header(self, wanted: Flags) -> Header:
        """The LSMT header; FormatError unless it is that of a writable data file of the ``wanted`` kind."""
        header = Header.from_bytes(self.read_at(0, min(STRUCT_SIZE, self.size)), blob=self.name)
        looked_at = Flags.DATA | Flags.SPARSE | Flags.SEALED
        if header.flags & looked_at != wanted:
            raise FormatError(
                "LSMT file is another kind of writable layer",
                blob=self.name,
                offset=28,
                got=f"flags {int(header.flags):#x}",
                wanted=f"{int(wanted):#x} of {int(looked_at):#x}",
            )
        return header

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _failed(self, doing: str, offset: int | None, error: OSError) -> SourceError:
        return SourceError(f"{doing} failed: {error.strerror}", blob=self.name, offset=offset)
