"""Making the index of a gzip file (:mod:`obdlab.formats.gzipindex`) while it is inflated once.

The entries, and with the same zlib the bytes, are those that the original's ``turboOCI-apply`` makes. zlib finds the
deflate blocks (:mod:`obdlab.system.libz`): indexed_gzip and rapidgzip make other entries, isal does not stop there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.gzipindex import (
    HEADER_SIZE,
    MIN_SPAN,
    ONE_MEMBER,
    SEVERAL_MEMBERS,
    SPAN,
    WINDOW,
    IndexHeader,
    pack,
    table_bytes,
)
from obdlab.formats.gzipmember import MAGIC
from obdlab.system.libz import BlockInflater

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.layers.sink import SeekableSink

# Compressed bytes per read, and content per piece.
_READ = 256 << 10
_PIECE = 1 << 20


class Readable(Protocol):
    """A file read from start to end."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to ``size`` bytes, b"" at the end."""


class SeveralMembersError(FormatError, code="several-gzip-members"):
    """A gzip file of several members, of which the original's index can express the first alone."""


class _Border(NamedTuple):
    content: int
    stored: int
    bits: int
    window: bytes


class GzipIndexWriter:
    """Writes the index of a gzip file to ``sink``, from its current position on.

    Until :meth:`decompressed` has ended, the place of the header holds zeros, which do not parse. ``span`` is the
    distance between entries. With ``several``, files of several members get an index of version 2, which the
    original refuses; without it they are refused here. Errors name ``blob``. Raises ValueError for a span below 64
    KiB.
    """

    def __init__(self, sink: SeekableSink, *, blob: str = "", span: int = SPAN, several: bool = False) -> None:
        if not MIN_SPAN <= span < 1 << 31:
            raise ValueError(f"span of a gzip index: not from {MIN_SPAN} to 2 GiB (got {span})")
        self._sink = sink
        self._start = sink.tell()
        self._blob = blob
        self._span = span
        self._several = several
        self._entries: list[tuple[int, int, int, int, int]] = []
        self._window_at = HEADER_SIZE
        # The original's rule: the last border before each multiple of the span, or the one at it.
        self._expected = 0
        self._last: _Border | None = None
        #: Bytes read, and bytes of content, so far; gzip members that have ended.
        self.compressed_size = self.uncompressed_size = self.members = 0
        #: Most content between two entries, or behind the last one.
        self.longest_span = 0
        #: The header, once all is written.
        self.header: IndexHeader | None = None
        sink.write(bytes(HEADER_SIZE))

    def decompressed(self, file: Readable) -> Iterator[bytes]:
        """Yield the content of the gzip file in pieces of at most 1 MiB; the index is complete at the end.

        Raises SeveralMembersError; FormatError if the file is no gzip file, is cut or has other bytes behind its end;
        CorruptBlobError if it does not inflate or does not match the CRC and length in its trailer.
        """
        output = bytearray(WINDOW + _PIECE)  # begins with the window before the piece
        with BlockInflater(output) as inflater:
            inflater.filled = WINDOW
            while self._step(inflater, file):
                self._note(inflater, output)
                if inflater.filled == len(output):
                    yield bytes(memoryview(output)[WINDOW:])
                    self.uncompressed_size += _PIECE
                    output[:WINDOW] = output[-WINDOW:]
                    inflater.filled = WINDOW
            piece = bytes(memoryview(output)[WINDOW : inflater.filled])
        self.uncompressed_size += len(piece)
        if piece:
            yield piece
        self._finish()

    # Returns False at the end of the file.
    def _step(self, inflater: BlockInflater, file: Readable) -> bool:
        if not inflater.unused:
            data = file.read(_READ)
            if not data:
                raise FormatError("gzip file ends early", blob=self._blob, offset=self.compressed_size)
            self._check_start(data)
            self.compressed_size += len(data)
            inflater.feed(data)
        try:
            ended = inflater.step()
        except CorruptBlobError as error:
            offset = self.compressed_size - inflater.unused
            raise CorruptBlobError(str(error), blob=self._blob, offset=offset) from error
        if not ended:
            return True
        self.members += 1
        return self._begins_member(inflater, file)

    def _check_start(self, data: bytes) -> None:
        if self.compressed_size == 0 and not data.startswith(MAGIC[: len(data)]):
            raise FormatError("not a gzip file", blob=self._blob, offset=0, got=data[:4].hex(), wanted=MAGIC.hex())

    # Returns True if another member follows. Zeros up to the end of the file are padding.
    def _begins_member(self, inflater: BlockInflater, file: Readable) -> bool:
        behind = inflater.rest()
        at = self.compressed_size - len(behind)
        while len(behind) < len(MAGIC) and (data := file.read(_READ)):
            self.compressed_size += len(data)
            behind += data
        if behind.startswith(MAGIC):
            if not self._several:
                raise SeveralMembersError(
                    "gzip file of several members (as of eStargz, bgzip or joined files)",
                    blob=self._blob,
                    offset=at,
                    wanted="one, as the original's index has no more: convert the image fully, or index all members",
                )
            inflater.next_member()
            inflater.feed(behind)
            return True
        while behind:
            if behind.strip(b"\0"):
                what = "gzip file: neither a member nor zeros behind a member"
                raise FormatError(what, blob=self._blob, offset=self.compressed_size - len(behind))
            behind = file.read(_READ)
            self.compressed_size += len(behind)
        return False

    def _note(self, inflater: BlockInflater, output: bytearray) -> None:
        bits = inflater.border()
        if bits is None:
            return
        filled = inflater.filled
        content = self.uncompressed_size + filled - WINDOW
        window = bytes(memoryview(output)[filled - WINDOW : filled])
        border = _Border(content, self.compressed_size - inflater.unused, bits, window)
        if content < self._expected:
            self._last = border
            return
        if content > self._expected:
            if self._last is not None:
                self._add(self._last)
            self._last = border
            while self._expected < content:
                self._expected += self._span
        if content == self._expected:
            self._add(border)
            self._last = None
            self._expected += self._span

    def _add(self, border: _Border) -> None:
        window = pack(border.window)
        self._sink.write(window)
        if self._entries:
            self.longest_span = max(self.longest_span, border.content - self._entries[-1][0])
        self._entries.append((border.content, border.stored, self._window_at, border.bits, len(window)))
        self._window_at += len(window)

    def _finish(self) -> None:
        self.longest_span = max(self.longest_span, self.uncompressed_size - self._entries[-1][0])
        table = pack(table_bytes(self._entries))
        self._sink.write(table)
        size = self._window_at + len(table)
        self.header = IndexHeader(
            ONE_MEMBER if self.members == 1 else SEVERAL_MEMBERS,
            len(self._entries),
            self.compressed_size,
            self.uncompressed_size,
            size,
            self._window_at,
            self._span,
        )
        self._sink.seek(self._start)
        self._sink.write(self.header.to_bytes())
        self._sink.seek(self._start + size)


def write_gzip_index(
    file: Readable, sink: SeekableSink, *, blob: str = "", span: int = SPAN, several: bool = False
) -> IndexHeader:
    """Write the index of a gzip file, as :class:`GzipIndexWriter` does, and return its header."""
    writer = GzipIndexWriter(sink, blob=blob, span=span, several=several)
    for _ in writer.decompressed(file):
        pass
    assert writer.header is not None
    return writer.header
