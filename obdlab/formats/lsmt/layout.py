"""The bytes of an LSMT file: header, trailer and segment records (overlaybd LSMT layout).

Everything is little-endian; a sector is always 512 bytes; offsets and lengths inside records are in sectors.
No checksum protects these bytes, so every field is treated as hostile: the checks made when a layer is opened are
functions on whole record arrays.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SECTOR = 512
#: Bytes kept for the header at the start and for the trailer at the end.
HEADER_SPACE = 4096
RECORD_SIZE = 16
#: Largest value of the 14-bit length field, in sectors.
MAX_SEGMENT_SECTORS = 16383
MAX_SEALED_RECORDS = 1_000_000
MAX_WRITABLE_RECORDS = 128_000_000
#: A committed index is padded with fillers to a multiple of this many records (4096 bytes).
INDEX_PADDING_RECORDS = 256
NULL_UUID = "00000000-0000-0000-0000-000000000000"
USER_TAG_SIZE = 256

_MAGIC0 = b"LSMT\x00\x01\x02\x00"
_MAGIC1 = bytes.fromhex("657e63d29444084ca2d2c8ec4fcfae8a")
MAGIC = _MAGIC0 + _MAGIC1
_STRUCT = struct.Struct("<8s16sIIQQQ37s37sHBB256s")
STRUCT_SIZE = _STRUCT.size
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

_OFFSET_BITS, _LENGTH_SHIFT = (1 << 50) - 1, 50
_MOFFSET_BITS, _ZEROED_SHIFT, _TAG_SHIFT = (1 << 55) - 1, 55, 56
#: Logical offset of a filler record.
FILLER_OFFSET = _OFFSET_BITS
#: The largest disk whose sectors a record can name, in bytes.
MAX_VIRTUAL_SIZE = FILLER_OFFSET * SECTOR
_RECORD = struct.Struct("<QQ")
_FILLER = _RECORD.pack(FILLER_OFFSET, 0)


class Flags(IntFlag):
    """The flag word of headers and trailers."""

    HEADER = 0x01  # clear: a trailer
    DATA = 0x02  # clear: an index file
    SEALED = 0x04
    GC = 0x08  # named by the original, never set or tested
    SPARSE = 0x10
    INFO_VALID = 0x20  # named by the original, never set or tested


def normalise_uuid(text: str | None) -> str:
    """Return the upper-case 8-4-4-4-12 form that headers carry; all zeros for no UUID. ValueError if malformed."""
    if not text:
        return NULL_UUID
    if not _UUID.fullmatch(text):
        raise ValueError(f"not a UUID (got {text!r}, wanted 8-4-4-4-12 hexadecimal digits)")
    return text.upper()


def encode_user_tag(text: str) -> bytes:
    """Return the UTF-8 bytes of a commit message. ValueError if they do not fit into a header."""
    tag = text.encode()
    if len(tag) > USER_TAG_SIZE:
        raise ValueError(f"user tag too long (got {len(tag)} bytes, wanted at most {USER_TAG_SIZE})")
    return tag


@dataclass(frozen=True, slots=True)
class _FileInfo:
    flags: Flags
    virtual_size: int
    uuid: str = NULL_UUID
    parent_uuid: str = NULL_UUID
    user_tag: bytes = b""
    index_offset: int = 0
    index_size: int = 0  # records

    KIND: ClassVar[str] = ""
    IS_HEADER: ClassVar[bool] = True

    @classmethod
    def from_bytes(cls, data: bytes, *, blob: str = "", offset: int = 0) -> Self:
        """Parse the struct at the start of ``data``, which came from ``offset`` of ``blob``.

        Raises FormatError if it is short, has a wrong magic or is of the other kind (header, trailer).
        """
        if len(data) < STRUCT_SIZE:
            raise FormatError(
                f"LSMT {cls.KIND} is cut short",
                blob=blob,
                offset=offset,
                got=f"{len(data)} bytes",
                wanted=STRUCT_SIZE,
            )
        fields = _STRUCT.unpack_from(data)
        if fields[:2] != (_MAGIC0, _MAGIC1):
            raise FormatError(
                f"LSMT {cls.KIND} has a wrong magic",
                blob=blob,
                offset=offset,
                got=data[:24].hex(),
                wanted=MAGIC.hex(),
            )
        flags = Flags(fields[3])
        if bool(flags & Flags.HEADER) != cls.IS_HEADER:
            raise FormatError(
                f"LSMT {cls.KIND} has the wrong type bit", blob=blob, offset=offset, got=f"flags {flags:#x}"
            )
        virtual_size = fields[6]
        if virtual_size > MAX_VIRTUAL_SIZE:
            raise FormatError(
                "LSMT virtual size is impossible",
                blob=blob,
                offset=offset + 48,
                got=virtual_size,
                wanted=f"at most {MAX_VIRTUAL_SIZE}",
            )
        return cls(
            flags=flags,
            index_offset=fields[4],
            index_size=fields[5],
            virtual_size=virtual_size,
            uuid=_text(fields[7]),
            parent_uuid=_text(fields[8]),
            user_tag=fields[12].rstrip(b"\0"),
        )

    def to_bytes(self) -> bytes:
        """Return the struct, zero padded to 4096 bytes. ValueError if a UUID, tag or size does not fit."""
        if bool(self.flags & Flags.HEADER) != self.IS_HEADER:
            raise ValueError(f"flags do not belong to a {self.KIND} (got {self.flags:#x})")
        if not 0 <= self.virtual_size <= MAX_VIRTUAL_SIZE:
            raise ValueError(f"virtual size {self.virtual_size} is not in [0, {MAX_VIRTUAL_SIZE}]")
        if len(self.user_tag) > USER_TAG_SIZE:
            raise ValueError(f"user tag has {len(self.user_tag)} bytes, at most {USER_TAG_SIZE} fit")
        return _STRUCT.pack(
            _MAGIC0,
            _MAGIC1,
            STRUCT_SIZE,
            self.flags,
            self.index_offset,
            self.index_size,
            self.virtual_size,
            normalise_uuid(self.uuid).encode(),
            normalise_uuid(self.parent_uuid).encode(),
            0,  # reserved
            1,  # version
            1,  # sub-version
            self.user_tag,
        ).ljust(HEADER_SPACE, b"\0")


class Header(_FileInfo):
    """The struct in the first 4096 bytes of every LSMT file."""

    __slots__ = ()
    KIND = "header"
    IS_HEADER = True


class Trailer(_FileInfo):
    """The struct in the last 4096 bytes of a sealed file, the only place with the position of the index."""

    __slots__ = ()
    KIND = "trailer"
    IS_HEADER = False


def is_lsmt(data: bytes) -> bool:
    """Return True if ``data``, the first bytes of a file (32 are enough), starts an LSMT file."""
    return data[:24] == MAGIC and len(data) >= 29 and bool(data[28] & Flags.HEADER)


def _text(field: bytes) -> str:
    # The original does not check the form of a UUID, so any bytes must become printable here.
    return field.split(b"\0", 1)[0].decode("ascii", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Segments:
    """Segment records as columns of equal length, in the order of the file.

    A segment says that the disk's sectors ``[offset, offset + length)`` are the sectors from ``moffset`` of a layer
    file, or zeros if ``zeroed`` (then it occupies nothing there). ``tag`` numbers the layer file.
    """

    offset_sectors: NDArray[np.int64]
    length_sectors: NDArray[np.int64]
    moffset_sectors: NDArray[np.int64]
    zeroed: NDArray[np.bool_]
    tag: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.offset_sectors)

    def __getitem__(self, selection: slice | NDArray[np.generic]) -> Segments:
        """Return the chosen records: a slice, a mask or an index array, as numpy takes them."""
        return Segments(
            self.offset_sectors[selection],
            self.length_sectors[selection],
            self.moffset_sectors[selection],
            self.zeroed[selection],
            self.tag[selection],
        )

    @property
    def end_sectors(self) -> NDArray[np.int64]:
        """First disk sector after each segment."""
        return self.offset_sectors + self.length_sectors

    @property
    def mapped_sectors(self) -> NDArray[np.int64]:
        """Sectors each segment occupies in its layer file: 0 if zeroed."""
        return np.where(self.zeroed, 0, self.length_sectors)

    def without_tags(self) -> Segments:
        """Return the segments with tag 0: tags stored in a plain layer have no meaning."""
        return replace(self, tag=np.zeros_like(self.tag))

    @classmethod
    def concatenate(cls, parts: Sequence[Segments]) -> Segments:
        """Return the records of all parts, one part after the other."""
        if not parts:
            return cls.from_rows([])
        columns = ("offset_sectors", "length_sectors", "moffset_sectors", "zeroed", "tag")
        return cls(*(np.concatenate([getattr(part, column) for part in parts]) for column in columns))

    @classmethod
    def from_rows(cls, rows: list[tuple[int, int, int, bool, int]]) -> Segments:
        """Return columns from ``(offset, length, moffset, zeroed, tag)`` tuples, in sectors."""
        table = np.array(rows, dtype=np.int64).reshape(-1, 5).T
        return cls(
            np.ascontiguousarray(table[0]),
            np.ascontiguousarray(table[1]),
            np.ascontiguousarray(table[2]),
            table[3].astype(np.bool_),
            table[4].astype(np.uint8),
        )

    def rows(self) -> list[tuple[int, int, int, bool, int]]:
        """Return the segments as ``(offset, length, moffset, zeroed, tag)`` tuples of Python numbers."""
        columns = (self.offset_sectors, self.length_sectors, self.moffset_sectors, self.zeroed, self.tag)
        return list(zip(*(column.tolist() for column in columns), strict=True))


def decode_segments(data: bytes | memoryview) -> Segments:
    """Return the records in ``data`` (a multiple of 16 bytes) without fillers and records of length 0."""
    words = np.frombuffer(data, dtype="<u8").reshape(-1, 2)
    logical, mapped = words[:, 0], words[:, 1]
    meant = _meant(logical)
    if not meant.all():
        logical, mapped = logical[meant], mapped[meant]
    return Segments(
        offset_sectors=(logical & np.uint64(_OFFSET_BITS)).astype(np.int64),
        length_sectors=(logical >> np.uint64(_LENGTH_SHIFT)).astype(np.int64),
        moffset_sectors=(mapped & np.uint64(_MOFFSET_BITS)).astype(np.int64),
        zeroed=(mapped >> np.uint64(_ZEROED_SHIFT)) & np.uint64(1) != 0,
        tag=(mapped >> np.uint64(_TAG_SHIFT)).astype(np.uint8),
    )


def meant_records(data: bytes | memoryview) -> NDArray[np.int64]:
    """Return the numbers, from 0, of the records that :func:`decode_segments` returns."""
    return np.flatnonzero(_meant(np.frombuffer(data, dtype="<u8")[::2]))


def _meant(logical: NDArray[np.uint64]) -> NDArray[np.bool_]:
    is_filler = (logical & np.uint64(_OFFSET_BITS)) == FILLER_OFFSET
    meant: NDArray[np.bool_] = ~is_filler & (logical >> np.uint64(_LENGTH_SHIFT) != 0)
    return meant


def encode_segments(segments: Segments) -> bytes:
    """Return the records' bytes, 16 each. ValueError if a number does not fit into its field."""
    for what, column, limit in (
        ("offset", segments.offset_sectors, _OFFSET_BITS - 1),
        ("length", segments.length_sectors, MAX_SEGMENT_SECTORS),
        ("mapped offset", segments.moffset_sectors, _MOFFSET_BITS),
    ):
        if len(column) and not (int(column.min()) >= 0 and int(column.max()) <= limit):
            raise ValueError(
                f"segment {what} does not fit (got [{column.min()}, {column.max()}], wanted [0, {limit}])"
            )
    words = np.empty((len(segments), 2), dtype="<u8")
    words[:, 0] = segments.offset_sectors | (segments.length_sectors << _LENGTH_SHIFT)
    high = (segments.tag.astype(np.uint64) << np.uint64(1)) | segments.zeroed.astype(np.uint64)
    words[:, 1] = segments.moffset_sectors.astype(np.uint64) | (high << np.uint64(_ZEROED_SHIFT))
    return words.tobytes()


