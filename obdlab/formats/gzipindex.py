"""Places inside a gzip file where inflating can begin (the original's ``gzip.meta``).

::

    0            header, 333 bytes
    333          windows: the 32 KiB of content before each entry, each compressed by itself (zlib)
    index start  table of entries, 29 bytes each, compressed as a whole; it ends with the file

An entry is the border of two deflate blocks: its offsets in the content and in the gzip file, and the number of bits
of the byte before that belong to it. The writer keeps one about every MiB of content.

Version 1 is the original's, for files of one gzip member. Version 2 is obdlab's, for several: a reader of version 1
would return nothing behind the first member's end, so the version makes it refuse the file.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.checksum import raw_crc32c

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

HEADER_SIZE = 333
WINDOW = 32 << 10
#: Bytes of content between entries, as the original chooses them.
SPAN = 1 << 20
MIN_SPAN = 64 << 10
#: Entries of 2 TiB of content. A reader has the whole table in memory, 29 bytes for each, and as much for its checks.
MAX_ENTRIES = 2 << 20
#: Versions of the format: of files with one gzip member, and with several.
ONE_MEMBER, SEVERAL_MEMBERS = 1, 2

MAGIC = b"ddgzidx\0"
_MAGIC_CHECKED = 7  # the original looks at no more of it
_UNCOMPRESSED, _ZLIB = 0, 1
_LEVEL = 6
# magic, major, minor, compression, level, flag | span, window, entry size | entries, compressed size, index size,
# uncompressed size | reserved | index start, index length, CRC
_HEADER = struct.Struct("<8sBBBbBiiiqqqq256xqqI")
#: An entry: offsets in the content, in the gzip file (of the first whole byte) and of the window in the index file,
#: bits of the byte before, and length of the window in the index file.
ENTRY = np.dtype([("content", "<i8"), ("stored", "<i8"), ("window", "<i8"), ("bits", "u1"), ("length", "<u4")])
# 32 KiB of one byte are 50 bytes of zlib, noise is 32,784. The lower bound makes a table no larger than its file.
_SHORTEST_WINDOW, _LONGEST_WINDOW = 32, WINDOW + 1024
#: Deflate's best rate: 258 bytes for two bits. More cannot come out of a part of the file.
MAX_RATE = 1032


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """The header. Sizes and offsets in bytes."""

    version: int
    entries: int
    compressed_size: int
    uncompressed_size: int
    index_size: int
    index_start: int
    span: int = SPAN
    windows_compressed: bool = True

    @classmethod
    def from_bytes(cls, data: bytes, *, index_size: int, blob: str = "") -> Self:
        """Read the first 333 bytes of an index file of ``index_size`` bytes.

        Raises FormatError for another format or version, a file cut short, or impossible values; CorruptBlobError if
        the header's CRC does not match.
        """
        if len(data) < HEADER_SIZE:
            raise FormatError("gzip index is cut short", blob=blob, got=len(data), wanted=f"at least {HEADER_SIZE}")
        found = _HEADER.unpack_from(data)
        magic, version, _, compression, _, _, span, window, entry_size, entries = found[:10]
        compressed_size, claimed_size, uncompressed_size, index_start, index_length, crc = found[10:]
        if magic[:_MAGIC_CHECKED] != MAGIC[:_MAGIC_CHECKED]:
            raise FormatError("not a gzip index", blob=blob, offset=0, got=magic.hex(), wanted=MAGIC.hex())
        got = raw_crc32c(data[: HEADER_SIZE - 4])
        if got != crc:
            what = "CRC of the gzip index's header does not match"
            raise CorruptBlobError(what, blob=blob, offset=329, got=f"{got:#010x}", wanted=f"{crc:#010x}")
        for what, value, wanted in (
            ("version", version, (ONE_MEMBER, SEVERAL_MEMBERS)),
            ("compression of windows", compression, (_UNCOMPRESSED, _ZLIB)),
            ("window", window, (WINDOW,)),
            ("entry size", entry_size, (ENTRY.itemsize,)),
            ("size of the index file", claimed_size, (index_size,)),
            ("end of the table", index_start + index_length, (index_size,)),
        ):
            if value not in wanted:
                text = " or ".join(map(str, wanted))
                raise FormatError(f"gzip index: {what} is not as it must be", blob=blob, got=value, wanted=text)
        most = min((index_start - HEADER_SIZE) // _SHORTEST_WINDOW, MAX_ENTRIES)
        if not 1 <= entries <= most:
            raise FormatError(
                "gzip index: impossible number of entries", blob=blob, got=entries, wanted=f"1 to {most}"
            )
        # Bytes that do not compress grow a little: by 5 for each 16 KiB, and a stream's ends.
        longest = entries * ENTRY.itemsize
        longest += longest // 1000 + 64
        if index_length > longest:
            what = "gzip index: the table is longer than its entries"
            raise FormatError(what, blob=blob, offset=index_start, got=index_length, wanted=f"at most {longest}")
        if not 0 <= uncompressed_size <= compressed_size * MAX_RATE:
            what = f"gzip index: {compressed_size} bytes of gzip cannot hold the uncompressed size"
            raise FormatError(what, blob=blob, got=uncompressed_size)
        return cls(
            version,
            entries,
            compressed_size,
            uncompressed_size,
            claimed_size,
            index_start,
            span,
            compression == _ZLIB,
        )

    def to_bytes(self) -> bytes:
        """Return its 333 bytes."""
        data = _HEADER.pack(
            MAGIC,
            self.version,
            0,
            _ZLIB if self.windows_compressed else _UNCOMPRESSED,
            _LEVEL,
            0,
            self.span,
            WINDOW,
            ENTRY.itemsize,
            self.entries,
            self.compressed_size,
            self.index_size,
            self.uncompressed_size,
            self.index_start,
            self.index_size - self.index_start,
            0,
        )[:-4]
        return data + raw_crc32c(data).to_bytes(4, "little")


def pack(data: bytes | memoryview) -> bytes:
    """Return a window or a table as the index file holds it. Equal to the original's bytes if zlib is the same."""
    return zlib.compress(data, _LEVEL)


