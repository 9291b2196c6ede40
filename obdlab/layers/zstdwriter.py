"""Making the index of a zstd file (:mod:`obdlab.formats.zstdindex`) while it is decoded once."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Protocol, cast

import zstandard

from obdlab.errors import FormatError
from obdlab.formats import zstdframe
from obdlab.formats.zstdindex import MAX_SPANS, MIN_SPAN, index_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

_READ = 256 << 10
_PIECE = 1 << 20


class Readable(Protocol):
    """A file read from start to end."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to ``size`` bytes, b"" at the end."""


class ZstdIndexWriter:
    """Finds the spans of one zstd file, in bounded memory for any rate of compression. Errors name ``blob``."""

    def __init__(self, *, blob: str = "") -> None:
        self._blob = blob
        self._spans: list[tuple[int, int, int]] = []
        #: Bytes of the file and of its content, so far.
        self.compressed_size = self.uncompressed_size = 0

    def decompressed(self, file: Readable) -> Iterator[bytes]:
        """Yield the content in pieces of at most 1 MiB. Raises FormatError for damaged or truncated data."""
        buffered = _Buffered(file, self._blob)
        decoder = zstandard.ZstdDecompressor()
        span: tuple[int, int] | None = None  # where the open span begins in content and file
        while head := buffered.peek(zstdframe.SKIPPABLE_HEADER):
            if zstdframe.is_skippable(head):
                self._close(span, buffered.position)
                span = None
                buffered.skip(zstdframe.SKIPPABLE_HEADER + zstdframe.skippable_length(head))
                continue
            if span is None:
                span = self.uncompressed_size, buffered.position
            source = _Frame(buffered, self._blob)
            try:
                reader = decoder.stream_reader(cast("IO[bytes]", source), read_across_frames=False)
                while piece := reader.read(_PIECE):
                    self.uncompressed_size += len(piece)
                    yield piece
            except (zstandard.ZstdError, MemoryError) as error:
                raise FormatError(
                    f"damaged zstd data ({error})", blob=self._blob, offset=buffered.position
                ) from error
            source.finish()
            if self.uncompressed_size - span[0] >= MIN_SPAN:
                self._close(span, buffered.position)
                span = None
        self._close(span, buffered.position)
        self.compressed_size = buffered.position

    def to_bytes(self) -> bytes:
        """Return the index file, once all of the content has been read."""
        return index_bytes(self.compressed_size, self.uncompressed_size, self._spans)

    def _close(self, span: tuple[int, int] | None, end: int) -> None:
        if span is None or span[0] == self.uncompressed_size:
            return
        if len(self._spans) == MAX_SPANS:
            raise FormatError("zstd file has too many frames", blob=self._blob, wanted=f"at most {MAX_SPANS} spans")
        self._spans.append((span[0], span[1], end - span[1]))


class _Buffered:
    def __init__(self, file: Readable, blob: str) -> None:
        self._file = file
        self._blob = blob
        self._data = b""
        #: Offset in the file of the next byte.
        self.position = 0

    def peek(self, size: int) -> bytes:
        # Returns fewer bytes at the end of the file alone.
        while len(self._data) < size and (more := self._file.read(_READ)):
            self._data += more
        return self._data[:size]

    def take(self, size: int) -> bytes:
        data = self.peek(size)
        if len(data) < size:
            raise FormatError("zstd data ends early", blob=self._blob, offset=self.position + len(data))
        self._data = self._data[size:]
        self.position += size
        return data

    def skip(self, size: int) -> None:
        while size:
            size -= len(self.take(min(size, _READ)))


class _Frame:
    # One frame as a file: the parts of its structure, and then no more.
    def __init__(self, buffered: _Buffered, blob: str) -> None:
        self._buffered = buffered
        self._blob = blob
        head = buffered.peek(zstdframe.MAX_FRAME_HEADER)
        self._header = zstdframe.frame_header(head, blob=blob, offset=buffered.position)
        self._parts = self._frame()

    def read(self, size: int = -1) -> bytes:
        return next(self._parts, b"")

    def finish(self) -> None:
        # The decoder may stop before a checksum that it does not need to see.
        for _ in self._parts:
            pass

    def _frame(self) -> Iterator[bytes]:
        yield self._buffered.take(self._header.length)
        last = False
        while not last:
            offset = self._buffered.position
            data = self._buffered.take(zstdframe.BLOCK_HEADER)
            block = zstdframe.block_header(data, blob=self._blob, offset=offset)
            yield data + self._buffered.take(block.stored)
            last = block.last
        if self._header.has_checksum:
            yield self._buffered.take(zstdframe.CHECKSUM_SIZE)
