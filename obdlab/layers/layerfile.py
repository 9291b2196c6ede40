"""A writable layer's own file: positional reads and writes, holes, and errors with path and offset."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.blob import Blob, check_range
from obdlab.errors import FormatError, SourceError
from obdlab.formats.lsmt.layout import STRUCT_SIZE, Flags, Header
from obdlab.system.locks import try_lock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.blob import Buffer
    from obdlab.call import Call

# linux/falloc.h
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

# linux/fs.h: wait for pages under write-back, write the dirty ones, and wait for these.
_SYNC_FILE_RANGE_WRITE_AND_WAIT = 7
_WRITE_OUT_PIECE = 32 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class LayerFile(Blob):
    """An open file that may grow. System errors are raised as SourceError, with the OSError as the cause."""

    def __init__(self, path: str | os.PathLike[str], flags: int) -> None:
        """Open ``path`` with these flags of :func:`os.open`; O_CREAT makes it with mode 0644."""
        self.name = os.fspath(path)
        self._descriptor = -1
        self._name_is_stored = not flags & os.O_CREAT
        try:
            self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._failed("opening", None, error) from error

    @property
    def _open_descriptor(self) -> int:
        # After closing, the number may belong to another file.
        if self._descriptor < 0:
            raise SourceError("layer file is closed", blob=self.name)
        return self._descriptor

    @property
    def size(self) -> int:
        return os.fstat(self._open_descriptor).st_size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        descriptor = self._open_descriptor
        try:
            data = os.pread(descriptor, length, offset)
            while len(data) < length:  # one call returns at most 2 GiB
                more = os.pread(descriptor, length - len(data), offset + len(data))
                if not more:
                    check_range(self, offset, length)
                    raise SourceError("file ends early", blob=self.name, offset=offset + len(data))
                data += more
        except OSError as error:
            raise self._failed("reading", offset, error) from error
        return data

    def write_some(self, offset: int, data: Buffer) -> int:
        """Write at least one byte of ``data``; return the number of bytes written."""
        try:
            return os.pwrite(self._open_descriptor, data, offset)
        except OSError as error:
            raise self._failed("writing", offset, error) from error

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        """Write all of ``data``."""
        view = memoryview(data)
        written = 0
        while written < len(view):
            written += self.write_some(offset + written, view[written:])

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
        """Return once everything written is on stable storage, and so is the name of a file created here."""
        try:
            os.fdatasync(self._open_descriptor)
        except OSError as error:
            raise self._failed("flushing", None, error) from error
        if not self._name_is_stored:
            sync_directory(self.name)
            self._name_is_stored = True

    def write_out(self) -> None:
        """Write dirty pages back piece by piece and wait for them, so that the :meth:`sync` that follows is short.

        A long sync stalls writes that need the file system's journal. Nothing is promised here; errors are left to
        the sync.
        """
        for offset in range(0, self.size, _WRITE_OUT_PIECE):
            if _libc.sync_file_range(
                self._open_descriptor, offset, _WRITE_OUT_PIECE, _SYNC_FILE_RANGE_WRITE_AND_WAIT
            ):
                return

    def rename(self, path: str) -> None:
        """Take the place of the file ``path``; the next :meth:`sync` stores the new name."""
        try:
            os.replace(self.name, path)
        except OSError as error:
            raise self._failed(f"renaming to {path}", None, error) from error
        self.name = path
        self._name_is_stored = False

    def lock(self, *, shared: bool = False) -> None:
        """Lock out other openers until this one closes; ``shared`` locks out only writers. SourceError if locked."""
        try:
            locked = try_lock(self._open_descriptor, shared=shared)
        except OSError as error:
            raise self._failed("locking", None, error) from error
        if not locked:
            who = _lock_holder(self._open_descriptor)
            raise SourceError(f"layer is in use by another opener{who}", blob=self.name, temporary=True)

    @property
    def allocated_size(self) -> int:
        """Bytes of storage the file occupies."""
        return os.fstat(self._open_descriptor).st_blocks * 512

    def take_after(self, other: LayerFile) -> None:
        """Copy the permissions and the owner of ``other``."""
        status = os.fstat(other._open_descriptor)
        try:
            os.fchown(self._open_descriptor, status.st_uid, status.st_gid)
            os.fchmod(self._open_descriptor, status.st_mode & 0o7777)
        except OSError as error:
            raise self._failed("setting its owner", None, error) from error

    def data_extents(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges inside ``[begin, end)`` that the file system has data for, in its own block size."""
        descriptor = self._open_descriptor
        while begin < end:
            try:
                data = os.lseek(descriptor, begin, os.SEEK_DATA)
                begin = os.lseek(descriptor, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole from here to the end
                    return
                raise self._failed("looking for data", begin, error) from error
            if data < end:
                yield data, min(begin, end)

    def read_header(self, wanted: Flags) -> Header:
        """Return the LSMT header; FormatError unless it is of a writable data file of the ``wanted`` kind."""
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


def sync_directory(path: str) -> None:
    """Return once the name ``path`` is on stable storage."""
    folder = os.path.dirname(path) or "."
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SourceError(f"flushing the directory failed: {error.strerror}", blob=folder) from error


# Read from proc_locks(5), where a process of another namespace is number 0. A device's server runs under its device's
# id.
def _lock_holder(descriptor: int) -> str:
    status = os.fstat(descriptor)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1:2] == ["FLOCK"] and words[5:6] == [wanted] and words[4] != "0":
                return f": process {words[4]} ({Path(f'/proc/{words[4]}/comm').read_text().strip()})"
    except OSError:  # not readable, or gone meanwhile
        pass
    return ""
