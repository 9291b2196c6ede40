"""The answer to an HTTP request, and bounds on the memory and reads that its framing may cause.

http.client trusts the framing: a chunk of size -1 makes it read until the connection closes, and it accepts headers
of 6 MiB, endless interim answers and chunks of one byte. It reads everything through the file object of the socket,
in which content and lines have calls of their own: the socket can refuse an answer that brings more lines than
allowed. Counting each line instead would cost a call for every header.
"""

from __future__ import annotations

import http.client
import io
import re
from typing import TYPE_CHECKING, NoReturn, Protocol

if TYPE_CHECKING:
    from obdlab.call import Call

#: Exceptions of a failed exchange; each becomes a RegistryError (:mod:`obdlab.registry.failures`).
TRANSPORT_ERRORS = (OSError, http.client.HTTPException)

#: Most bytes of lines (status, headers, chunk sizes, trailers) in one answer, plus a quarter of its body's size.
MOST_LINES = 256 << 10
_SHARE_OF_LINES = 4
#: Up to this many bytes, reading the rest of a body is cheaper than another connection.
MOST_DISCARDED = 4096

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
