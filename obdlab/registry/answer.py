"""The answer to an HTTP request: its framing, its errors, and its body, which must hold the requested bytes.

http.client trusts the framing: a chunk of size -1 makes it read until the connection closes, and it accepts headers
of 6 MiB, endless interim answers and chunks of one byte. It reads everything through the file object of the socket,
in which content and lines have calls of their own: the socket can refuse an answer that brings more lines than
allowed. Counting each line instead would cost a call for every header.
"""

from __future__ import annotations

import http.client
import io
import json
import re
from typing import TYPE_CHECKING, NoReturn, Protocol

from obdlab.formats.decimal import decimal
from obdlab.observe.redact import redacted
from obdlab.registry.errors import RangesIgnoredError, RegistryError
from obdlab.registry.failures import TRANSPORT_ERRORS, from_exception, is_temporary_status

if TYPE_CHECKING:
    from obdlab.call import Call

#: Most bytes of lines (status, headers, chunk sizes, trailers) in one answer, plus a quarter of its body's size.
MOST_LINES = 256 << 10
_SHARE_OF_LINES = 4
#: Up to this many bytes, reading the rest of a body is cheaper than another connection.
MOST_DISCARDED = 4096

# A registry that ignores Range sends the blob from its start: up to this offset skipping is cheaper than failing.
MAX_SKIP = 4 << 20
_SKIP_CHUNK = 256 << 10

_CONTENT_RANGE = re.compile(r"\s*bytes\s+(\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\s*", re.ASCII | re.IGNORECASE)
_UNSATISFIED = re.compile(r"\s*bytes\s+\*/(\d{1,19})\s*", re.ASCII | re.IGNORECASE)
_LENGTH = re.compile(r"[0-9]{1,19}", re.ASCII)
_CODINGS = ("gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd")


class FramingError(http.client.HTTPException):
    """An answer's framing is malformed, or needs more bytes than the reader asked for."""


