"""Places inside a zstd file where decoding can begin: the beginnings of frames (``zstd.meta``, obdlab's own).

::

    0   magic "OBDZSTIX", version (u32), number of spans (u32), size of the file, size of its content (u64 each),
        CRC-32 of the 32 bytes before and the table (u32), zero (u32)
    40  for each span: its offset in the content, in the file, and its length in the file (u64 each)

Numbers are little endian. A span is one or more whole frames, and the spans in order are all of the content.
Skippable frames are in no span.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from obdlab.errors import CorruptBlobError, FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAGIC = b"OBDZSTIX"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQII")
_CHECKED = struct.Struct("<8sIIQQ")
#: A span: its offsets in the content and in the file, and its length in the file.
SPAN = np.dtype([("content", "<u8"), ("stored", "<u8"), ("length", "<u8")])
#: Frames are joined to spans of at least this much content, but for the last before a skippable frame.
MIN_SPAN = 128 << 10
#: Most spans: those of 1 TiB of content in frames of the least length, and as many bytes as a layer may have entries.
MAX_SPANS = 8 << 20
_MAX_SIZE = 1 << 62
HEADER_SIZE = _HEADER.size


@dataclass(frozen=True, slots=True)
class ZstdIndex:
    """A whole index: sizes of the file and of its content in bytes, and the table of spans."""

    compressed_size: int
    uncompressed_size: int
    spans: NDArray[np.void]

    @classmethod
    def from_bytes(cls, data: bytes, *, blob: str = "") -> Self:
        """Read an index file. Raises FormatError if it is malformed, CorruptBlobError for a wrong CRC."""
        if not data.startswith(MAGIC) or len(data) < HEADER_SIZE:
            raise FormatError("not a zstd index", blob=blob, got=data[:8].hex(), wanted=MAGIC.hex())
        _, version, count, compressed, uncompressed, crc, _ = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise FormatError("zstd index of another version", blob=blob, got=version, wanted=_VERSION)
        if len(data) != HEADER_SIZE + count * SPAN.itemsize or count > MAX_SPANS:
            raise FormatError(
                "zstd index has another length", blob=blob, got=len(data), wanted=HEADER_SIZE + count * SPAN.itemsize
            )
        got = zlib.crc32(data[HEADER_SIZE:], zlib.crc32(data[: _CHECKED.size]))
        if got != crc:
            raise CorruptBlobError("wrong CRC of the zstd index", blob=blob, got=f"{got:08x}", wanted=f"{crc:08x}")
        spans = np.frombuffer(data, SPAN, offset=HEADER_SIZE)
        index = cls(compressed, uncompressed, spans)
        index._check(blob)
        return index

    def _check(self, blob: str) -> None:
        content, stored, length = (self.spans[name] for name in ("content", "stored", "length"))
        most = max(self.compressed_size, self.uncompressed_size)
        wrong = most > _MAX_SIZE or (not len(content) and self.uncompressed_size > 0)
        if not wrong and len(content):
            wrong = bool(
                content[0] != 0
                or (content[1:] <= content[:-1]).any()
                or content[-1] >= self.uncompressed_size
                or (length < 1).any()
                or (length > self.compressed_size).any()
                or (stored > self.compressed_size).any()
                or (stored[1:] < stored[:-1] + length[:-1]).any()
                or stored[-1] + length[-1] > self.compressed_size
            )
        if wrong:
            raise FormatError("spans of the zstd index are out of order or outside of the file", blob=blob)


def index_bytes(compressed_size: int, uncompressed_size: int, spans: Sequence[tuple[int, int, int]]) -> bytes:
    """Return the index file of these spans (content offset, stored offset, stored length), in order."""
    table = np.array(spans, SPAN).tobytes()
    checked = _CHECKED.pack(MAGIC, _VERSION, len(spans), compressed_size, uncompressed_size)
    return checked + struct.pack("<II", zlib.crc32(table, zlib.crc32(checked)), 0) + table
