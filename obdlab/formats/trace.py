"""Traces of a start: which bytes of which layers were read, in order (overlaybd trace file), and priority lists.

::

    header   u32 magic 0xC2EF1820, 4 pad, u64 bytes of records, u32 raw CRC-32C over the records, 4 pad
    record   char op 'R', 3 pad, u32 layer (0 is the bottom), u64 length, s64 offset

Offsets are bytes of a layer's uncompressed LSMT file. Padding may hold anything, and the checksum covers it.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.checksum import raw_crc32c
from obdlab.formats.tar import file_header, parse_wrap, wrap_tail

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

MAGIC = 3270449184
HEADER_SIZE = RECORD_SIZE = 24
#: The original reads each record into a buffer of this size, for any length.
MAX_LENGTH = 1 << 20
#: Four million records: more than any start reads.
MOST_READS = 1 << 22
MAX_SIZE = HEADER_SIZE + RECORD_SIZE * MOST_READS
MAX_LIST_SIZE = 65536

# All records as tuples at once would take several times the memory of the file.
_AT_ONCE = 4096

_HEADER = struct.Struct("<I4xQI4x")
_MAGIC = MAGIC.to_bytes(4, "little")
#: This many first bytes are enough for :func:`is_trace`.
MAGIC_SIZE = len(_MAGIC)
#: As in the file; padding bytes between the fields are kept.
RECORD = np.dtype(
    {
        "names": ["op", "layer", "length", "offset"],
        "formats": ["S1", "<u4", "<u8", "<i8"],
        "offsets": [0, 4, 8, 16],
        "itemsize": RECORD_SIZE,
    }
)
_LIST_LINE = re.compile(r"[A-Za-z0-9_.\-/]+\*?", re.ASCII)


def is_trace(start: bytes) -> bool:
    """Return True if a file that starts with these bytes claims to be a trace."""
    return start[:4] == _MAGIC


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Reads of an image's layers in the order they were made; ``records`` is an array of :data:`RECORD`."""

    records: NDArray[np.void]

    @classmethod
    def from_reads(cls, reads: Iterable[tuple[int, int, int]]) -> Self:
        """Return a trace of (layer, offset, length). Reads of more than 1 MiB are split, empty ones left out."""
        pieces = [
            (b"R", layer, min(MAX_LENGTH, offset + length - at), at)
            for layer, offset, length in reads
            for at in range(offset, offset + length, MAX_LENGTH)
        ]
        records = np.zeros(len(pieces), RECORD)
        records[:] = pieces
        return cls(records)

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "trace") -> Self:
        """Read a trace file. Raises FormatError if it is malformed, CorruptBlobError if its checksum is wrong."""
        if not is_trace(data):
            raise FormatError(
                "not a trace", blob=name, offset=0, got=data[:4].hex() or "nothing", wanted=_MAGIC.hex()
            )
        if len(data) < HEADER_SIZE:
            raise FormatError("trace is cut off", blob=name, got=len(data), wanted=f"at least {HEADER_SIZE} bytes")
        _, size, checksum = _HEADER.unpack_from(data)
        if len(data) > MAX_SIZE:
            raise FormatError("trace is too large", blob=name, got=len(data), wanted=f"at most {MAX_SIZE}")
        if size % RECORD_SIZE or size != len(data) - HEADER_SIZE:
            raise FormatError(
                "trace has another size than its header says",
                blob=name,
                offset=8,
                got=f"{size} bytes of records",
                wanted=f"{len(data) - HEADER_SIZE}, a multiple of {RECORD_SIZE}",
            )
        crc = raw_crc32c(data[HEADER_SIZE:])
        if crc != checksum:
            raise CorruptBlobError(
                "checksum of trace does not match",
                blob=name,
                offset=16,
                got=f"{crc:#010x}",
                wanted=f"{checksum:#010x}",
            )
        return cls(np.frombuffer(data, RECORD, offset=HEADER_SIZE))

    def to_bytes(self) -> bytes:
        """Return the file."""
        records = self.records.tobytes()
        return _HEADER.pack(MAGIC, len(records), raw_crc32c(records)) + records

    def __len__(self) -> int:
        return len(self.records)

    @property
    def size(self) -> int:
        """Bytes read; a range read twice counts twice."""
        return int(self.records["length"].sum())

    def reads(self) -> list[tuple[int, int, int]]:
        """Return (layer, offset, length) of each read. Records of writes, which no recorder makes, are left out."""
        return list(self.each_read())

    def each_read(self) -> Iterator[tuple[int, int, int]]:
        """Yield what :meth:`reads` returns, in little memory."""
        for first in range(0, len(self.records), _AT_ONCE):
            records = self.records[first : first + _AT_ONCE]
            reads = records[records["op"] == b"R"]
            yield from zip(*(reads[name].tolist() for name in ("layer", "offset", "length")), strict=True)

    def check_fits(self, sizes: list[int], *, name: str = "trace") -> None:
        """Raise FormatError unless every read lies inside its layer. ``sizes`` are those of the layers, bottom
        first."""
        for number, (layer, offset, length) in enumerate(self.each_read()):
            if layer >= len(sizes) or not 0 <= offset <= offset + length <= sizes[layer]:
                has = f"{sizes[layer]} bytes" if layer < len(sizes) else f"{len(sizes)} layers"
                raise FormatError(
                    f"trace is not of this image (record {number})",
                    blob=name,
                    got=f"layer {layer}, [{offset}, {offset + length})",
                    wanted=f"inside of {has}",
                )


def content_of_layer(data: bytes, *, name: str = "acceleration layer") -> bytes:
    """Return the trace in an acceleration layer, a tar with one file. Raises FormatError if it is malformed."""
    window = parse_wrap(data[:1536], blob=name)
    if window is None or window.offset + window.size > len(data):
        raise FormatError("not a tar with a trace", blob=name, got=f"{len(data)} bytes")
    return data[window.offset : window.offset + window.size]


def layer_of_content(content: bytes) -> bytes:
    """Return the acceleration layer that holds a trace or a priority list, byte for byte as the original makes it."""
    return file_header(b"trace", len(content)) + content + wrap_tail(len(content))


@dataclass(frozen=True, slots=True)
class PriorityList:
    """Paths of files to fetch first; each of ``directories`` stands for everything below it."""

    files: tuple[str, ...]
    directories: tuple[str, ...]

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "priority list") -> tuple[Self, list[str]]:
        """Read one path per line; return the list, and a reason for each line that was left out.

        A directory ends in "/" or "*". Raises FormatError for more than 65,536 bytes, and if no line is a path.
        """
        if len(data) > MAX_LIST_SIZE:
            raise FormatError("priority list is too large", blob=name, got=len(data), wanted=f"<= {MAX_LIST_SIZE}")
        files, directories, odd = [], [], []
        for number, raw in enumerate(data.decode(errors="replace").splitlines(), 1):
            line = raw.strip()
            if not line:
                continue
            if _LIST_LINE.fullmatch(line) is None:
                odd.append(f"{name}: line {number}: not a plain path (got {line[:80]!r})")
            elif line.endswith(("/", "*")):
                directories.append(line.rstrip("*"))
            else:
                files.append(line)
        if odd and not files and not directories:
            raise FormatError("neither a trace nor a list of paths", blob=name, got=odd[0].partition(": ")[2])
        return cls(tuple(files), tuple(directories)), odd
