"""Bounds on the memory and reads that the framing of an HTTP answer may cause.

http.client trusts the framing: a chunk of size -1 makes it read until the connection closes, and it accepts headers
of 6 MiB, endless interim answers and chunks of one byte. It reads everything through the file object of the socket,
in which content and lines have calls of their own: the socket can refuse an answer that brings more lines than
allowed. Counting each line instead would cost a call for every header.
"""

from __future__ import annotations

import http.client
import io
import re
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import urllib3

#: Most bytes of lines (status, headers, chunk sizes, trailers) in one answer, plus a quarter of its body's size.
MOST_LINES = 256 << 10
_SHARE_OF_LINES = 4

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
    texts = response.headers.getlist("Content-Length")
    if len(texts) == 1 and _LENGTH.fullmatch(texts[0]):
        return  # as nearly all
    lengths = {each.strip() for text in texts for each in text.split(",")}
    if len(lengths) > 1 or not all(_LENGTH.fullmatch(each) for each in lengths):
        raise FramingError(f"malformed Content-Length (got {sorted(lengths)[:3]})")


def is_compressed(response: urllib3.BaseHTTPResponse) -> bool:
    """Return True if the body is a compressed form of the content. No request asks for one."""
    text = response.headers.get("Content-Encoding", "")
    if not text:
        return False
    codings = text.lower().split(",")
    return any(each.strip() in _CODINGS for each in codings)
