"""Bounds on the memory and reads that the framing of an HTTP answer may cause.

http.client trusts the framing: a chunk of size -1 makes it read until the connection closes, and it accepts headers
of 6 MiB, endless interim answers and chunks of one byte. It reads everything from the file object of the socket, so
that object has the bounds.
"""

from __future__ import annotations

import http.client
import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import urllib3

#: Most bytes of lines (status, headers, chunk sizes, trailers) in one answer, plus a quarter of its body's size.
MOST_LINES = 256 << 10
_SHARE_OF_LINES = 4

_LENGTH = re.compile(r"[0-9]{1,19}", re.ASCII)
_CODINGS = ("gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd")


class FramingError(http.client.HTTPException):
    """An answer's framing is malformed, or needs more bytes than the reader asked for."""


class BoundedReader(io.BufferedReader):
    """The bytes of one answer. A read needs a length; all lines together are limited by :data:`MOST_LINES`."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self._lines_left = MOST_LINES

    def read(self, size: int | None = -1, /) -> bytes:
        """Return ``size`` bytes, fewer at the end. Raises FramingError for a read without a length."""
        if size is None or size < 0:
            raise FramingError(f"malformed length in an answer (got {size})")
        data = super().read(size)
        self._lines_left += len(data) // _SHARE_OF_LINES
        return data

    def readinto(self, buffer: object, /) -> int:
        """Fill the buffer, or less at the end."""
        size = super().readinto(buffer)  # type: ignore[arg-type]
        self._lines_left += size // _SHARE_OF_LINES
        return size

    def readline(self, size: int | None = -1, /) -> bytes:
        """Return a line. Raises FramingError if all lines of the answer together are too long."""
        most = self._lines_left + 1
        line = super().readline(most if size is None or size < 0 else min(size, most))
        self._lines_left -= len(line)
        if self._lines_left < 0:
            raise FramingError(f"headers and chunk sizes of an answer are longer than {MOST_LINES} bytes")
        return line


def check_framing(response: urllib3.BaseHTTPResponse) -> None:
    """Raise FramingError if the end of an answer is ambiguous.

    Its reader would take framing or the next answer for content.
    """
    if response.status < 200:
        # http.client skips only 100; the real answer would be taken for that of the connection's next request.
        raise FramingError(f"interim answer (got status {response.status})")
    for value in response.headers.getlist("Transfer-Encoding"):
        if value.strip().lower() not in ("chunked", "identity"):
            raise FramingError(f"unknown transfer encoding (got {value[:80]!r}, wanted chunked)")
    lengths = {each.strip() for text in response.headers.getlist("Content-Length") for each in text.split(",")}
    if len(lengths) > 1 or not all(_LENGTH.fullmatch(each) for each in lengths):
        raise FramingError(f"malformed Content-Length (got {sorted(lengths)[:3]})")


def is_compressed(response: urllib3.BaseHTTPResponse) -> bool:
    """Return True if the body is a compressed form of the content. No request asks for one."""
    codings = response.headers.get("Content-Encoding", "").lower().split(",")
    return any(each.strip() in _CODINGS for each in codings)
