"""A disk in a sparse file, and what the system's own tools say of it."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from obdlab.blob import Buffer, WritableBlob, check_range
from obdlab.call import Call

if TYPE_CHECKING:
    from pathlib import Path


class FileDisk(WritableBlob):
    """A sparse file as a disk; counts the bytes written to it."""

    def __init__(self, path: Path, size: int = 0) -> None:
        self.name = str(path)
        self.path = path
        self.written = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if size:
            os.ftruncate(self._fd, size)

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        check_range(self, offset, length)
        return os.pread(self._fd, length, offset)

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        check_range(self, offset, len(data))
        self.written += len(data)
        assert os.pwrite(self._fd, data, offset) == len(data)

    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        self.write_at(offset, bytes(length))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def fsck(path: Path) -> str:
    """Have e2fsck look at everything; what it complains of, or an empty text."""
    done = subprocess.run(["e2fsck", "-f", "-n", str(path)], capture_output=True, text=True, timeout=120, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr
