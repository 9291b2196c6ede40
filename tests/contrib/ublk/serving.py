"""A ublk server as a process of its own, to be killed: FILE DIRECTORY [recover]."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from obdlab.blob import Buffer, WritableBlob, check_range
from obdlab.call import Call
from obdlab.contrib.ublk.ublk_device import UblkDevice


class FileDisk(WritableBlob):
    """A file; what was written to it is there for the next server."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._fd = os.open(path, os.O_RDWR)
        self._size = path.stat().st_size

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        check_range(self, offset, length)
        return os.pread(self._fd, length, offset)

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        check_range(self, offset, len(data))
        assert os.pwrite(self._fd, data, offset) == len(data)

    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        self.write_at(offset, bytes(length))

    def flush(self) -> None:
        os.fdatasync(self._fd)


if __name__ == "__main__":
    device = UblkDevice(FileDisk(Path(sys.argv[1])), Path(sys.argv[2]), recover="recover" in sys.argv[3:])
    print(device.path, flush=True)
    device.wait()
