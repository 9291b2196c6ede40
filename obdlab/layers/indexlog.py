"""The index file of an append-mode layer: a log of records in the order of writing (overlaybd LSMT layout)."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from obdlab.errors import FormatError, SourceError
from obdlab.formats.lsmt.layout import (
    HEADER_SPACE,
    MAX_WRITABLE_RECORDS,
    RECORD_SIZE,
    SECTOR,
    STRUCT_SIZE,
    Flags,
    Header,
    Segments,
    decode_segments,
    encode_segments,
    filler_records,
    mapped_inside,
    meant_records,
)
from obdlab.layers.layerfile import LayerFile

if TYPE_CHECKING:
    from obdlab.blob import Blob

_READ_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class Dropped:
    """The parts left out when opening an append-mode layer after a crash: none of them was ever flushed.

    ``records`` had no or incomplete data; ``log_bytes`` and ``data_bytes`` are odd bytes at the files' ends.
    """

    records: int = 0
    log_bytes: int = 0
    data_bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self.records or self.log_bytes or self.data_bytes)


@dataclass(frozen=True, slots=True)
class LogContent:
    """The records of a log in the order of writing, the end of the last one in the file, and the parts left out."""

    header: Header
    records: Segments
    end: int
    dropped: Dropped

    @property
    def data_end(self) -> int:
        """End of the data that the records map, in bytes of the data file."""
        ends = self.records.moffset_sectors + self.records.mapped_sectors
        return int(ends.max(initial=0)) * SECTOR


def read_log(log: Blob, data_size: int) -> LogContent:
    """Read an index file whose data file has ``data_size`` bytes.

    Records at the end that point past the data are dropped (a crash came between data and record), and so is a torn
    last one. Raises FormatError if the file is not such an index, or a record anywhere else points outside of the
    data. Memory grows with the records other than fillers, not with the file's size.
    """
    header = Header.from_bytes(log.read_at(0, min(STRUCT_SIZE, log.size)), blob=log.name)
    if header.flags & (Flags.DATA | Flags.SEALED) or header.index_offset != HEADER_SPACE:
        raise FormatError(
            "LSMT file is not the index of a writable layer",
            blob=log.name,
            got=f"flags {int(header.flags):#x}, index at {header.index_offset}",
            wanted=f"neither data nor sealed, index at {HEADER_SPACE}",
        )
    size = max(0, log.size - HEADER_SPACE)
    count, torn = divmod(size, RECORD_SIZE)
    if count > MAX_WRITABLE_RECORDS:
        raise FormatError("LSMT index has too many records", blob=log.name, got=count, wanted=MAX_WRITABLE_RECORDS)

    stop = HEADER_SPACE + count * RECORD_SIZE
    parts, bad_at, bad_count = _read_records(log, stop, data_size // SECTOR)
    return LogContent(
        header=header,
        records=Segments.concatenate(parts),
        end=stop if bad_at is None else bad_at,
        dropped=Dropped(bad_count, torn, data_size % SECTOR),
    )


def _read_records(log: Blob, stop: int, end_sectors: int) -> tuple[list[Segments], int | None, int]:
    # Returns the good records, the position of the first bad one, and the number of bad ones.
    parts: list[Segments] = []
    bad_at: int | None = None
    bad_count = 0
    for at in range(HEADER_SPACE, stop, _READ_SIZE):
        data = log.read_at(at, min(_READ_SIZE, stop - at))
        part = decode_segments(data)
        inside = mapped_inside(part, end_sectors)
        if bad_at is None:
            good = len(part) if inside.all() else int(np.argmin(inside))
            if good:
                parts.append(part[:good])
            if good == len(part):
                continue
            bad_at = at + int(meant_records(data)[good]) * RECORD_SIZE
            inside = inside[good:]
        if inside.any():
            raise _bad_record(log, bad_at, end_sectors)
        bad_count += len(inside)
    return parts, bad_at, bad_count


def _bad_record(log: Blob, at: int, end_sectors: int) -> FormatError:
    record = decode_segments(log.read_at(at, RECORD_SIZE))
    begin, length = int(record.moffset_sectors[0]), int(record.mapped_sectors[0])
    return FormatError(
        f"LSMT index record {(at - HEADER_SPACE) // RECORD_SIZE} points outside of the layer's data",
        blob=log.name,
        offset=at,
        got=f"sectors [{begin}, {begin + length})",
        wanted=f"inside [{HEADER_SPACE // SECTOR}, {end_sectors})",
    )


class IndexLog:
    """The index file of a writable layer. Not safe for use by several threads at once.

    With ``group_records``, that many records are collected in memory and written at once. An incomplete group that
    must be stored is filled up with fillers.
    """

    def __init__(self, file: LayerFile, header: Header, end: int, records: int) -> None:
        self.header = header
        #: Position of the next record in the file.
        self.end = end
        #: Records in the file and in the group, fillers included.
        self.records = records
        self._file = file
        self._group: list[bytes] = []
        self._group_records = 0

    def set_group_records(self, count: int) -> None:
        """Collect ``count`` records before writing them; 0 turns grouping off."""
        if count < 0:
            raise ValueError(f"cannot collect {count} records")
        self.write_group()
        self._group_records = count

    def append(self, record: bytes) -> None:
        """Log one record."""
        if self.records >= MAX_WRITABLE_RECORDS:
            raise SourceError(f"index has {self.records} records, no more fit", blob=self._file.name)
        self._group.append(record)
        try:
            if len(self._group) >= self._group_records:
                self._write(b"".join(self._group))
        except BaseException:
            self._group.pop()  # the caller takes the record for not written
            raise
        self.records += 1

    def write_group(self) -> None:
        """Write the collected records to the file."""
        if self._group:
            fillers = self._group_records - len(self._group)
            self._write(b"".join(self._group) + filler_records(fillers))
            self.records += fillers

    def _write(self, data: bytes) -> None:
        # Written by position: the next write overwrites the remains of a failed one.
        self._file.write_at(self.end, data)
        self.end += len(data)
        self._group.clear()

    def sync(self) -> None:
        """Return once the file is on stable storage."""
        self._file.sync()

    def set_virtual_size(self, virtual_size: int) -> None:
        """Rewrite the header's virtual size."""
        self.header = replace(self.header, virtual_size=virtual_size)
        self._file.write_at(0, self.header.to_bytes())

    def begin_rewrite(self, segments: Segments) -> LayerFile:
        """Make a file beside this one that holds only ``segments``. :meth:`go_on_in` completes the rewrite."""
        path = os.path.realpath(self._file.name) + ".compacted"
        with suppress(FileNotFoundError):
            os.unlink(path)  # left by an interrupted compaction
        file = LayerFile(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            file.take_after(self._file)
            file.write_at(0, self.header.to_bytes())
            file.write_at(HEADER_SPACE, encode_segments(segments))
            file.sync()
        except BaseException:
            discard_file(file, path)
            raise
        return file

    def go_on_in(self, file: LayerFile, since: int) -> None:
        """Append all records logged after byte ``since`` to ``file``, and put it in the place of this file.

        The rename is on stable storage only after the next :meth:`sync`.
        """
        self.write_group()
        end = file.size
        for at in range(since, self.end, _READ_SIZE):
            part = self._file.read_at(at, min(_READ_SIZE, self.end - at))
            file.write_at(end, part)
            end += len(part)
        file.write_at(0, self.header.to_bytes())
        file.sync()
        file.rename(os.path.realpath(self._file.name))
        old, self._file = self._file, file
        old.close()
        self.end = end
        self.records = (end - HEADER_SPACE) // RECORD_SIZE

    def close(self) -> None:
        """Write the group and close the file."""
        try:
            self.write_group()
        finally:
            self._file.close()


def discard_file(file: LayerFile, path: str) -> None:
    """Close an unfinished file, and delete it if it still has its first name, ``path``."""
    file.close()
    with suppress(OSError):
        os.unlink(path)
