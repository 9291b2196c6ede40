"""The content of a compressed layer, decoded span by span: all that does not depend on the compression.

A span is the content between two places at which decoding can begin. A read decodes the spans it touches whole, and
the last ones stay in memory (:mod:`obdlab.layers.spancache`). So reading in order decodes each byte once, and no
decoder is kept between reads. A span that is too long for that is decoded in parts (:class:`Long`).
"""

from __future__ import annotations

import hashlib
import threading
from abc import abstractmethod
from bisect import bisect_right
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from obdlab.blob import Blob, check_range
from obdlab.errors import CorruptBlobError, FormatError
from obdlab.layers.spancache import SpanCache
from obdlab.observe.counters import DECOMPRESSION_FAILURES

if TYPE_CHECKING:
    from obdlab.call import Call

#: Most content of a span that is decoded whole. Usual spans are shorter: one of gzip is the index writer's distance
#: of entries and one deflate block, which has at most 4.2 MiB from any usual compressor.
MAX_SPAN = 16 << 20
_PIECE = 1 << 20


class Long(Protocol):
    """A span too long to be decoded whole. Offsets count from its beginning. Thread-safe."""

    #: Bytes decoded so far, those that were decoded again included.
    decoded_bytes: int

    def read(self, offset: int, length: int, call: Call | None = None) -> bytes:
        """Return bytes of the span. Raises as :meth:`Blob.read_at`."""

    def piece(self, offset: int) -> tuple[int, int] | None:
        """Return the range that is decoded with a byte; None if that is not known yet."""

    def forget(self) -> None:
        """Decode again what is read from now on."""

    def close(self) -> None:
        """Give back what it holds."""


