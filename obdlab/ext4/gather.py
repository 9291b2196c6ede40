"""Writes that follow each other on a disk, gathered into large ones: files are mostly small, and lie side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from obdlab.blob import Buffer, WritableBlob

# One buffer, used over and over: fresh memory for each piece would cost as much as the copy.
_SPACE = 4 << 20


class Gathered:
    """A disk that is written to in large pieces. What was not flushed cannot be read back from the disk."""

    def __init__(self, disk: WritableBlob) -> None:
        self._disk = disk
        self._space = memoryview(bytearray(_SPACE))
        self._begin = 0  # where on the disk
        self._used = 0

    def write(self, offset: int, data: Buffer) -> None:
        """Write bytes (of one-byte items), now or later."""
        length = len(data)
        used = self._used
        if offset != self._begin + used or used + length > _SPACE:
            self.flush()
            if length > _SPACE:
                self._disk.write_at(offset, data)
                return
            self._begin, used = offset, 0
        self._space[used : used + length] = data
        self._used = used + length

    def flush(self) -> None:
        """Write what is still held."""
        if self._used:
            self._disk.write_at(self._begin, self._space[: self._used])
            self._begin += self._used
            self._used = 0
