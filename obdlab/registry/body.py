"""Response bodies that must hold exactly the requested data: a byte range, a whole blob, a small document."""

from __future__ import annotations

import hashlib
import io
import re
import time
from typing import TYPE_CHECKING

from obdlab.call import Call
from obdlab.errors import CorruptBlobError
from obdlab.formats.decimal import decimal
from obdlab.registry.answer import TRANSPORT_ERRORS
from obdlab.registry.errors import RangesIgnoredError, RegistryError
from obdlab.registry.failures import from_exception, persist

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from obdlab.registry.answer import Answer

# A registry that ignores Range sends the blob from its start: up to this offset skipping is cheaper than failing.
MAX_SKIP = 4 << 20
_SKIP_CHUNK = 256 << 10
# A stream gets a fresh deadline for each window of this size.
_STREAM_WINDOW = 1 << 20

_CONTENT_RANGE = re.compile(r"\s*bytes\s+(\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\s*", re.ASCII | re.IGNORECASE)
_UNSATISFIED = re.compile(r"\s*bytes\s+\*/(\d{1,19})\s*", re.ASCII | re.IGNORECASE)


def read_small(response: Answer, limit: int, doing: str) -> bytes:
    """Return the whole body. Raises RegistryError if it is longer than ``limit`` or incomplete."""
    try:
        data = response.read(limit + 1)
        complete = response.left in (None, 0)
    except TRANSPORT_ERRORS as error:
        raise from_exception(error, doing) from error
    finally:
        response.close()
    if len(data) > limit:
        raise RegistryError(f"{doing}: answer longer than {limit} bytes")
    if not complete:
        raise RegistryError(f"{doing}: answer broke off after {len(data)} bytes", temporary=True)
    return data


def read_range(response: Answer, offset: int, length: int, doing: str, size: int | None = None) -> bytes:
    """Return exactly the bytes ``[offset, offset + length)`` from the answer to a range request.

    A 206 must name this very range. Of a 200, the whole blob, the part before the range is skipped if it is small. An
    answer for a blob of another ``size``, if given, is refused. Raises RegistryError.
    """
    try:
        go_to_range(response, offset, length, doing, size)
        data = response.read(length)
        if len(data) < length:
            data = _read_rest(response, data, length, doing)
        # Without a length (chunked, or until the connection closes) only the end shows that the body is complete.
        if response.status == 206 and response.left is None and response.read(1):
            raise RegistryError(f"{doing}: body longer than its range", temporary=True)
    except TRANSPORT_ERRORS as error:
        raise from_exception(error, doing) from error
    finally:
        response.close()
    return data


def go_to_range(response: Answer, offset: int, length: int, doing: str, size: int | None = None) -> None:
    """Position the answer to a range request at ``offset``, its next byte. Raises as :func:`read_range` does."""
    if response.compressed:
        got = response.headers.get("content-encoding", "")[:80]
        raise RegistryError(f"{doing}: answer with another encoding (got {got!r}, wanted identity)")
    if response.status == 206:
        _check_content_range(response, offset, length, doing, size)
        return
    _check_size(response.left, size, doing)
    _skip(response, offset, doing)


def total_size(response: Answer, doing: str) -> int:
    """Return the blob's size from the answer to a range request: 206, 200, or 416 for an empty blob.

    Raises RegistryError.
    """
    content_range = response.headers.get("content-range", "")
    if response.status == 200:
        text = response.headers.get("content-length", "")
    elif response.status == 416:
        unsatisfied = _UNSATISFIED.fullmatch(content_range)
        text = unsatisfied[1] if unsatisfied else ""
    else:
        match = _CONTENT_RANGE.fullmatch(content_range)
        text = match[3] if match else ""
    response.close()
    size = decimal(text)
    if size is None:
        raise RegistryError(f"{doing}: registry does not say the size (got {text[:80]!r})")
    return size


