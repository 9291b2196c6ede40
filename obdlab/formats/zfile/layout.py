"""Header and trailer of a ZFile: 96 bytes used, padded with zeros to 512 (overlaybd ZFile layout).

::

    0             header
    512           blocks, each compressed on its own and followed by its CRC (u32) if ``verify``
    index_offset  one u32 per block: its stored length, CRC included
    size - 512    trailer
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import Self

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.checksum import raw_crc32c
from obdlab.formats.zfile import Algorithm

HEADER_SIZE = 512
CRC_SIZE = 4
MIN_BLOCK_SIZE = 4 << 10
MAX_BLOCK_SIZE = 64 << 10
#: Block CRCs start from this state, headers and index from 0.
BLOCK_CRC_SEED = 100007
#: Incompressible blocks grow. Writers allow this much growth, so no stored block is longer.
MAX_GROWTH = 512
MAX_BLOCKS = 1_000_000_000

MAGIC = b"ZFile\x00\x01\x00" + b"tuji.yyf@Alibaba"
_DIGEST_OFFSET = 28
# magic, size, digest | flags, index_offset, index_size, original_size | index_crc, reserved, block_size |
# algorithm, level, use_dict, pad | reserved, dict_size | verify, pad
_STRUCT = struct.Struct("<24sIIQQQQIIIBBBxIIB7x")
_STRUCT_SIZE = 96


class Flags(IntFlag):
    """Bits of the flags field. Blobs older than the digest have garbage in the other bits: test, never compare."""

    HEADER = 1
    DATA = 2
    SEALED = 4
    #: The header itself holds the final index position, so the trailer need not be read.
    OVERWRITTEN = 8
    DIGEST = 16


@dataclass(frozen=True, slots=True)
class ZFileHeader:
    """Header or trailer. Offsets and sizes in bytes, except ``index_size`` in blocks."""

    flags: int
    block_size: int = 4096
    algorithm: int = Algorithm.LZ4
    verify: bool = True
    index_offset: int = 0
    index_size: int = 0
    original_size: int = 0
    index_crc: int = 0
    level: int = 0
    use_dict: int = 0
    dict_size: int = 0

    @property
    def is_header(self) -> bool:
        return bool(self.flags & Flags.HEADER)

    @property
    def is_overwritten(self) -> bool:
        return bool(self.flags & Flags.OVERWRITTEN)

    @property
    def has_digest(self) -> bool:
        """True if digest and ``index_crc`` are valid."""
        return bool(self.flags & Flags.DIGEST)

    @classmethod
    def from_bytes(cls, data: bytes, *, blob: str = "", offset: int = 0) -> Self:
        """Read 512 bytes found at ``offset`` of ``blob``.

        Raises FormatError if they are too few or have another magic, CorruptBlobError if the digest is wrong.
        """
        if len(data) < HEADER_SIZE:
            raise FormatError(
                "too short for a ZFile header", blob=blob, offset=offset, got=len(data), wanted=HEADER_SIZE
            )
        fields = _STRUCT.unpack_from(data)
        if fields[0] != MAGIC:
            raise FormatError("no ZFile magic", blob=blob, offset=offset, got=data[:24].hex(), wanted=MAGIC.hex())
        header = cls(
            flags=fields[3],
            index_offset=fields[4],
            index_size=fields[5],
            original_size=fields[6],
            index_crc=fields[7],
            block_size=fields[9],
            algorithm=fields[10],
            level=fields[11],
            use_dict=fields[12],
            dict_size=fields[14],
            verify=bool(fields[15]),
        )
        if header.has_digest:
            digest = _digest(data[:HEADER_SIZE])
            if digest != fields[2]:
                raise CorruptBlobError(
                    "ZFile header digest does not match",
                    blob=blob,
                    offset=offset,
                    got=f"{digest:#010x}",
                    wanted=f"{fields[2]:#010x}",
                )
        return header

    def to_bytes(self) -> bytes:
        """Return its 512 bytes, with the digest filled in if the flags have DIGEST."""
        data = bytearray(self._pack(0).ljust(HEADER_SIZE, b"\0"))
        if self.has_digest:
            data[:_STRUCT_SIZE] = self._pack(raw_crc32c(data))
        return bytes(data)

    def _pack(self, digest: int) -> bytes:
        return _STRUCT.pack(
            MAGIC,
            _STRUCT_SIZE,
            digest,
            self.flags,
            self.index_offset,
            self.index_size,
            self.original_size,
            self.index_crc,
            0,
            self.block_size,
            self.algorithm,
            self.level,
            self.use_dict,
            0,
            self.dict_size,
            self.verify,
        )


def is_zfile(first_bytes: bytes, *, blob: str = "") -> bool:
    """Return True if a blob that starts with these 512 bytes is a ZFile.

    Raises CorruptBlobError if it is one with a damaged header, which must not pass for another format.
    """
    if len(first_bytes) < HEADER_SIZE or not first_bytes.startswith(MAGIC):
        return False
    return ZFileHeader.from_bytes(first_bytes, blob=blob).is_header


def _digest(data: bytes) -> int:
    rest = _DIGEST_OFFSET + 4
    return raw_crc32c(data[rest:], raw_crc32c(data[:_DIGEST_OFFSET] + bytes(4)))
