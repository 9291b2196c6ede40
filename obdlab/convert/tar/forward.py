"""A file for tar readers over a stream that can only be read forwards."""

from __future__ import annotations

import tarfile
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from io import RawIOBase

#: Largest piece returned.
PIECE = 1 << 20
#: Most bytes of all headers of one member, maps of sparse files included.
MAX_HEADERS_SIZE = 8 << 20


class ForwardReader:
    """The part of a file that tarfile needs, over a pipe: seek goes forwards only.

    Beyond tarfile's own ``r|`` mode, it returns large pieces without copying them, and can peek at a header before it
    is read. Raises tarfile.StreamError for a seek backwards and for endless headers, EOFError for a seek beyond the
    end.
    """

    def __init__(self, file: IO[bytes] | RawIOBase) -> None:
        self._file = file
        self._buffer = memoryview(bytearray(2 * PIECE))
        self._begin = 0
        self._end = 0
        self._position = 0
        self._allowed = 0

    def allow_reading(self, size: int) -> None:
        """Limit the bytes that :meth:`read` returns in all: tarfile accepts any number of headers."""
        self._allowed = size

    def tell(self) -> int:
        """Return the offset in the stream."""
        return self._position

    def seek(self, position: int) -> int:
        """Skip forwards to a position."""
        ahead = position - self._position
        if 0 <= ahead <= self._end - self._begin:
            self._begin += ahead
            self._position = position
            return position
        if ahead < 0:
            raise tarfile.StreamError(f"an offset points backwards (to {position} from {self._position})")
        while self._position < position:
            if not self.read_some(min(position - self._position, PIECE)):
                raise EOFError(f"the stream ends at {self._position}, before {position}")
        return self._position

    def peek(self, size: int) -> bytes:
        """Return the next ``size`` bytes, fewer only at the end, without consuming them; at most 2 PIECE."""
        while self._end - self._begin < size:
            rest = self._end - self._begin
            self._buffer[:rest] = self._buffer[self._begin : self._end]
            self._begin, self._end = 0, rest
            count = self._file.readinto(self._buffer[rest:])  # type: ignore[union-attr]
            if not count:
                break
            self._end += count
        return bytes(self._buffer[self._begin : min(self._begin + size, self._end)])

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer only at the end."""
        self._allowed -= size
        if self._allowed < 0:
            raise tarfile.StreamError(f"headers of one member are longer than {MAX_HEADERS_SIZE} bytes")
        parts = []
        while size > 0 and (piece := self.read_some(min(size, PIECE))):
            parts.append(bytes(piece))
            size -= len(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_some(self, size: int) -> memoryview:
        """Return one to ``size`` bytes, none only at the end; valid until the next call."""
        if self._begin == self._end:
            self._begin = 0
            self._end = self._file.readinto(self._buffer) or 0  # type: ignore[union-attr]
        piece = self._buffer[self._begin : min(self._begin + min(size, PIECE), self._end)]
        self._begin += len(piece)
        self._position += len(piece)
        return piece
