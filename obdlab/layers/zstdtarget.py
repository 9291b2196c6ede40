"""The content of a zstd layer, read at any place by the index of its frames (:mod:`obdlab.formats.zstdindex`).

A read decodes the spans it touches whole, and the last ones stay in memory. A frame cannot be entered in its midst:
one that is too long for memory is decoded once, from its beginning, into a file without a name.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import tempfile
import threading
from bisect import bisect_right
from functools import partial
from typing import IO, TYPE_CHECKING, cast

import zstandard

from obdlab.blob import Blob, check_range
from obdlab.call import UNBOUND
from obdlab.errors import CorruptBlobError, FormatError, SourceError
from obdlab.formats.zstdindex import HEADER_SIZE, MAX_SPANS, SPAN, ZstdIndex
from obdlab.layers.spancache import SpanCache
from obdlab.observe.counters import DECOMPRESSION_FAILURES

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.call import Call

#: Most content of a span that is decoded whole in memory.
MAX_SPAN = 16 << 20
#: Content of a long frame that is decoded by one read more than it needs, at most.
STEP = 1 << 20
_READ = 256 << 10
_LONGEST_WAIT_S = 600.0
_numbers = itertools.count()


class ZstdTarget(Blob):
    """The uncompressed content of ``compressed``, the blob below, by the index file ``index``.

    Both belong to the target unless the constructor raises: FormatError or CorruptBlobError for an index that is
    damaged or of a file of another size. A read raises CorruptBlobError if the bytes do not decode, or to another
    length than the index has; SourceError if there is no space for the content of a long frame.
    """

    below: Blob

    def __init__(self, compressed: Blob, index: Blob, *, spans: SpanCache | None = None) -> None:
        self.name = compressed.name
        self.below = compressed
        self._index = index
        self._spans = SpanCache() if spans is None else spans
        self._number = next(_numbers)
        if index.size > HEADER_SIZE + MAX_SPANS * SPAN.itemsize:
            raise FormatError("zstd index is too large", blob=index.name, got=index.size)
        self._stored_index = index.read_at(0, index.size)
        header = ZstdIndex.from_bytes(self._stored_index, blob=index.name)
        if header.compressed_size != compressed.size:
            raise FormatError(
                f"{index.name} is the index of another zstd file",
                blob=compressed.name,
                got=f"{compressed.size} bytes",
                wanted=header.compressed_size,
            )
        self._size = header.uncompressed_size
        self._content, self._stored, self._lengths = (
            memoryview(header.spans[name].astype("<i8").tobytes()).cast("q")
            for name in ("content", "stored", "length")
        )
        self._lock = threading.Lock()
        self._long: dict[int, _LongFrame] = {}
        self.decoded_bytes = 0

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        check_range(self, offset, length)
        end, parts = offset + length, []
        while offset < end:
            number = self._span_at(offset)
            begin, stop = self._content[number], min(end, self._end(number))
            parts.append(self._read_span(number, offset - begin, stop - offset, call))
            offset = stop
        return b"".join(parts)

    def map_range(self, begin: int, end: int) -> tuple[int, int]:
        check_range(self, begin, end - begin)
        if begin == end:
            return 0, 0
        first, last = self._span_at(begin), self._span_at(end - 1)
        return self._stored[first], self._stored[last] + self._lengths[last]

    def piece(self, offset: int) -> tuple[int, int] | None:
        """Return the span that a byte lies in; of a long frame, the step."""
        check_range(self, offset, 1)
        number = self._span_at(offset)
        begin, end = self._content[number], self._end(number)
        if end - begin <= MAX_SPAN:
            return begin, end
        at = begin + (offset - begin) // STEP * STEP
        return at, min(end, at + STEP)

    def statistics(self) -> dict[str, int]:
        return self.below.statistics() | {"decoded_bytes": self.decoded_bytes}

    def evict(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        if length:
            first, last = self._span_at(offset), self._span_at(offset + length - 1)
            self._forget(first, last)
        super().evict(offset, length)

    def index_digest(self) -> str:
        """Return the digest of the index file."""
        return f"sha256:{hashlib.sha256(self._stored_index).hexdigest()}"

    def close(self) -> None:
        self._forget(0, len(self._content))
        self._index.close()
        self.below.close()

    def _span_at(self, offset: int) -> int:
        return bisect_right(self._content, offset) - 1

    def _end(self, number: int) -> int:
        return self._content[number + 1] if number + 1 < len(self._content) else self._size

    def _forget(self, first: int, last: int) -> None:
        self._spans.drop(lambda key: self._is_mine(key, first, last))
        with self._lock:
            gone = [self._long.pop(number) for number in list(self._long) if first <= number <= last]
        for frame in gone:
            frame.close()

    def _is_mine(self, key: object, first: int, last: int) -> bool:
        target, number = cast("tuple[int, int]", key)[:2]
        return target == -1 - self._number and first <= number <= last

    def _read_span(self, number: int, offset: int, length: int, call: Call | None) -> bytes:
        if self._end(number) - self._content[number] > MAX_SPAN:
            return self._read_long(number, offset, length, call)
        # Spans of gzip targets have the keys from 0 on.
        span = self._spans.get((-1 - self._number, number), lambda: self._decode(number, call), call)
        return span[offset : offset + length]

    # A cache below may hold damaged bytes, and the origin sound ones.
    def _decode(self, number: int, call: Call | None) -> bytes:
        try:
            return self._decode_once(number, call)
        except CorruptBlobError:
            self._evict_span(number)
        return self._decode_once(number, call)

    def _decode_once(self, number: int, call: Call | None) -> bytes:
        decoder = self._decoder(number, call)
        data = decoder.read(self._end(number) - self._content[number])
        self.decoded_bytes += len(data)
        return data

    def _decoder(self, number: int, call: Call | None) -> _Decoder:
        begin = self._stored[number]
        length = self._end(number) - self._content[number]
        return _Decoder(self.below, begin, begin + self._lengths[number], length, call)

    def _evict_span(self, number: int) -> None:
        DECOMPRESSION_FAILURES.add()
        self.below.evict(self._stored[number], self._lengths[number])

    def _read_long(self, number: int, offset: int, length: int, call: Call | None) -> bytes:
        for last in (False, True):
            with self._lock:
                frame = self._long.get(number)
                if frame is None:
                    size = self._end(number) - self._content[number]
                    make = partial(self._decoder, number)
                    frame = self._long[number] = _LongFrame(make, size, self.name, self._spans.directory)
            try:
                return frame.read(offset, length, call)
            except CorruptBlobError:
                with self._lock:
                    if self._long.get(number) is frame:
                        del self._long[number]
                frame.close()
                if last:
                    raise
                self._evict_span(number)
        raise AssertionError


class _Source:
    # The stored bytes of one span as a file. Each read is on the terms of the call of that time.
    def __init__(self, below: Blob, begin: int, end: int, call: Call | None) -> None:
        self._below = below
        self.at, self._end = begin, end
        self.call = call

    def read(self, size: int = -1) -> bytes:
        length = min(_READ, self._end - self.at)
        data = self._below.read_at(self.at, length, self.call) if length else b""
        self.at += length
        return data


class _Decoder:
    # Decodes one span from its beginning, to exactly the content that the index has.
    def __init__(self, below: Blob, begin: int, end: int, length: int, call: Call | None) -> None:
        self._name = below.name
        self.source = _Source(below, begin, end, call)
        reading = cast("IO[bytes]", self.source)
        self._reader = zstandard.ZstdDecompressor().stream_reader(reading, read_across_frames=True)
        self._left = length

    def read(self, length: int) -> bytes:
        parts = []
        while length:
            part = self._some(length)
            if not part:
                what = f"zstd data ends {self._left} bytes before its index (is it the index of another file?)"
                raise CorruptBlobError(what, blob=self._name, offset=self.source.at)
            parts.append(part)
            length -= len(part)
            self._left -= len(part)
        if not self._left and self._some(1):
            what = "zstd data is longer than in its index (is it the index of another file?)"
            raise CorruptBlobError(what, blob=self._name, offset=self.source.at)
        return b"".join(parts)

    def _some(self, length: int) -> bytes:
        try:
            return self._reader.read(length)
        except (zstandard.ZstdError, MemoryError) as error:
            what = f"damaged zstd data ({error})"
            raise CorruptBlobError(what, blob=self._name, offset=self.source.at) from error


class _LongFrame:
    # The decoded beginning of a long frame, in a file without a name: nothing stays of it after a crash.
    def __init__(self, make: Callable[[Call | None], _Decoder], size: int, name: str, directory: str) -> None:
        self._make = make
        # None at first, and after an error: the bytes that a failed read had decoded are lost.
        self._decoder: _Decoder | None = None
        self._size = size
        self._name = name
        self._lock = threading.Lock()
        self._done = 0
        try:
            self._file = tempfile.TemporaryFile(dir=directory or None, buffering=0)  # noqa: SIM115 - close() closes it
        except OSError as error:
            raise self._failed(error) from error

    def read(self, offset: int, length: int, call: Call | None) -> bytes:
        if offset + length > self._done:
            self._decode_to(min(self._size, -(-(offset + length) // STEP) * STEP), call)
        try:
            data = os.pread(self._file.fileno(), length, offset)
        except (OSError, ValueError) as error:  # ValueError: closed meanwhile
            raise self._failed(error) from error
        if len(data) != length:
            raise SourceError("decoded bytes are gone from the temporary file", blob=self._name, offset=offset)
        return data

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _decode_to(self, end: int, call: Call | None) -> None:
        terms = call or UNBOUND
        terms.about_to_wait()
        if not self._lock.acquire(timeout=terms.left_s(_LONGEST_WAIT_S)):
            what = "another thread has not decoded the same frame in time"
            raise SourceError(what, blob=self._name, temporary=True)
        try:
            decoder, self._decoder = self._decoder, None
            if decoder is None:
                decoder = self._make(call)
                for at in range(0, self._done, STEP):
                    decoder.read(min(STEP, self._done - at))
            decoder.source.call = call
            while self._done < end:
                data = decoder.read(min(STEP, end - self._done))
                if os.pwrite(self._file.fileno(), data, self._done) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._done += len(data)
            self._decoder = decoder
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        finally:
            self._lock.release()

    def _failed(self, error: Exception) -> SourceError:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        return SourceError(f"cannot keep the decoded content of a zstd frame: {reason}", blob=self._name)
