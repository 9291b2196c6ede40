"""Adjacent writes to a disk, gathered into large ones: most files are small, and lie side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from obdlab.blob import Buffer, WritableBlob

# One buffer for all pieces: fresh memory for each would cost as much as the copy.
_SPACE = 4 << 20


class Gathered:
    """A disk written in large pieces. Unflushed bytes cannot be read back from the disk."""

    def __init__(self, disk: WritableBlob) -> None:
        self._disk = disk
        self._space = memoryview(bytearray(_SPACE))
        self._begin = 0  # offset on the disk
        self._used = 0

    def write(self, offset: int, data: Buffer) -> None:
        """Write bytes (items of one byte), now or later."""
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
        """Write the gathered bytes."""
        if self._used:
            self._disk.write_at(self._begin, self._space[: self._used])
            self._begin += self._used
            self._used = 0
