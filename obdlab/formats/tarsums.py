"""Digests of the pieces of an uncompressed tar (``tar.sums`` in a turboOCI layer's blob, obdlab's own).

::

    0   magic "OBDTSUMS", version (u32), size of a piece (u32), size of the tar (u64), zeros (8 bytes)
    32  SHA-256 of each piece, the last one as short as it is

Numbers are little endian. The original ignores the file. It is under the blob's digest, and so under the manifest's.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAGIC = b"OBDTSUMS"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ8x")
HEADER_SIZE = _HEADER.size
SUM_SIZE = hashlib.sha256().digest_size
#: A compressed tar is decoded about a MiB at a time anyway.
PIECE_OF_COMPRESSED = 1 << 20
#: Of a plain tar a reader fetches whole pieces, which cost 0.05 % of it.
PIECE_OF_PLAIN = 64 << 10
_SMALLEST, _LARGEST = 4 << 10, 16 << 20
_MOST = 1 << 62


@dataclass(frozen=True, slots=True)
class SumsHeader:
    """Sizes of a piece and of the tar, in bytes."""

    piece: int
    tar_size: int

    @classmethod
    def from_bytes(cls, data: bytes, *, file_size: int, blob: str = "") -> Self:
        """Read the first 32 bytes of a file of ``file_size``. Raises FormatError naming ``blob``."""
        if len(data) < HEADER_SIZE or not data.startswith(MAGIC):
            raise FormatError("not a file of tar sums", blob=blob, got=data[:8].hex(), wanted=MAGIC.hex())
        _, version, piece, tar_size = _HEADER.unpack_from(data)
        if version != _VERSION or tar_size > _MOST:
            raise FormatError("tar sums of another version", blob=blob, got=version, wanted=_VERSION)
        if not _SMALLEST <= piece <= _LARGEST or piece & (piece - 1):
            raise FormatError("tar sums have impossible pieces", blob=blob, got=piece)
        header = cls(piece, tar_size)
        if file_size != header.file_size:
            raise FormatError("tar sums have another length", blob=blob, got=file_size, wanted=header.file_size)
        return header

    @property
    def file_size(self) -> int:
        """Bytes of the file."""
        return HEADER_SIZE + -(-self.tar_size // self.piece) * SUM_SIZE

    def to_bytes(self) -> bytes:
        """Return the header."""
        return _HEADER.pack(MAGIC, _VERSION, self.piece, self.tar_size)


class TarSums:
    """Sums a tar that passes by."""

    def __init__(self, piece: int) -> None:
        self._piece = piece
        self._size = 0
        self._sums = bytearray()

    def passing(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the parts of the tar, in order."""
        current, left = hashlib.sha256(), self._piece
        for part in parts:
            view = memoryview(part)
            while view:
                taken = view[:left]
                current.update(taken)
                left -= len(taken)
                view = view[len(taken) :]
                if not left:
                    self._sums += current.digest()
                    current, left = hashlib.sha256(), self._piece
            self._size += len(part)
            yield part
        if left < self._piece:
            self._sums += current.digest()

    def to_bytes(self) -> bytes:
        """Return the file, once all parts have passed."""
        return SumsHeader(self._piece, self._size).to_bytes() + bytes(self._sums)
