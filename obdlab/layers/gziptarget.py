"""The content of a gzip layer, read at any place by its index (:mod:`obdlab.formats.gzipindex`).

The content between two entries is a span. It ends where the next entry's window can be compared with it, so an index
of another file is found before a byte of the span is returned.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from isal import isal_zlib

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.gzipindex import (
    HEADER_SIZE,
    SEVERAL_MEMBERS,
    WINDOW,
    IndexHeader,
    parse_table,
    parse_window,
)
from obdlab.formats.gzipmember import MAGIC, MAX_HEADER, begin_inside_byte, header_length, parse_trailer
from obdlab.layers.inflater import Inflater, MemberSums
from obdlab.layers.longspan import LongSpan
from obdlab.layers.spannedtarget import SpannedTarget, check_owner

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray

    from obdlab.blob import Blob
    from obdlab.call import Call
    from obdlab.layers.spancache import SpanCache


# Compressed bytes in one read of the blob below; a usual span needs one read. Checking all of the file takes less at
# a time, 16 MiB of content at deflate's best rate.
_PIECE, _CHECKED_PIECE = 1 << 20, 16 << 10
_HEAD = 4 << 10


def load_index(index: Blob) -> tuple[IndexHeader, NDArray[np.void]]:
    """Return header and table (:data:`obdlab.formats.gzipindex.ENTRY`) of an index file.

    Raises FormatError, or CorruptBlobError for a wrong checksum.
    """
    head = index.read_at(0, min(HEADER_SIZE, index.size))
    header = IndexHeader.from_bytes(head, index_size=index.size, blob=index.name)
    stored = index.read_at(header.index_start, index.size - header.index_start)
    return header, parse_table(stored, header, blob=index.name)


class GzipTarget(SpannedTarget):
    """The uncompressed content of ``compressed``, the blob below, by the index file ``index``.

    Both belong to the target unless the constructor raises. It reads header and table of the index, and the gzip
    header; windows are read when they are needed. Raises FormatError or CorruptBlobError for an index that is damaged
    or not of this file, as far as that shows without inflating.

    A read raises CorruptBlobError if the bytes do not inflate, or to another length or end of the span than the index
    has. Other damage is found by :meth:`verify` alone: gzip has one checksum for all of the content.
    """

    def __init__(
        self, compressed: Blob, index: Blob, *, spans: SpanCache | None = None, checked_above: bool = False
    ) -> None:
        self.header, table = load_index(index)
        check_owner(index, compressed, self.header.compressed_size, "gzip")
        # One element of a memoryview costs a fifth of numpy's.
        content = memoryview(table["content"].tobytes()).cast("q")
        size = self.header.uncompressed_size
        super().__init__(compressed, index, spans, content=content, size=size, checked_above=checked_above)
        self._recent_window = -1, b""
        self._stored = memoryview(table["stored"].tobytes()).cast("q")
        self._bits = table["bits"].tobytes()
        self._windows = memoryview(table["window"].tobytes()).cast("q")
        self._lengths = memoryview(table["length"].tobytes()).cast("I")
        self._check_start()

    def verify(self) -> Iterator[int]:
        """Inflate everything and check every window, and length and CRC of every gzip member.

        Yields the number of bytes checked since the last time. Raises CorruptBlobError; reading all of it found no
        fault otherwise.
        """
        sums = MemberSums(self.name)
        for number in range(self._last + 1):
            tail = self._window(number, None)
            inflater = self._inflater(number, tail, sums)
            for data in self._stored_parts(number, _CHECKED_PIECE, None):
                inflater.take(data)
                content = inflater.taken()
                tail = (tail + content)[-WINDOW:]
                yield len(content)
            inflater.end(last=number == self._last)
            self._check_end(number, tail, inflater, None)

    # -- spans -------------------------------------------------------------------------------------------------------

    def _stored_range(self, first: int, last: int) -> tuple[int, int]:
        begin = self._stored[first] - (1 if self._bits[first] else 0)
        return begin, self._stored[last + 1] if last < self._last else self.header.compressed_size

    def _decoded(self, number: int, call: Call | None) -> bytes:
        # Small layers have one span, so their CRC can be checked before a byte is returned.
        sums = MemberSums(self.name) if self._last == 0 else None
        window = self._window(number, call)
        inflater = self._inflater(number, window, sums)
        # Each member's end copies what is left of the piece: with empty members, of 20 bytes, that is the work.
        step = _CHECKED_PIECE if self.header.version == SEVERAL_MEMBERS else _PIECE
        for data in self._stored_parts(number, _PIECE, call):
            for at in range(0, len(data), step):
                inflater.take(data[at : at + step])
        content = inflater.end(last=number == self._last)
        tail = content[-WINDOW:] if len(content) >= WINDOW else (window + content)[-WINDOW:]
        self._check_end(number, tail, inflater, call)
        return content

    def _beginning(self, number: int, length: int, call: Call | None) -> bytes:
        inflater = self._inflater(number, self._window(number, call), None)
        (begin, end), span = self._stored_range(number, number), inflater.left
        # One read, if the beginning compresses about as well as all of the span.
        step = max(1, min(end - begin, (end - begin) * length // span + _HEAD, _PIECE))
        for data in self._stored_parts(number, step, call):
            inflater.take(data)
            if span - inflater.left >= length:
                return inflater.taken()[:length]
        return inflater.end(last=number == self._last)[:length]

    def _inflater(
        self, number: int, window: bytes, sums: MemberSums | None, library: ModuleType = isal_zlib
    ) -> Inflater:
        length = self._end(number) - self._content[number]
        several = self.header.version == SEVERAL_MEMBERS
        offset = self._stored[number]
        return Inflater(window, length, several=several, sums=sums, blob=self.name, offset=offset, library=library)

    def _stored_parts(self, number: int, step: int, call: Call | None) -> Iterator[bytes]:
        begin, end = self._stored_range(number, number)
        bits = self._bits[number]
        for at in range(begin, end, step):
            data = self.below.read_at(at, min(step, end - at), call)
            yield begin_inside_byte(data[0], bits) + data[1:] if bits and at == begin else data

    def _begun(self, number: int, call: Call | None) -> LongSpan:
        window = self._window(number, call)
        return LongSpan(
            self.below,
            self._stored_range(number, number),
            self._bits[number],
            self._inflater(number, window, None, zlib),
            window,
            last=number == self._last,
            # It begins at the gzip header, not at a place that the index alone knows.
            trusted=number == 0,
            check=lambda tail, inflater, call: self._check_end(number, tail, inflater, call),
            keep=lambda piece, decode, call: self._spans.get((self._owner, number, piece), decode, call),
        )

    # -- checks ------------------------------------------------------------------------------------------------------

    # Checks a span by the last 32 KiB of content at its end.
    def _check_end(self, number: int, tail: bytes, inflater: Inflater, call: Call | None) -> None:
        if number < self._last:
            if tail != self._window(number + 1, call):
                raise CorruptBlobError(
                    f"content is not what the index has before entry {number + 1} (is it the index of another file?)",
                    blob=self.name,
                    offset=self._stored[number + 1],
                )
        elif self.header.version != SEVERAL_MEMBERS:
            got, wanted = parse_trailer(inflater.trailer())[1], self.header.uncompressed_size & 0xFFFFFFFF
            if got != wanted:
                what = "gzip file has another length in its trailer than in its index"
                raise CorruptBlobError(what, blob=self.name, got=got, wanted=wanted)

    # The window that ends a span is the one before the next: reading in order needs it twice.
    def _window(self, number: int, call: Call | None) -> bytes:
        recent, window = self._recent_window
        if recent == number:
            return window
        offset = self._windows[number]
        data = self._index.read_at(offset, self._lengths[number], call)
        window = parse_window(data, self.header, blob=self._index.name, offset=offset)
        self._recent_window = number, window
        return window

    # -- opening -----------------------------------------------------------------------------------------------------

    # The first entry is the end of the gzip header: in an index of another file it often is elsewhere.
    def _check_start(self) -> None:
        for most in (_HEAD, MAX_HEADER):
            head = self.below.read_at(0, min(most, self.below.size))
            try:
                length = header_length(head, blob=self.name)
                break
            except FormatError:
                if len(head) < most or most == MAX_HEADER or not head.startswith(MAGIC):
                    raise
        if self._bits[0] or self._stored[0] != length:
            raise FormatError(
                f"{self._index.name} is the index of another gzip file: its first entry is not at the header's end",
                blob=self.name,
                got=self._stored[0],
                wanted=length,
            )