class SpannedTarget(Blob):
    """The content of ``compressed``, the blob below, by the file ``index``; both belong to it once it is made.

    ``content`` has the offset in the content at which each span begins: the first is 0, and they increase. ``size``
    is that of all content. A subclass decodes the spans, and knows where they are stored.

    A span whose bytes do not decode is evicted from the caches below, and decoded once more. With ``checked_above`` a
    caller compares with digests all that it reads, in pieces about as long as a span: then a read elsewhere than the
    one before decodes no more of its last span than it needs, and returns that unchecked.
    """

    below: Blob

    def __init__(
        self,
        compressed: Blob,
        index: Blob,
        spans: SpanCache | None,
        *,
        content: memoryview,
        size: int,
        checked_above: bool,
    ) -> None:
        self.name = compressed.name
        self.below = compressed
        self._index = index
        self._content = content
        self._size = size
        self._last = len(content) - 1
        self._spans = SpanCache() if spans is None else spans
        self._owner = self._spans.new_owner()
        self._lock = threading.Lock()
        self._long: dict[int, Long] = {}
        self._checked_above = checked_above
        self._recent = -1  # the last span of the read before
        #: Spans that were decoded whole, and their bytes. Not counted under a lock.
        self.decoded_spans = self._decoded_bytes = 0

    # -- of the compression ------------------------------------------------------------------------------------------

    @abstractmethod
    def _stored_range(self, first: int, last: int) -> tuple[int, int]:
        """Return the range of the blob below that decoding these spans, and all between them, reads."""

    @abstractmethod
    def _decoded(self, number: int, call: Call | None) -> bytes:
        """Return a span, read and checked. Raises CorruptBlobError."""

    @abstractmethod
    def _beginning(self, number: int, length: int, call: Call | None) -> bytes:
        """Return the first bytes of a span, without a look at its end. Raises CorruptBlobError."""

    @abstractmethod
    def _begun(self, number: int, call: Call | None) -> Long:
        """Return a long span of which nothing is decoded yet."""

    # -- the Blob ----------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return self._size

    @property
    def decoded_bytes(self) -> int:
        """Bytes decoded so far, those that were decoded again included."""
        return self._decoded_bytes + sum(span.decoded_bytes for span in list(self._long.values()))

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        end = offset + length
        if offset < 0 or length <= 0 or end > self._size:
            check_range(self, offset, length)
            return b""
        first = bisect_right(self._content, offset) - 1
        if end <= self._end(first):
            self._recent = first
            return self._read_span(first, offset - self._content[first], length, call)
        last = bisect_right(self._content, end - 1) - 1
        in_order = self._recent <= first <= self._recent + 1
        self._recent = last
        parts = [self._read_span(first, offset - self._content[first], self._end(first) - offset, call)]
        parts += [
            self._read_span(number, 0, self._end(number) - self._content[number], call)
            for number in range(first + 1, last)
        ]
        read_end = self._read_span if in_order or not self._checked_above else self._read_beginning
        parts.append(read_end(last, 0, end - self._content[last], call))
        return b"".join(parts)

    def map_range(self, begin: int, end: int) -> tuple[int, int]:
        check_range(self, begin, end - begin)
        return self._stored_range(*self._spans_of(begin, end)) if begin < end else (0, 0)

    def piece(self, offset: int) -> tuple[int, int] | None:
        """Return the span that a byte lies in; of a long one, the part of it that is decoded at once."""
        check_range(self, offset, 1)
        number = bisect_right(self._content, offset) - 1
        begin, end = self._content[number], self._end(number)
        if end - begin <= MAX_SPAN:
            return begin, end
        part = self._long_span(number, None).piece(offset - begin)
        return None if part is None else (begin + part[0], begin + part[1])

    def statistics(self) -> dict[str, int]:
        """Return the counters of the blob below, and those of decoding."""
        own = {"decoded_spans": self.decoded_spans, "decoded_bytes": self.decoded_bytes}
        return self.below.statistics() | own

    def evict(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        if length:
            first, last = self._spans_of(offset, offset + length)
            self._spans.drop(self._owner, first, last)
            for number in range(first, last + 1) if self._long else ():
                if number in self._long:
                    self._long[number].forget()
        super().evict(offset, length)

    def close(self) -> None:
        """Close the compressed file and the index."""
        self._spans.drop(self._owner, 0, self._last)
        for span in list(self._long.values()):
            span.close()
        self._index.close()
        self.below.close()

    def index_digest(self) -> str:
        """Return the digest of the index file. Raises what reading it raises."""
        whole = hashlib.sha256()
        for at in range(0, self._index.size, _PIECE):
            whole.update(self._index.read_at(at, min(_PIECE, self._index.size - at)))
        return f"sha256:{whole.hexdigest()}"

    # -- spans -------------------------------------------------------------------------------------------------------

    def _end(self, number: int) -> int:
        return self._content[number + 1] if number < self._last else self._size

    def _spans_of(self, begin: int, end: int) -> tuple[int, int]:
        return bisect_right(self._content, begin) - 1, bisect_right(self._content, end - 1) - 1

    def _read_span(self, number: int, offset: int, length: int, call: Call | None) -> bytes:
        if self._end(number) - self._content[number] > MAX_SPAN:
            return self._read_long(number, offset, length, call)
        span = self._spans.get((self._owner, number), lambda: self._decode(number, call), call)
        return span[offset : offset + length]

    # The rest of the span is not decoded if that is less work: no reader may want it.
    def _read_beginning(self, number: int, offset: int, length: int, call: Call | None) -> bytes:
        span = self._end(number) - self._content[number]
        if length <= span // 2 and span <= MAX_SPAN and not self._spans.has((self._owner, number)):
            with suppress(CorruptBlobError):  # the whole span is evicted and tried again
                beginning = self._beginning(number, length, call)
                self._decoded_bytes += length
                return beginning
        return self._read_span(number, offset, length, call)

    # A cache below may hold damaged bytes, and the origin sound ones.
    def _decode(self, number: int, call: Call | None) -> bytes:
        try:
            content = self._decoded(number, call)
        except CorruptBlobError:
            self._evict_stored(number)
            content = self._decoded(number, call)
        self.decoded_spans += 1
        self._decoded_bytes += len(content)
        return content

    def _read_long(self, number: int, offset: int, length: int, call: Call | None) -> bytes:
        span = self._long_span(number, call)
        try:
            return span.read(offset, length, call)
        except CorruptBlobError:
            self._evict_stored(number)
            span.forget()
        return span.read(offset, length, call)

    def _evict_stored(self, number: int) -> None:
        DECOMPRESSION_FAILURES.add()
        begin, end = self._stored_range(number, number)
        self.below.evict(begin, end - begin)

    def _long_span(self, number: int, call: Call | None) -> Long:
        with self._lock:
            span = self._long.get(number)
            if span is None:
                span = self._long[number] = self._begun(number, call)
        return span


def check_owner(index: Blob, compressed: Blob, size: int, compression: str) -> None:
    """Raise FormatError unless the file that ``index`` was made of has the size of ``compressed``."""
    if size != compressed.size:
        raise FormatError(
            f"{index.name} is the index of another {compression} file",
            blob=compressed.name,
            got=f"{compressed.size} bytes",
            wanted=size,
        )
