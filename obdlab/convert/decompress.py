"""Layers as uncompressed tar bytes, for each compression, with never more than a few MiB in memory."""

from __future__ import annotations

import hashlib
from typing import IO, TYPE_CHECKING, Protocol, cast

import zstandard
from isal import isal_zlib

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.compression import compression_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from obdlab.convert.endpoints.layout import VerifiedFile

_READ = 1 << 20
_PIECE = 4 << 20


class Readable(Protocol):
    """A file read from start to end."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to ``size`` bytes, b"" at the end."""


def is_compressed(head: bytes) -> bool:
    """Return True if the first four bytes are of a format that :func:`decompressed` decompresses."""
    return compression_of(head) in ("gzip", "zstd")


def decompressed(file: Readable, blob: str) -> Iterator[bytes]:
    """Yield the uncompressed bytes of a gzip, zstd or plain layer read from ``file``; its magic decides which.

    Pieces are at most 4 MiB, for any rate of compression. Raises FormatError, naming ``blob`` and the offset
    in it, for damaged or truncated compressed data.
    """
    head = _read_full(file, 4)
    match compression_of(head):
        case "gzip":
            return _gunzip(file, head, blob)
        case "zstd":
            return _unzstd(file, head, blob)
        case _:
            return _plain(file, head)


def uncompressed(
    file: VerifiedFile, blob: str, diff_id: str, advance: Callable[[int], None] = lambda _: None
) -> Iterator[bytes]:
    """Yield a layer's uncompressed tar, which must have the digest ``diff_id``.

    ``advance`` is called with the bytes read from the file. Raises as :func:`decompressed`, and CorruptBlobError at
    the end for another digest.
    """
    return checked(_counted(file, blob, advance), blob, diff_id)


def checked(pieces: Iterable[bytes], blob: str, diff_id: str) -> Iterator[bytes]:
    """Yield the pieces of a layer's uncompressed tar. Raises CorruptBlobError at the end for another digest."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield piece
    got = f"sha256:{digest.hexdigest()}"
    if got != diff_id:
        raise CorruptBlobError("layer is not the one that the image config names", blob=blob, got=got, wanted=diff_id)


def _counted(file: VerifiedFile, blob: str, advance: Callable[[int], None]) -> Iterator[bytes]:
    read = 0
    for piece in decompressed(file, blob):
        advance(file.position - read)
        read = file.position
        yield piece
    while file.read(_READ):  # bytes that the decompressor left must match the blob's digest too
        pass


def _plain(file: Readable, head: bytes) -> Iterator[bytes]:
    while head:
        yield head
        head = file.read(_PIECE)


def _gunzip(file: Readable, data: bytes, blob: str) -> Iterator[bytes]:
    # Any number of gzip members, perhaps followed by zeros (RFC 1952, as gzip reads it).
    consumed = len(data)
    member = isal_zlib.decompressobj(wbits=31)
    while True:
        try:
            piece = member.decompress(data, _PIECE)
        except isal_zlib.IsalError as error:  # type: ignore[misc] # the stub has it as a value
            raise FormatError(f"damaged gzip data ({error})", blob=blob, offset=consumed) from error
        if piece:
            yield piece
        if member.eof:
            data = member.unused_data.lstrip(b"\0")
            while not data:
                more = file.read(_READ)
                if not more:
                    return
                consumed += len(more)
                data = more.lstrip(b"\0")
            member = isal_zlib.decompressobj(wbits=31)
            continue
        data = member.unconsumed_tail
        if not data and len(piece) < _PIECE:
            data = file.read(_READ)
            if not data:
                raise FormatError("gzip data ends early", blob=blob, offset=consumed)
            consumed += len(data)


def _unzstd(file: Readable, head: bytes, blob: str) -> Iterator[bytes]:
    source = _Rejoined(file, head)  # the reader only calls read()
    reader = zstandard.ZstdDecompressor().stream_reader(cast("IO[bytes]", source), read_across_frames=True)
    try:
        while piece := reader.read(_PIECE):
            yield piece
    except (zstandard.ZstdError, MemoryError) as error:
        raise FormatError(f"damaged zstd data ({error})", blob=blob, offset=source.position) from error


class _Rejoined:
    # A file whose first bytes have been read already.
    def __init__(self, file: Readable, head: bytes) -> None:
        self._file = file
        self._head = head
        self.position = 0

    def read(self, size: int = -1) -> bytes:
        data, self._head = self._head, b""
        data = data or self._file.read(size)
        self.position += len(data)
        return data


def _read_full(file: Readable, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data
