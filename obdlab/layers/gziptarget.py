"""The content of a gzip layer, read at any place by its index (:mod:`obdlab.formats.gzipindex`).

The content between two entries, a span, is the unit of decoding: a read decodes the spans it touches whole, and the
last ones stay in memory. So reading in order inflates each byte once, and no inflater is kept between reads. A span
ends where the next entry's window can be compared with it, so an index of another file is found before a byte of the
span is returned.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from typing import TYPE_CHECKING, cast

import numpy as np

from obdlab.blob import Blob, check_range
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
from obdlab.layers.spancache import SpanCache
from obdlab.observe.counters import DECOMPRESSION_FAILURES

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Most content between two entries. A span is decoded whole into memory, and is one span of the original's plus one
#: block of deflate, of 4.2 MiB at most from any usual compressor.
MAX_SPAN = 16 << 20
# Compressed bytes in one read of the blob below; a usual span needs one read.
_PIECE = 1 << 20
_HEAD = 4 << 10
_numbers = itertools.count()


class SpanTooLongError(FormatError, code="span-too-long"):
    """An index without an entry for so long that reading at one place would decode too much at once."""


class GzipTarget(Blob):
    """The uncompressed content of ``compressed``, the blob below, by the index file ``index``.

    Both belong to the target unless the constructor raises. It reads header and table of the index, and the gzip
    header; windows are read when they are needed. Raises FormatError or CorruptBlobError for an index that is damaged
    or not of this file, as far as that shows without inflating; SpanTooLongError.

    A read raises CorruptBlobError if the bytes do not inflate, or to another length or end of the span than the index
    has. Other damage is found by :meth:`verify` alone: gzip has one checksum for all of the content.
    """

    below: Blob

    def __init__(self, compressed: Blob, index: Blob, *, spans: SpanCache | None = None) -> None:
        self.name = compressed.name
        self.below = compressed
        self._index = index
        self._spans = SpanCache() if spans is None else spans
        self._number = next(_numbers)
        self._recent_window = -1, b""
        self.inflated_spans = 0
        self.inflated_bytes = 0
        head = index.read_at(0, min(HEADER_SIZE, index.size))
        self.header = header = IndexHeader.from_bytes(head, index_size=index.size, blob=index.name)
        if header.compressed_size != compressed.size:
            raise FormatError(
                f"{index.name} is the index of another gzip file",
                blob=compressed.name,
                got=f"{compressed.size} bytes",
                wanted=header.compressed_size,
            )
        stored = index.read_at(header.index_start, index.size - header.index_start)
        table = parse_table(stored, header, blob=index.name)
        # One element of a memoryview costs a fifth of numpy's.
        self._content = memoryview(table["content"].tobytes()).cast("q")
        self._stored = memoryview(table["stored"].tobytes()).cast("q")
        self._bits = table["bits"].tobytes()
        self._windows = memoryview(table["window"].tobytes()).cast("q")
        self._lengths = memoryview(table["length"].tobytes()).cast("I")
        self._last = len(self._content) - 1
        self._check_spans()
        self._check_start()

    @property
    def size(self) -> int:
        return self.header.uncompressed_size

    def read_at(self, offset: int, length: int) -> bytes:
        end = offset + length
        if offset < 0 or length <= 0 or end > self.header.uncompressed_size:
            check_range(self, offset, length)
            return b""
        first = bisect_right(self._content, offset) - 1
        begin = self._content[first]
        if end <= self._end(first):
            return self._span(first)[offset - begin : end - begin]
        parts = []
        while offset < end:
            span = self._span(first)
            begin = self._content[first]
            parts.append(span[offset - begin : end - begin])
            offset = begin + len(span)
            first += 1
        return b"".join(parts)

    def map_range(self, begin: int, end: int) -> tuple[int, int]:
        check_range(self, begin, end - begin)
        if begin == end:
            return 0, 0
        return self._stored_range(bisect_right(self._content, begin) - 1, bisect_right(self._content, end - 1) - 1)

    def piece(self, offset: int) -> tuple[int, int]:
        """Return the span that a byte lies in."""
        check_range(self, offset, 1)
        number = bisect_right(self._content, offset) - 1
        return self._content[number], self._end(number)

    def statistics(self) -> dict[str, int]:
        """Return the counters of the blob below, and those of inflating, which are not counted under a lock."""
        own = {"inflated_spans": self.inflated_spans, "inflated_bytes": self.inflated_bytes}
        return self.below.statistics() | own

    def evict(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        if length:
            first, last = (bisect_right(self._content, at) - 1 for at in (offset, offset + length - 1))
            self._spans.drop(lambda key: self._is_mine(key, first, last))
        super().evict(offset, length)

    def close(self) -> None:
        """Close the compressed file and the index."""
        self._spans.drop(lambda key: self._is_mine(key, 0, self._last))
        self._index.close()
        self.below.close()

    def verify(self) -> Iterator[int]:
        """Inflate everything and check every window, and length and CRC of every gzip member.

        Yields the number of bytes checked since the last time. Raises CorruptBlobError; reading all of it found no
        fault otherwise.
        """
        sums = MemberSums(self.name)
        for number in range(self._last + 1):
            yield len(self._inflate(number, sums))

    # -- spans -------------------------------------------------------------------------------------------------------

    def _end(self, number: int) -> int:
        return self._content[number + 1] if number < self._last else self.header.uncompressed_size

    def _stored_range(self, first: int, last: int) -> tuple[int, int]:
        begin = self._stored[first] - (1 if self._bits[first] else 0)
        return begin, self._stored[last + 1] if last < self._last else self.header.compressed_size

    def _is_mine(self, key: object, first: int, last: int) -> bool:
        target, number = cast("tuple[int, int]", key)
        return target == self._number and first <= number <= last

    def _span(self, number: int) -> bytes:
        return self._spans.get((self._number, number), lambda: self._decode(number))

    # A cache below may hold damaged bytes, and the origin sound ones.
    def _decode(self, number: int) -> bytes:
        # Small layers have one span, so their CRC can be checked before a byte is returned.
        whole = self._last == 0
        try:
            return self._inflate(number, MemberSums(self.name) if whole else None)
        except CorruptBlobError:
            DECOMPRESSION_FAILURES.add()
            begin, end = self._stored_range(number, number)
            self.below.evict(begin, end - begin)
        return self._inflate(number, MemberSums(self.name) if whole else None)

    def _inflate(self, number: int, sums: MemberSums | None) -> bytes:
        begin, end = self._stored_range(number, number)
        window, bits = self._window(number), self._bits[number]
        several = self.header.version == SEVERAL_MEMBERS
        length = self._end(number) - self._content[number]
        inflater = Inflater(window, length, several=several, sums=sums, blob=self.name, offset=begin)
        for at in range(begin, end, _PIECE):
            data = self.below.read_at(at, min(_PIECE, end - at))
            inflater.take(begin_inside_byte(data[0], bits) + data[1:] if bits and at == begin else data)
        last = number == self._last
        content = inflater.end(last=last)
        if not last:
            self._check_window(number + 1, content, window)
        elif not several:
            self._check_length(inflater.trailer())
        self.inflated_spans += 1
        self.inflated_bytes += length
        return content

    # The window that ends a span is the one before the next: reading in order needs it twice.
    def _window(self, number: int) -> bytes:
        recent, window = self._recent_window
        if recent == number:
            return window
        offset = self._windows[number]
        data = self._index.read_at(offset, self._lengths[number])
        window = parse_window(data, self.header, blob=self._index.name, offset=offset)
        self._recent_window = number, window
        return window

    def _check_window(self, number: int, content: bytes, window: bytes) -> None:
        wanted = self._window(number)
        here = content[-WINDOW:]
        if here != wanted[WINDOW - len(here) :] or window[len(here) :] != wanted[: WINDOW - len(here)]:
            raise CorruptBlobError(
                f"content is not what the index has before entry {number} (is it the index of another file?)",
                blob=self.name,
                offset=self._stored[number],
            )

    def _check_length(self, trailer: bytes) -> None:
        got, wanted = parse_trailer(trailer)[1], self.header.uncompressed_size & 0xFFFFFFFF
        if got != wanted:
            what = "gzip file has another length in its trailer than in its index"
            raise CorruptBlobError(what, blob=self.name, got=got, wanted=wanted)

    # -- opening -----------------------------------------------------------------------------------------------------

    def _check_spans(self) -> None:
        longest = int(np.diff(np.array(self._content), append=self.size).max())
        if longest > MAX_SPAN:
            raise SpanTooLongError(
                "too few places to begin inflating, as in one giant deflate block",
                blob=self.name,
                got=f"{longest} bytes from one to the next",
                wanted=f"at most {MAX_SPAN}",
            )

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
