"""The content of a zstd layer, read at any place by the index of its frames (:mod:`obdlab.formats.zstdindex`).

A span is one or more whole frames. A frame cannot be entered in its midst: one that is too long for memory is decoded
once, from its beginning, into a file without a name.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from functools import partial
from typing import IO, TYPE_CHECKING, cast

import zstandard

from obdlab.call import UNBOUND
from obdlab.errors import CorruptBlobError, FormatError, SourceError
from obdlab.formats.zstdindex import HEADER_SIZE, MAX_SPANS, SPAN, ZstdIndex
from obdlab.layers.spannedtarget import SpannedTarget, check_owner
from obdlab.system.keptfree import kept_free

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Blob
    from obdlab.call import Call
    from obdlab.layers.spancache import SpanCache

#: Content of a long frame that is decoded by one read more than it needs, at most.
STEP = 1 << 20
_READ = 256 << 10
_LONGEST_WAIT_S = 600.0
#: Left free on the file system of a long frame's file: the frame's size is an image's word.
_LEAST_FREE = 1 << 30
# Closing waits so long for a thread that decodes; the file, which has no name, then goes with the object.
_CLOSE_S = 10.0


class ZstdTarget(SpannedTarget):
    """The uncompressed content of ``compressed``, the blob below, by the index file ``index``.

    Both belong to the target unless the constructor raises: FormatError or CorruptBlobError for an index that is
    damaged or of a file of another size. A read raises CorruptBlobError if the bytes do not decode, or to another
    length than the index has; SourceError if there is no space for the content of a long frame.
    """

    def __init__(
        self, compressed: Blob, index: Blob, *, spans: SpanCache | None = None, checked_above: bool = False
    ) -> None:
        if index.size > HEADER_SIZE + MAX_SPANS * SPAN.itemsize:
            raise FormatError("zstd index is too large", blob=index.name, got=index.size)
        header = ZstdIndex.from_bytes(index.read_at(0, index.size), blob=index.name)
        check_owner(index, compressed, header.compressed_size, "zstd")
        content, self._stored, self._lengths = (
            memoryview(header.spans[name].astype("<i8").tobytes()).cast("q")
            for name in ("content", "stored", "length")
        )
        size = header.uncompressed_size
        super().__init__(compressed, index, spans, content=content, size=size, checked_above=checked_above)

    def _stored_range(self, first: int, last: int) -> tuple[int, int]:
        return self._stored[first], self._stored[last] + self._lengths[last]

    def _decoded(self, number: int, call: Call | None) -> bytes:
        return self._decoder(number, call).read(self._end(number) - self._content[number])

    def _beginning(self, number: int, length: int, call: Call | None) -> bytes:
        return self._decoder(number, call).read(length)

    def _begun(self, number: int, call: Call | None) -> _LongFrame:
        size = self._end(number) - self._content[number]
        return _LongFrame(partial(self._decoder, number), size, self.name, self._spans.directory)

    def _decoder(self, number: int, call: Call | None) -> _Decoder:
        begin, end = self._stored_range(number, number)
        return _Decoder(self.below, begin, end, self._end(number) - self._content[number], call)


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


def _check_room(fd: int) -> None:
    status = os.fstatvfs(fd)
    floor = kept_free(status.f_blocks * status.f_frsize, _LEAST_FREE)
    if status.f_bavail * status.f_frsize < floor + STEP:
        raise OSError(errno.ENOSPC, f"less than {floor >> 20} MiB would be left on its disk")


class _LongFrame:
    # The decoded beginning of a long frame, in a file without a name: nothing stays of it after a crash.
    def __init__(self, make: Callable[[Call | None], _Decoder], size: int, name: str, directory: str) -> None:
        self._make = make
        # None at first, and after an error: the bytes that a failed read had decoded are lost.
        self._decoder: _Decoder | None = None
        self._size = size
        self._name = name
        self._directory = directory
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._done = 0
        self._stale = False
        self.decoded_bytes = 0

    def read(self, offset: int, length: int, call: Call | None = None) -> bytes:
        if self._stale or offset + length > self._done:
            self._decode_to(min(self._size, -(-(offset + length) // STEP) * STEP), call)
        try:
            data = os.pread(self._fd(), length, offset)
        except (OSError, ValueError) as error:  # ValueError: closed meanwhile
            raise self._failed(error) from error
        if len(data) != length:
            raise SourceError("decoded bytes are gone from the temporary file", blob=self._name, offset=offset)
        return data

    def piece(self, offset: int) -> tuple[int, int]:
        at = offset // STEP * STEP
        return at, min(self._size, at + STEP)

    def forget(self) -> None:
        # The next read does, as the lock may be held for long.
        self._stale = True

    def close(self) -> None:
        if self._lock.acquire(timeout=_CLOSE_S):
            try:
                if self._file is not None:
                    self._file.close()
            finally:
                self._lock.release()

    def _fd(self) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._directory or None, buffering=0)  # noqa: SIM115 - close() closes it
        return self._file.fileno()

    def _decode_to(self, end: int, call: Call | None) -> None:
        terms = call or UNBOUND
        terms.about_to_wait()
        if not self._lock.acquire(timeout=terms.left_s(_LONGEST_WAIT_S)):
            what = "another thread has not decoded the same frame in time"
            raise SourceError(what, blob=self._name, temporary=True)
        try:
            if self._stale:
                self._stale = False
                self._decoder, self._done = None, 0
            fd = self._fd()
            decoder, self._decoder = self._decoder, None
            if decoder is None:
                decoder = self._make(call)
                for at in range(0, self._done, STEP):
                    self.decoded_bytes += len(decoder.read(min(STEP, self._done - at)))
            decoder.source.call = call
            while self._done < end:
                _check_room(fd)
                data = decoder.read(min(STEP, end - self._done))
                self.decoded_bytes += len(data)
                if os.pwrite(fd, data, self._done) != len(data):
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
