"""Layer blobs in their tar envelope: reading the content, and writing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from obdlab.blob import Blob, check_range
from obdlab.errors import FormatError, ObdlabError
from obdlab.formats.tar import (
    WRAP_SIZE,
    TarWindow,
    parse_wrap,
    placeholder_header,
    wrap_header,
    wrap_tail,
)

if TYPE_CHECKING:
    from types import TracebackType

    from obdlab.blob import Buffer, OpenFile
    from obdlab.call import Call
    from obdlab.layers.sink import SeekableSink


class TarWrapError(ObdlabError, code="tar-wrap"):
    """Content of another size than announced, a sink that cannot seek, or a writer used after its end."""


def open_tarwrap(blob: Blob) -> Blob:
    """Return the content of a tar-wrapped blob, or the blob itself if it is not a tar.

    Raises FormatError for a tar that does not hold one layer, or whose content would reach past its end.
    """
    window = read_window(blob)
    return blob if window is None else WrappedContent(blob, window)


def read_window(blob: Blob) -> TarWindow | None:
    """Return where the content of a wrapped blob lies, or None if it is not a tar. Raises as open_tarwrap does."""
    window = parse_wrap(blob.read_at(0, min(WRAP_SIZE, blob.size)), blob=blob.name)
    if window is not None and window.offset + window.size > blob.size:
        raise FormatError(
            "wrapped content reaches past the blob's end (is it cut short?)",
            blob=blob.name,
            got=f"[{window.offset}, {window.offset + window.size})",
            wanted=f"inside [0, {blob.size})",
        )
    return window


class WrappedContent(Blob):
    """The one file inside a tar, as a blob; the tar is the blob below."""

    below: Blob

    def __init__(self, blob: Blob, window: TarWindow) -> None:
        self.name = blob.name
        self.below = blob
        self._offset, self._size = window

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        if offset < 0 or length < 0 or offset + length > self._size:
            check_range(self, offset, length)
        return self.below.read_at(self._offset + offset, length, call)

    def in_file(self) -> tuple[OpenFile, int] | None:
        found = self.below.in_file()
        return None if found is None else (found[0], found[1] + self._offset)

    def map_range(self, begin: int, end: int) -> tuple[int, int]:
        check_range(self, begin, end - begin)
        return self._offset + begin, self._offset + end


class TarWrapWriter:
    """Wraps the bytes written to it in a tar, from the sink's current position on, and is itself a seekable sink.

    Until :meth:`close` the header is a placeholder that does not parse as a tar. Leaving a ``with`` block by an
    exception keeps the placeholder. The sink stays open, at the end of the tar.
    """

    def __init__(self, sink: SeekableSink) -> None:
        self._sink = sink
        self._start = sink.tell()
        self._position = 0
        self._size = 0
        self._open = True
        sink.write(placeholder_header())

    def write(self, data: Buffer) -> int:
        """Write at the current position of the content. Returns the length of ``data``."""
        if not self._open:
            raise TarWrapError("tar writer is closed")
        length = memoryview(data).nbytes
        self._sink.write(bytes(data))
        self._position += length
        self._size = max(self._size, self._position)
        return length

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in the content."""
        return self._position

    def seek(self, offset: int) -> int:
        """Move within the content written so far."""
        if not 0 <= offset <= self._size:
            raise TarWrapError(f"seek outside the content (got {offset}, wanted 0 to {self._size})")
        self._sink.seek(self._start + WRAP_SIZE + offset)
        self._position = offset
        return offset

    def close(self) -> None:
        """Write the tail and the final header. Raises TarWrapError if already closed."""
        if not self._open:
            raise TarWrapError("tar writer is closed")
        self.seek(self._size)
        self._open = False
        tail = wrap_tail(self._size)
        self._sink.write(tail)
        self._sink.seek(self._start)
        self._sink.write(wrap_header(self._size))
        self._sink.seek(self._start + WRAP_SIZE + self._size + len(tail))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._open:
            self.close()
