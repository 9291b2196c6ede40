"""A raw disk image as a writable disk: the file's bytes are the disk's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from obdlab.blob import WritableBlob, check_range
from obdlab.errors import SourceError
from obdlab.layers.layerfile import LayerFile

if TYPE_CHECKING:
    from obdlab.blob import Buffer
    from obdlab.call import Call


class RawFile(WritableBlob):
    """A raw disk image, opened for writing and locked. Its size is fixed. Raises SourceError."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = LayerFile(path, os.O_RDWR)
        self.name = self._file.name
        try:
            self._file.lock()
            self._size = self._file.size
        except BaseException:
            self._file.close()
            raise

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        check_range(self, offset, length)
        return self._file.read_at(offset, length)

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        check_range(self, offset, memoryview(data).nbytes)
        self._file.write_at(offset, data)

    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        check_range(self, offset, length)
        self._file.punch_hole(offset, length)

    def flush(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def create_raw(path: str | os.PathLike[str], index_path: str | os.PathLike[str], size: int) -> None:
    """Make a raw disk of zeros, and the empty index file that the original makes beside it. Neither may exist.

    Raises SourceError; nothing is left then.
    """
    file = LayerFile(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        with file:
            file.resize(size)
        LayerFile(index_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL).close()
    except SourceError:
        os.unlink(path)
        raise