def table_bytes(entries: Iterable[tuple[int, int, int, int, int]]) -> bytes:
    """Return the table of entries (the fields of :data:`ENTRY`), uncompressed."""
    return np.array(list(entries), ENTRY).tobytes()


def parse_table(data: bytes, header: IndexHeader, *, blob: str = "") -> NDArray[np.void]:
    """Return the table, an array of :data:`ENTRY`, from the bytes of the index file from ``index_start`` on.

    Raises CorruptBlobError if they do not decompress, FormatError if the table has another number of entries than the
    header says, or one that is out of order, outside of its file, or impossible.
    """
    size = header.entries * ENTRY.itemsize
    if header.windows_compressed:
        data = _unpacked(data, size, "table of the gzip index", blob, header.index_start)
    if len(data) != size:
        what = "gzip index: the table has another size than its number of entries says"
        raise FormatError(what, blob=blob, offset=header.index_start, got=len(data), wanted=size)
    table = np.frombuffer(data, ENTRY)
    _check_table(table, header, blob)
    return table


def parse_window(data: bytes, header: IndexHeader, *, blob: str = "", offset: int = 0) -> bytes:
    """Return the 32 KiB of a window from its bytes at ``offset`` of the index file. Raises CorruptBlobError."""
    if header.windows_compressed:
        data = _unpacked(data, WINDOW, "window of the gzip index", blob, offset)
    if len(data) != WINDOW:
        raise CorruptBlobError("gzip index: wrong length of a window", blob=blob, offset=offset, got=len(data))
    return data


def _unpacked(data: bytes, most: int, what: str, blob: str, offset: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(data, most + 1)
    except zlib.error as error:
        raise CorruptBlobError(f"{what} does not decompress ({error})", blob=blob, offset=offset) from error
    if not unpacker.eof or unpacker.unused_data:
        raise CorruptBlobError(f"{what} does not end where it must", blob=blob, offset=offset)
    return content


def _check_table(table: NDArray[np.void], header: IndexHeader, blob: str) -> None:
    content, stored, window = table["content"], table["stored"], table["window"]
    bits, length = table["bits"].astype(np.int64), table["length"].astype(np.int64)
    content_ends = np.append(content[1:], header.uncompressed_size)
    stored_ends = np.append(stored[1:], header.compressed_size)
    window_ends = np.append(window[1:], header.index_start)
    # Offsets first: the sums below would overflow for offsets far outside.
    for what, bad in (
        ("offset in the content", (content < 0) | (content > content_ends)),
        ("offset in the gzip file", (stored < 1) | (stored > stored_ends) | (stored > header.compressed_size)),
        ("bits", bits > 7),
        ("offset of the window", (window < HEADER_SIZE) | (window > header.index_start)),
        ("length of the window", (length < _SHORTEST_WINDOW) | (length > _LONGEST_WINDOW)),
    ):
        _refuse(what, bad, blob)
    ends_bits = np.append(bits[1:], 0)
    for what, bad in (
        ("place in the gzip file", stored * 8 - bits > stored_ends * 8 - ends_bits),
        ("end of the window", window + length > window_ends),
        ("rate of compression", content_ends - content > (stored_ends - stored + 1) * MAX_RATE),
    ):
        _refuse(what, bad, blob)
    if content[0] != 0:
        raise FormatError("gzip index: the first entry is not at the start", blob=blob, got=int(content[0]), wanted=0)


def _refuse(what: str, bad: NDArray[np.bool_], blob: str) -> None:
    if bad.any():
        raise FormatError(f"gzip index: impossible {what} of entry {int(np.flatnonzero(bad)[0])}", blob=blob)
