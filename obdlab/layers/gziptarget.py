"""The content of a gzip layer, read at any place by its index (:mod:`obdlab.formats.gzipindex`).

The content between two entries, a span, is the unit of decoding: a read decodes the spans it touches whole, and the
last ones stay in memory. So reading in order inflates each byte once, and no inflater is kept between reads. A span
ends where the next entry's window can be compared with it, so an index of another file is found before a byte of the
span is returned.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import zlib
from bisect import bisect_right
from typing import TYPE_CHECKING, cast

from isal import isal_zlib

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
from obdlab.layers.longspan import LongSpan
from obdlab.layers.spancache import SpanCache
from obdlab.observe.counters import DECOMPRESSION_FAILURES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray

    from obdlab.call import Call


#: Most content of a span that is decoded whole. A span is the writer's distance of entries and one deflate block,
#: which has at most 4.2 MiB from any usual compressor.
MAX_SPAN = 16 << 20
# Compressed bytes in one read of the blob below; a usual span needs one read. Checking all of the file takes less at
# a time, 16 MiB of content at deflate's best rate.
_PIECE, _CHECKED_PIECE = 1 << 20, 16 << 10
_HEAD = 4 << 10
_numbers = itertools.count()


def load_index(index: Blob) -> tuple[IndexHeader, NDArray[np.void]]:
    """Return header and table (:data:`obdlab.formats.gzipindex.ENTRY`) of an index file.

    Raises FormatError, or CorruptBlobError for a wrong checksum.
    """
    head = index.read_at(0, min(HEADER_SIZE, index.size))
    header = IndexHeader.from_bytes(head, index_size=index.size, blob=index.name)
    stored = index.read_at(header.index_start, index.size - header.index_start)
    return header, parse_table(stored, header, blob=index.name)


class GzipTarget(Blob):
    """The uncompressed content of ``compressed``, the blob below, by the index file ``index``.

    Both belong to the target unless the constructor raises. It reads header and table of the index, and the gzip
    header; windows are read when they are needed. Raises FormatError or CorruptBlobError for an index that is damaged
    or not of this file, as far as that shows without inflating.

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
        self.header, table = load_index(index)
        header = self.header
        if header.compressed_size != compressed.size:
            raise FormatError(
                f"{index.name} is the index of another gzip file",
                blob=compressed.name,
                got=f"{compressed.size} bytes",
                wanted=header.compressed_size,
            )
        # One element of a memoryview costs a fifth of numpy's.
        self._content = memoryview(table["content"].tobytes()).cast("q")
        self._stored = memoryview(table["stored"].tobytes()).cast("q")
        self._bits = table["bits"].tobytes()
        self._windows = memoryview(table["window"].tobytes()).cast("q")
        self._lengths = memoryview(table["length"].tobytes()).cast("I")
        self._last = len(self._content) - 1
        self._long_spans: dict[int, LongSpan] = {}
        self._lock = threading.Lock()
        self._check_start()

    @property
    def size(self) -> int:
        return self.header.uncompressed_size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        end = offset + length
        if offset < 0 or length <= 0 or end > self.header.uncompressed_size:
            check_range(self, offset, length)
            return b""
        first = bisect_right(self._content, offset) - 1
        begin = self._content[first]
        if end <= self._end(first):
            return self._read_span(first, offset - begin, length, call)
        parts = []
        while offset < end:
            stop = min(end, self._end(first))
            parts.append(self._read_span(first, offset - self._content[first], stop - offset, call))
            offset = stop
            first += 1
        return b"".join(parts)

    def map_range(self, begin: int, end: int) -> tuple[int, int]:
        check_range(self, begin, end - begin)
        if begin == end:
            return 0, 0
        return self._stored_range(bisect_right(self._content, begin) - 1, bisect_right(self._content, end - 1) - 1)

    def piece(self, offset: int) -> tuple[int, int] | None:
        """Return the span that a byte lies in; of a long one, the part between two copies of the inflater's state."""
        check_range(self, offset, 1)
        number = bisect_right(self._content, offset) - 1
        begin, end = self._content[number], self._end(number)
        if end - begin <= MAX_SPAN:
            return begin, end
        part = self._long_span(number, None).piece(offset - begin)
        return None if part is None else (begin + part[0], begin + part[1])

    def statistics(self) -> dict[str, int]:
        """Return the counters of the blob below, and those of inflating, which are not counted under a lock."""
        long = sum(span.inflated_bytes for span in list(self._long_spans.values()))
        own = {"inflated_spans": self.inflated_spans, "inflated_bytes": self.inflated_bytes + long}
        return self.below.statistics() | own

    def evict(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        if length:
            first, last = (bisect_right(self._content, at) - 1 for at in (offset, offset + length - 1))
            self._spans.drop(lambda key: self._is_mine(key, first, last))
            for number in range(first, last + 1) if self._long_spans else ():
                if number in self._long_spans:
                    self._long_spans[number].forget()
        super().evict(offset, length)

    def close(self) -> None:
        """Close the compressed file and the index."""
        self._spans.drop(lambda key: self._is_mine(key, 0, self._last))
        self._index.close()
        self.below.close()

    def index_digest(self) -> str:
        """Return the digest of the index file. Raises what reading it raises."""
        whole = hashlib.sha256()
        for at in range(0, self._index.size, _PIECE):
            whole.update(self._index.read_at(at, min(_PIECE, self._index.size - at)))
        return f"sha256:{whole.hexdigest()}"

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

    def _end(self, number: int) -> int:
        return self._content[number + 1] if number < self._last else self.header.uncompressed_size

    def _stored_range(self, first: int, last: int) -> tuple[int, int]:
        begin = self._stored[first] - (1 if self._bits[first] else 0)
        return begin, self._stored[last + 1] if last < self._last else self.header.compressed_size

    def _is_mine(self, key: object, first: int, last: int) -> bool:
        target, number = cast("tuple[int, ...]", key)[:2]
        return target == self._number and first <= number <= last

    def _read_span(self, number: int, offset: int, length: int, call: Call | None) -> bytes:
        if self._end(number) - self._content[number] > MAX_SPAN:
            return self._read_long(number, offset, length, call)
        span = self._spans.get((self._number, number), lambda: self._decode(number, call), call)
        return span[offset : offset + length]

    # A cache below may hold damaged bytes, and the origin sound ones.
    def _decode(self, number: int, call: Call | None) -> bytes:
        try:
            return self._inflate(number, call)
        except CorruptBlobError:
            self._evict_span(number)
        return self._inflate(number, call)

    def _inflate(self, number: int, call: Call | None) -> bytes:
        # Small layers have one span, so their CRC can be checked before a byte is returned.
        sums = MemberSums(self.name) if self._last == 0 else None
        window = self._window(number, call)
        inflater = self._inflater(number, window, sums)
        for data in self._stored_parts(number, _PIECE, call):
            inflater.take(data)
        content = inflater.end(last=number == self._last)
        tail = content[-WINDOW:] if len(content) >= WINDOW else (window + content)[-WINDOW:]
        self._check_end(number, tail, inflater, call)
        self.inflated_spans += 1
        self.inflated_bytes += len(content)
        return content

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

    def _evict_span(self, number: int) -> None:
        DECOMPRESSION_FAILURES.add()
        begin, end = self._stored_range(number, number)
        self.below.evict(begin, end - begin)

    # -- spans too long to be decoded at once ------------------------------------------------------------------------

    def _read_long(self, number: int, offset: int, length: int, call: Call | None) -> bytes:
        span = self._long_span(number, call)
        try:
            return span.read(offset, length, call)
        except CorruptBlobError:
            self._evict_span(number)
            span.forget()
        return span.read(offset, length, call)

    def _long_span(self, number: int, call: Call | None) -> LongSpan:
        with self._lock:
            span = self._long_spans.get(number)
            if span is None:
                begin, end = self._stored_range(number, number)
                window = self._window(number, call)
                span = self._long_spans[number] = LongSpan(
                    self.below,
                    (begin, end),
                    self._bits[number],
                    self._inflater(number, window, None, zlib),
                    window,
                    last=number == self._last,
                    # It begins at the gzip header, not at a place that the index alone knows.
                    trusted=number == 0,
                    check=lambda tail, inflater, call: self._check_end(number, tail, inflater, call),
                    keep=lambda piece, decode, call: self._spans.get((self._number, number, piece), decode, call),
                )
        return span

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