class Allowance:
    """The number of bytes that one answer may still bring: as many as were read as content, and the lines."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        #: The socket subtracts all bytes that arrive.
        self.left = MOST_LINES + io.DEFAULT_BUFFER_SIZE  # which is read ahead of the lines

    def add(self, size: int) -> None:
        """Add the bytes that are about to be read as content; negative for those that did not come."""
        self.left += size + size // _SHARE_OF_LINES

    def refuse(self) -> NoReturn:
        """Raise FramingError: there are too many lines among the bytes."""
        raise FramingError(f"headers and chunk sizes of an answer are longer than {MOST_LINES} bytes")


class BoundedReader(io.BufferedReader):
    """The bytes of one answer, whose socket takes all that arrive from the ``allowance``. A read needs a length."""

    def __init__(self, raw: io.RawIOBase, allowance: Allowance) -> None:
        super().__init__(raw)
        self._allowance = allowance

    def read(self, size: int | None = -1, /) -> bytes:
        """Return ``size`` bytes, fewer at the end. Raises FramingError for a read without a length."""
        if size is None or size < 0:
            raise FramingError(f"malformed length in an answer (got {size})")
        self._allowance.add(size)
        data = super().read(size)
        if len(data) < size:
            self._allowance.add(len(data) - size)
        return data

    def readinto(self, buffer: object, /) -> int:
        """Fill the buffer, or less at the end."""
        wanted = memoryview(buffer).nbytes  # type: ignore[arg-type]
        self._allowance.add(wanted)
        size = super().readinto(buffer)  # type: ignore[arg-type]
        self._allowance.add(size - wanted)
        return size


class Carrier(Protocol):
    """The connection that an answer comes by."""

    #: The terms of the call that waits for it.
    call: Call

    def keep(self) -> None:
        """Let another call use the connection."""

    def close(self) -> None:
        """Close the connection."""


class Answer:
    """An answer whose body is unread; :meth:`close` it in the end. For one thread at a time."""

    __slots__ = ("_connection", "_raw", "compressed", "headers", "status")

    def __init__(self, raw: http.client.HTTPResponse, connection: Carrier) -> None:
        """Take the answer that came by ``connection``.

        Raises FramingError if the end of the answer is ambiguous: its reader would take framing or the next answer
        for content.
        """
        self._raw = raw
        self._connection: Carrier | None = connection
        self.status = raw.status
        #: Values by lower-case names; those of a repeated header are joined by commas.
        self.headers: dict[str, str] = {}
        headers = self.headers
        for name, value in raw.headers.items():
            key = name.lower()
            headers[key] = f"{headers[key]}, {value}" if key in headers else value
        encoding = headers.get("content-encoding")
        #: True if the body is a compressed form of the content. No request asks for one.
        self.compressed = encoding is not None and not set(_CODINGS).isdisjoint(
            each.strip() for each in encoding.lower().split(",")
        )
        if raw.status < 200:
            # http.client skips only 100; the real answer would be taken for that of the connection's next request.
            raise FramingError(f"interim answer (got status {raw.status})")
        coding = headers.get("transfer-encoding")
        if coding is not None and coding.strip().lower() not in ("chunked", "identity"):
            raise FramingError(f"unknown transfer encoding (got {coding[:80]!r}, wanted chunked)")
        length = headers.get("content-length")
        if length is not None and not _LENGTH.fullmatch(length):
            lengths = {each.strip() for each in length.split(",")}
            if len(lengths) > 1 or not all(_LENGTH.fullmatch(each) for each in lengths):
                raise FramingError(f"malformed Content-Length (got {sorted(lengths)[:3]})")

    @property
    def challenges(self) -> list[str]:
        """The values of its WWW-Authenticate headers."""
        return self._raw.headers.get_all("WWW-Authenticate", [])

    @property
    def left(self) -> int | None:
        """The number of bytes of the body that are not read yet; None if only its end will show it."""
        return self._raw.length

    def read(self, length: int, call: Call | None = None) -> bytes:
        """Return up to ``length`` bytes of the body, empty at its end; on other terms than those of the request.

        Raises one of TRANSPORT_ERRORS; the connection is closed then.
        """
        connection = self._connection
        if connection is None:
            return b""
        if call is not None:
            connection.call = call
        try:
            return self._raw.read(length)
        except BaseException:
            self._give_up(connection)
            raise

    def close(self) -> None:
        """Finish: keep the connection if little is left of the body, else close it. Closing twice is allowed."""
        connection, raw = self._connection, self._raw
        if connection is None:
            return
        if not raw.isclosed() and raw.length is not None and raw.length <= MOST_DISCARDED:
            try:
                self.read(MOST_DISCARDED + 1)
            except TRANSPORT_ERRORS:
                return
        if raw.isclosed() and not raw.will_close:
            self._connection = None
            connection.keep()
        else:
            self._give_up(connection)

    def _give_up(self, connection: Carrier) -> None:
        self._connection = None
        self._raw.close()
        connection.close()


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
        check_content_range(response, offset, length, doing, size)
        return
    check_size(response.left, size, doing)
    skip(response, offset, doing)


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


def from_response(response: Answer, doing: str) -> RegistryError:
    """Return the error for an unsuccessful answer, and close the answer."""
    try:
        body = response.read(MOST_DISCARDED)
    except TRANSPORT_ERRORS:
        body = b""
    response.close()
    detail = _error_detail(body)
    return RegistryError(
        f"{doing}: registry answered {response.status}{f' ({detail})' if detail else ''}",
        status=response.status,
        temporary=is_temporary_status(response.status),
        retry_after_s=_retry_after(response.headers.get("retry-after", "")),
    )


def check_content_range(response: Answer, offset: int, length: int, doing: str, size: int | None) -> None:
    """Raise RegistryError unless a 206 names and holds exactly the range, of a blob of ``size`` bytes if given."""
    got = response.headers.get("content-range", "")
    match = _CONTENT_RANGE.fullmatch(got)
    if match is not None and match[3] != "*":
        total = int(match[3])
        if total != size:
            check_size(total, size, doing)
        if total < offset + length:
            raise RegistryError(f"{doing}: blob is smaller (got {match[3]} bytes, wanted {offset + length})")
    if match is None or (int(match[1]), int(match[2])) != (offset, offset + length - 1):
        raise RegistryError(
            f"{doing}: wrong range (got {got[:80]!r}, wanted bytes {offset}-{offset + length - 1})", temporary=True
        )
    if response.left not in (None, length):
        raise RegistryError(f"{doing}: wrong length (got {response.left}, wanted {length})", temporary=True)


def check_size(got: int | None, wanted: int | None, doing: str) -> None:
    """Raise RegistryError if both sizes are known and differ."""
    if wanted is not None and got not in (None, wanted):
        raise RegistryError(f"{doing}: blob has another size (got {got}, wanted {wanted})")


def skip(response: Answer, count: int, doing: str, limit: int = MAX_SKIP) -> None:
    """Read past ``count`` bytes. Raises RangesIgnoredError for more than ``limit``, and as reading does."""
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


def _error_detail(body: bytes) -> str:
    # {"errors": [{"code": "...", "message": "..."}]} (OCI distribution specification, "Error Codes")
    try:
        first = json.loads(body)["errors"][0]
        text = f"{first.get('code', '')}: {first.get('message', '')}"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return ""
    return redacted("".join(c for c in text if c.isprintable()))[:200].strip(": ")


def _retry_after(text: str) -> float:
    # Registries do not use the other form, a date.
    return float(decimal(text.strip(), 99_999) or 0)