def encode_record(begin: int, length: int, moffset: int, *, zeroed: bool = False) -> bytes:
    """Return one record with tag 0; a writable layer logs one for each change. Its numbers must fit."""
    return _RECORD.pack(begin | length << _LENGTH_SHIFT, moffset | zeroed << _ZEROED_SHIFT)


def filler_records(count: int) -> bytes:
    """Return ``count`` filler records."""
    return _FILLER * count


def check_sealed_trailer(trailer: Trailer, file_size: int, *, blob: str = "") -> None:
    """Raise FormatError unless ``trailer`` belongs to a sealed data file and its index lies before the trailer."""
    at = file_size - HEADER_SPACE
    wanted_flags = Flags.DATA | Flags.SEALED
    if trailer.flags & wanted_flags != wanted_flags:
        raise FormatError(
            "LSMT trailer is not that of a sealed data file",
            blob=blob,
            offset=at + 28,
            got=f"flags {int(trailer.flags):#x}",
            wanted=f"{int(wanted_flags):#x}",
        )
    if trailer.index_size > MAX_SEALED_RECORDS:
        raise FormatError(
            "LSMT index has too many records",
            blob=blob,
            offset=at + 40,
            got=trailer.index_size,
            wanted=f"at most {MAX_SEALED_RECORDS}",
        )
    if trailer.index_offset < HEADER_SPACE or trailer.index_offset + trailer.index_size * RECORD_SIZE > at:
        raise FormatError(
            "LSMT index lies outside of its place",
            blob=blob,
            offset=at + 32,
            got=f"[{trailer.index_offset}, {trailer.index_offset + trailer.index_size * RECORD_SIZE})",
            wanted=f"inside [{HEADER_SPACE}, {at})",
        )


