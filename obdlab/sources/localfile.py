"""A local file or block device as a blob."""

from __future__ import annotations

import os
import stat
import threading

from obdlab.blob import Blob, check_range
from obdlab.errors import SourceError
from obdlab.observe import audit


class LocalFile(Blob):
    """A regular file or block device, read by position.

    The size is taken when it is opened. Raises SourceError naming the path if it cannot be opened or read, is
    neither kind, or turns out shorter than it was.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self._lock = threading.Lock()
        self._pread = audit.pread_of("file:pread", self.name, audit.SLOW_LAYER_READ_S)
        # Reads in flight. The descriptor goes back to the kernel only when none is left: its number might be
        # another file's by the time a late pread used it.
        self._readers = 0
        self._closed = False
        try:
            # Not blocking on a FIFO: it is refused below.
            self._fd = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SourceError(f"cannot open ({error.strerror})", blob=self.name) from error
        try:
            self._size = self._find_size()
        except BaseException:
            os.close(self._fd)
            raise

    def _find_size(self) -> int:
        try:
            status = os.fstat(self._fd)
            if stat.S_ISREG(status.st_mode):
                return status.st_size
            if stat.S_ISBLK(status.st_mode):
                return os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise SourceError(f"cannot tell its size ({error.strerror})", blob=self.name) from error
        kind = "directory" if stat.S_ISDIR(status.st_mode) else "special file"
        raise SourceError(f"is a {kind} (wanted a regular file or block device)", blob=self.name)

    @property
    def size(self) -> int:
        return self._size

    def identity(self) -> str:
        """Return what tells this very file from others, and from itself after a change. Raises SourceError."""
        try:
            status = os.fstat(self._fd)
        except OSError as error:
            raise SourceError(f"cannot tell its identity ({error.strerror})", blob=self.name) from error
        return f"file {status.st_dev}:{status.st_ino}, {status.st_size} bytes, changed at {status.st_mtime_ns} ns"

    def read_at(self, offset: int, length: int) -> bytes:
        check_range(self, offset, length)
        with self._lock:
            if self._closed:
                raise SourceError("read after close", blob=self.name, offset=offset)
            self._readers += 1
        try:
            data = self._pread(self._fd, length, offset)
            if len(data) == length:
                return data
            return self._read_rest(data, offset, length)
        except OSError as error:
            raise SourceError(f"read failed ({error.strerror})", blob=self.name, offset=offset) from error
        finally:
            self._release()

    def _read_rest(self, start: bytes, offset: int, length: int) -> bytes:
        # Linux reads at most 2 GiB - 4 KiB in one call; a file cut short meanwhile gives nothing.
        data = bytearray(start)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise SourceError(
                    f"file was cut short (got {len(data)} of {length} bytes)", blob=self.name, offset=offset
                )
            data += more
        return bytes(data)

    def _release(self) -> None:
        with self._lock:
            self._readers -= 1
            last = self._closed and self._readers == 0
        if last:
            os.close(self._fd)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle = self._readers == 0
        if idle:
            os.close(self._fd)
