"""Sealing in place: index and trailer appended to a writable layer's data file (overlaybd LSMT layout)."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from obdlab.errors import FormatError, SourceError
from obdlab.formats.lsmt.index import coalesce
from obdlab.formats.lsmt.layout import (
    HEADER_SPACE,
    MAX_SEALED_RECORDS,
    RECORD_SIZE,
    SECTOR,
    STRUCT_SIZE,
    Flags,
    Header,
    Trailer,
    encode_segments,
)
from obdlab.layers.layerfile import sync_directory

if TYPE_CHECKING:
    from obdlab.formats.lsmt.segmentmap import SegmentMap
    from obdlab.layers.layerfile import LayerFile

logger = logging.getLogger(__name__)


def sealed_records(held: SegmentMap, name: str) -> bytes:
    """Return the index of a layer to be sealed, as the original's: segments are joined only if there are too many.

    Raises FormatError naming the layer if there are more than 1,000,000 even joined.
    """
    records = held.to_records()
    if len(records) > MAX_SEALED_RECORDS * RECORD_SIZE:
        records = encode_segments(coalesce(held.to_segments()))
    if len(records) > MAX_SEALED_RECORDS * RECORD_SIZE:
        raise FormatError(
            "layer has too many segments to be sealed",
            blob=name,
            got=len(records) // RECORD_SIZE,
            wanted=f"at most {MAX_SEALED_RECORDS}",
        )
    return records


def append_seal(file: LayerFile, header: Header, records: bytes, index_offset: int, *, marked: bool = False) -> None:
    """Write the index, :func:`sealed_records`, and a trailer at ``index_offset``, the end of the data, and sync.

    The header stays as it is. The trailer is written after the index is on stable storage, so that a crash leaves the
    layer either sealed or not. A ``marked`` layer (:class:`SwitchMark`) skips that sync: opening it undoes an
    unfinished seal.
    """
    trailer = Trailer(
        flags=(header.flags & Flags.SPARSE) | Flags.DATA | Flags.SEALED,
        index_offset=index_offset,
        index_size=len(records) // RECORD_SIZE,
        virtual_size=header.virtual_size,
        uuid=header.uuid,
        parent_uuid=header.parent_uuid,
        user_tag=header.user_tag,
    ).to_bytes()
    padded_size = _padded(len(records))
    try:
        file.resize(index_offset)  # remains of a failed write behind the data
        if records:
            file.write_at(index_offset, records.ljust(padded_size, b"\0"))
        if not marked:
            file.sync()
        file.write_at(index_offset + padded_size, trailer)
        file.sync()
    except BaseException:
        with suppress(SourceError):
            file.resize(index_offset)
        raise


def find_seal(file: LayerFile, header: Header, data_end: int = 0) -> Trailer | None:
    """Return the trailer that sealing has appended to this writable layer's file, None if it was not sealed.

    A guest may write data that looks like a trailer to an append-mode layer. So the trailer must fit this layer and
    this file, and lie after ``data_end``, the end of all data in the log.
    """
    at = file.size - HEADER_SPACE
    if at < HEADER_SPACE:
        return None
    try:
        trailer = Trailer.from_bytes(file.read_at(at, STRUCT_SIZE))
    except FormatError:
        return None
    fits = (
        trailer.flags & (Flags.DATA | Flags.SEALED) == Flags.DATA | Flags.SEALED
        and trailer.index_offset >= max(HEADER_SPACE, data_end)
        and trailer.index_offset + _padded(trailer.index_size * RECORD_SIZE) == at
        and (trailer.uuid == header.uuid or bool(header.flags & Flags.SPARSE))
    )
    return trailer if fits else None


def undo_seal(file: LayerFile, trailer: Trailer) -> None:
    """Cut off the index and the trailer."""
    file.resize(trailer.index_offset)
    file.sync()


class SwitchMark:
    """A file beside the data file that marks it as being sealed to become a lower layer, but not used as one yet.

    A crash in that time leaves a sealed layer that its configuration still names as the writable one. If the mark
    exists, opening the layer undoes the seal.
    """

    def __init__(self, data_path: str) -> None:
        self._path = data_path + ".restacking"

    def exists(self) -> bool:
        """Return True if the mark exists."""
        return os.path.exists(self._path)

    def put(self) -> None:
        """Make the mark, on stable storage. Raises SourceError."""
        try:
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise SourceError(f"making the mark failed: {error.strerror}", blob=self._path) from error
        sync_directory(self._path)

    def remove(self) -> None:
        """Remove the mark, if it exists. Raises SourceError."""
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise SourceError(f"removing the mark failed: {error.strerror}", blob=self._path) from error
        sync_directory(self._path)


def recover_seal(file: LayerFile, header: Header, data_end: int = 0) -> None:
    """Undo the seal of an interrupted restack when opening for writing; FormatError for any other seal."""
    trailer = find_seal(file, header, data_end)
    mark = SwitchMark(file.name)
    if trailer is not None:
        if not mark.exists():
            raise FormatError(
                "layer was sealed, it can only be read", blob=file.name, offset=file.size - HEADER_SPACE
            )
        logger.warning("%s: undoing the seal of a restack that was interrupted", file.name)
        undo_seal(file, trailer)
    mark.remove()


def _padded(size: int) -> int:
    return -(-size // SECTOR) * SECTOR