def check_sealed_segments(segments: Segments, index_offset: int, *, blob: str = "") -> None:
    """Raise FormatError unless a sealed layer's records ascend, do not overlap and map inside its data.

    The offset in the error is that of the index; the record number does not count fillers.
    """
    check_order(segments, index_offset, blob=blob)
    check_mapped(segments, index_offset // SECTOR, blob=blob, offset=index_offset)


def check_order(segments: Segments, index_offset: int, *, blob: str = "") -> None:
    """Raise FormatError at the first record that does not begin at or after the end of the one before it."""
    wrong = segments.offset_sectors[1:] < segments.end_sectors[:-1]
    if wrong.any():
        i = int(np.argmax(wrong)) + 1
        raise FormatError(
            f"LSMT index record {i} is out of order",
            blob=blob,
            offset=index_offset,
            got=f"sector {segments.offset_sectors[i]}",
            wanted=f"at least {segments.end_sectors[i - 1]}",
        )


def mapped_inside(segments: Segments, end_sectors: int) -> NDArray[np.bool_]:
    """Return for each record True if it maps only sectors in ``[8, end_sectors)`` of its file."""
    first = HEADER_SPACE // SECTOR
    moffset = segments.moffset_sectors
    inside: NDArray[np.bool_] = (moffset >= first) & (moffset + segments.mapped_sectors <= end_sectors)
    return inside


def check_mapped(segments: Segments, end_sectors: int, *, blob: str = "", offset: int = 0) -> None:
    """Raise FormatError at the first record that maps sectors outside ``[8, end_sectors)`` of its file."""
    inside = mapped_inside(segments, end_sectors)
    if not inside.all():
        i = int(np.argmin(inside))
        start = int(segments.moffset_sectors[i])
        raise FormatError(
            f"LSMT index record {i} points outside of the layer's data",
            blob=blob,
            offset=offset,
            got=f"sectors [{start}, {start + int(segments.mapped_sectors[i])})",
            wanted=f"inside [{HEADER_SPACE // SECTOR}, {end_sectors})",
        )