class BlobStream(io.RawIOBase):
    """A blob read from start to end, checked against its size and sha256 digest; reopened after breaks.

    Leaving its ``with`` block without an error reads and checks the rest; so does reading the last byte. Until then
    the data is unverified. Raises RegistryError when the registry fails for longer than the deadline,
    CorruptBlobError when the content does not match.
    """

    def __init__(
        self,
        open_at: Callable[[int, Call], Answer],
        *,
        name: str,
        digest: str,
        size: int,
        deadline_s: float,
    ) -> None:
        self._open_at = open_at
        self._name = name
        self._digest = digest
        self._size = size
        self._deadline_s = deadline_s
        self._hash = hashlib.sha256()
        self._position = 0
        self._response: Answer | None = None
        self._window_end = 0
        self._window_left_s = 0.0

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._position

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to ``size`` bytes; fewer only at the end or after a break."""
        if size is None or size < 0:
            return self.readall()
        if self.closed:
            raise ValueError("read from a closed blob stream")
        size = min(size, self._size - self._position)
        data = self._read_on(size) if size else b""
        self._hash.update(data)
        self._position += len(data)
        if self._position == self._size:
            self._verify()
        return data

    def readall(self) -> bytes:
        chunks = []
        while chunk := self.read(_STREAM_WINDOW):
            chunks.append(chunk)
        return b"".join(chunks)

    def readinto(self, buffer: object, /) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Stop reading. Unread bytes are not checked."""
        if self._response is not None:
            self._response.close()
            self._response = None
        super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and not self.closed:
                while self.read(_STREAM_WINDOW):
                    pass
        finally:
            self.close()

    def _read_on(self, size: int) -> bytes:
        if self._position >= self._window_end:
            self._window_end = self._position + _STREAM_WINDOW
            self._window_left_s = self._deadline_s
        started = time.monotonic()  # only the time spent here counts: the caller may be slow
        call = Call(started + self._window_left_s)
        try:
            return persist(lambda terms: self._attempt(size, terms), call, blob=self._name, offset=self._position)
        finally:
            self._window_left_s -= time.monotonic() - started

    def _attempt(self, size: int, call: Call) -> bytes:
        doing = "reading blob"
        try:
            if self._response is None:
                self._response = self._open_at(self._position, call)
                self._check_start(self._response, doing)
            data = self._response.read(size, call)
            if not data:
                raise RegistryError(f"{doing}: answer broke off", temporary=True)
        except (*TRANSPORT_ERRORS, RegistryError) as error:
            if self._response is not None:
                self._response.close()
                self._response = None
            raise error if isinstance(error, RegistryError) else from_exception(error, doing) from error
        return data

    def _check_start(self, response: Answer, doing: str) -> None:
        left = self._size - self._position
        if response.status == 206:
            _check_content_range(response, self._position, left, doing, self._size)
        else:
            _check_size(response.left, self._size, doing)
            _skip(response, self._position, doing, limit=self._position)

    def _verify(self) -> None:
        if self._has_more():
            raise CorruptBlobError("blob longer than it should be", blob=self._name, wanted=self._size)
        digest = f"sha256:{self._hash.hexdigest()}"
        if digest != self._digest:
            raise CorruptBlobError("wrong content", blob=self._name, got=digest, wanted=self._digest)

    def _has_more(self) -> bool:
        # Only an answer without a length can have more bytes; an answer that breaks off here has no more.
        response = self._response
        if response is None or response.left is not None:
            return False
        try:
            return bool(response.read(1, Call(time.monotonic() + self._deadline_s)))
        except TRANSPORT_ERRORS:
            return False


def _check_content_range(response: Answer, offset: int, length: int, doing: str, size: int | None) -> None:
    got = response.headers.get("content-range", "")
    match = _CONTENT_RANGE.fullmatch(got)
    if match is not None and match[3] != "*":
        total = int(match[3])
        if total != size:
            _check_size(total, size, doing)
        if total < offset + length:
            raise RegistryError(f"{doing}: blob is smaller (got {match[3]} bytes, wanted {offset + length})")
    if match is None or (int(match[1]), int(match[2])) != (offset, offset + length - 1):
        raise RegistryError(
            f"{doing}: wrong range (got {got[:80]!r}, wanted bytes {offset}-{offset + length - 1})", temporary=True
        )
    if response.left not in (None, length):
        raise RegistryError(f"{doing}: wrong length (got {response.left}, wanted {length})", temporary=True)


def _check_size(got: int | None, wanted: int | None, doing: str) -> None:
    if wanted is not None and got not in (None, wanted):
        raise RegistryError(f"{doing}: blob has another size (got {got}, wanted {wanted})")


def _skip(response: Answer, count: int, doing: str, limit: int = MAX_SKIP) -> None:
    if count > limit:
        raise RangesIgnoredError(f"{doing}: registry ignores ranges (answered 200 to a range far inside the blob)")
    while count:
        chunk = response.read(min(count, _SKIP_CHUNK))
        if not chunk:
            raise RegistryError(f"{doing}: answer broke off", temporary=True)
        count -= len(chunk)


def _read_rest(response: Answer, data: bytes, length: int, doing: str) -> bytes:
    # Returns ``data`` and all that is missing.
    chunks = [data]
    missing = length - len(data)
    while missing and chunks[-1]:
        chunks.append(response.read(missing))
        missing -= len(chunks[-1])
    if missing:
        raise RegistryError(f"{doing}: answer broke off {missing} bytes before its end", temporary=True)
    return b"".join(chunks)
