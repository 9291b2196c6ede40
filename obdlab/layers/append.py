"""The original's append-mode writable layer, opened for reading."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

import numpy as np

from obdlab.errors import FormatError
from obdlab.formats.lsmt.index import SegmentIndex
from obdlab.formats.lsmt.layout import (
    HEADER_SPACE,
    MAX_WRITABLE_RECORDS,
    RECORD_SIZE,
    SECTOR,
    STRUCT_SIZE,
    Flags,
    Header,
    check_mapped,
    decode_segments,
    mapped_inside,
)
from obdlab.formats.lsmt.segmentmap import SegmentMap
from obdlab.layers.layerfile import LayerFile

if TYPE_CHECKING:
    from types import TracebackType

    from obdlab.blob import Blob


class AppendUpper:
    """A writable layer of the original in append mode, a data file and an index file, opened for reading.

    The index file is a log of records in the order of writing. Records at its end that point past the data file (a
    crash came between the two) are dropped, as is a torn last record; anywhere else they are an error.
    """

    def __init__(self, header: Header, data: Blob, index: SegmentIndex) -> None:
        self.name = data.name
        self.header = header
        self.data = data
        self.index = index

    @classmethod
    def open(cls, data_path: str | os.PathLike[str], index_path: str | os.PathLike[str]) -> Self:
        """Open both files. Raises SourceError if one cannot be had, FormatError if they are not such a layer."""
        data = LayerFile(data_path, os.O_RDONLY)
        try:
            with LayerFile(index_path, os.O_RDONLY) as log:
                header = data.read_header(Flags.DATA)
                return cls(header, data, _replay(log, data.size))
        except BaseException:
            data.close()
            raise

    @property
    def virtual_size(self) -> int:
        """Size of the disk in bytes; 0 leaves it to the layers below."""
        return self.header.virtual_size

    @property
    def uuid(self) -> str:
        """The layer's UUID."""
        return self.header.uuid

    @property
    def parent_uuid(self) -> str:
        """UUID of the layer this one was made on."""
        return self.header.parent_uuid

    def close(self) -> None:
        """Close the data file."""
        self.data.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _replay(log: Blob, data_size: int) -> SegmentIndex:
    header = Header.from_bytes(log.read_at(0, min(STRUCT_SIZE, log.size)), blob=log.name)
    if header.flags & (Flags.DATA | Flags.SEALED) or header.index_offset != HEADER_SPACE:
        raise FormatError(
            "LSMT file is not the index of a writable layer",
            blob=log.name,
            got=f"flags {int(header.flags):#x}, index at {header.index_offset}",
            wanted=f"neither data nor sealed, index at {HEADER_SPACE}",
        )
    count = max(0, log.size - HEADER_SPACE) // RECORD_SIZE
    if count > MAX_WRITABLE_RECORDS:
        raise FormatError("LSMT index has too many records", blob=log.name, got=count, wanted=MAX_WRITABLE_RECORDS)
    segments = decode_segments(log.read_at(HEADER_SPACE, count * RECORD_SIZE) if count else b"")
    end_sectors = data_size // SECTOR
    good = np.flatnonzero(mapped_inside(segments, end_sectors))
    segments = segments[: int(good[-1]) + 1 if len(good) else 0]
    check_mapped(segments, end_sectors, blob=log.name, offset=HEADER_SPACE)
    held = SegmentMap()
    for begin, length, moffset, zeroed, _ in segments.rows():
        held.insert(begin, begin + length, moffset, zeroed=zeroed)
    return held.to_index()
