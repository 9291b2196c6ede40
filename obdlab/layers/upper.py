"""The writable layer: one sparse file."""

from __future__ import annotations

import os
import threading
import uuid as uuid_module
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from obdlab.errors import FormatError, OutOfRangeError, SourceError
from obdlab.formats.lsmt.layout import (
    HEADER_SPACE,
    MAGIC,
    MAX_VIRTUAL_SIZE,
    SECTOR,
    Flags,
    Header,
    encode_user_tag,
)
from obdlab.formats.lsmt.segmentmap import SegmentMap
from obdlab.layers.layerfile import LayerFile

if TYPE_CHECKING:
    from types import TracebackType

    from obdlab.blob import Blob, Buffer
    from obdlab.formats.lsmt.index import Run, SegmentIndex

_HEADER_SECTORS = HEADER_SPACE // SECTOR
_BLOCK = 4096


class SparseUpper:
    """A writable layer in one sparse file: the disk's byte X lies at file byte 4096 + X (overlaybd's sparse mode).

    What is allocated in the file is what the layer holds, so there is no index to write: opening asks the file
    system which ranges are data. It answers in blocks of 4 KiB, so that a layer over others must be written through
    a :class:`~obdlab.layers.stack.WritableStack`, which fills up blocks. All methods may be called from several
    threads; overlapping writes must be ordered by the caller. I/O errors of the file are raised as SourceError.
    """

    #: A write should fill blocks of this size, counted from the disk's start.
    block_size = _BLOCK

    def __init__(self, file: LayerFile, header: Header, held: SegmentMap) -> None:
        self.name = file.name
        self.header = header
        self._file = file
        self._map = held
        self._lock = threading.Lock()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        virtual_size: int,
        *,
        uuid: str | None = None,
        parent_uuid: str | None = None,
        user_tag: str = "",
    ) -> Self:
        """Make an empty layer file, with a random UUID if none is given. The file must not exist yet.

        A virtual size of 0 means that of the layers below; it is filled in when the layer is stacked.
        Raises SourceError if the file cannot be made, ValueError if a UUID, the tag or the size does not fit; the
        size must be a multiple of 512. A file system that cannot tell 4 KiB holes from data is refused (SourceError).
        """
        _check_virtual_size(virtual_size)
        head = Header(
            flags=Flags.HEADER | Flags.DATA | Flags.SPARSE,
            virtual_size=virtual_size,
            uuid=uuid or str(uuid_module.uuid4()),
            parent_uuid=parent_uuid or "",
            user_tag=encode_user_tag(user_tag),
        ).to_bytes()
        file = LayerFile(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            file.write_at(0, head)
            file.resize(HEADER_SPACE + virtual_size)
            _check_holes(file, virtual_size)
        except BaseException:
            file.close()
            os.unlink(path)
            raise
        return cls(file, Header.from_bytes(head), SegmentMap(join=True))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a layer file for reading and writing.

        Raises SourceError if the file cannot be had, FormatError if it is no sparse writable layer, is cut short, or
        was sealed in place since.
        """
        file = LayerFile(path, os.O_RDWR)
        try:
            header = file.read_header(Flags.DATA | Flags.SPARSE)
            _check_size(file, header)
            held = SegmentMap(join=True)
            for begin, end in file.data_extents(HEADER_SPACE, HEADER_SPACE + header.virtual_size):
                held.insert(begin // SECTOR - _HEADER_SECTORS, -(-end // SECTOR) - _HEADER_SECTORS, begin // SECTOR)
        except BaseException:
            file.close()
            raise
        return cls(file, header, held)

    @property
    def data(self) -> Blob:
        """The layer's file."""
        return self._file

    @property
    def virtual_size(self) -> int:
        """Size of the disk in bytes."""
        return self.header.virtual_size

    @property
    def uuid(self) -> str:
        """The layer's UUID."""
        return self.header.uuid

    @property
    def parent_uuid(self) -> str:
        """UUID of the layer this one was made on."""
        return self.header.parent_uuid

    @property
    def index(self) -> SegmentIndex:
        """A frozen copy of what the layer holds now."""
        with self._lock:
            return self._map.to_index()

    def lookup(self, begin: int, end: int) -> list[Run]:
        """Which of the disk's sectors ``[begin, end)`` the layer holds, as :meth:`SegmentIndex.lookup` tells it."""
        with self._lock:
            return self._map.lookup(begin, end)

    def read_at(self, offset: int, length: int) -> bytes:
        """The disk's bytes as this layer has them: zeros where it holds nothing."""
        self._check_range(offset, length)
        return self._file.read_at(HEADER_SPACE + offset, length)

    def write_at(self, offset: int, data: Buffer) -> None:
        """Store all of ``data``; the sectors it touches belong to this layer from then on."""
        view = memoryview(data).cast("B")
        self._check_range(offset, len(view))
        written = 0
        try:
            while written < len(view):
                written += self._file.write_some(HEADER_SPACE + offset + written, view[written:])
        finally:
            # Also if the disk filled up midway: the map must say what the file says.
            if written:
                begin, end = offset // SECTOR, -(-(offset + written) // SECTOR)
                with self._lock:
                    self._map.insert(begin, end, begin + _HEADER_SECTORS)

    def discard(self, offset: int, length: int) -> None:
        """Make the range read as zeros and free its space; whole sectors of it are no longer held."""
        self._check_range(offset, length)
        if not length:
            return
        self._file.punch_hole(HEADER_SPACE + offset, length)
        with self._lock:
            self._map.remove(-(-offset // SECTOR), (offset + length) // SECTOR)

    def flush(self) -> None:
        """Return once everything written before is on stable storage."""
        self._file.sync()

    def set_virtual_size(self, virtual_size: int) -> None:
        """Grow the disk. The file is extended first, so that a crash in between leaves a layer that opens."""
        _check_virtual_size(virtual_size)
        if virtual_size < self.virtual_size:
            raise OutOfRangeError(f"{self.name}: a layer cannot shrink (got {virtual_size}, has {self.virtual_size})")
        self._file.resize(HEADER_SPACE + virtual_size)
        if not self.virtual_size:
            _check_holes(self._file, virtual_size)
        header = replace(self.header, virtual_size=virtual_size)
        self._file.write_at(0, header.to_bytes())
        self.header = header

    def close(self) -> None:
        """Close the file. What was not flushed is the kernel's to write, and survives this process."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.header.virtual_size:
            raise OutOfRangeError(
                f"{self.name}: range outside the disk (got [{offset}, {offset + length}), "
                f"wanted inside [0, {self.header.virtual_size}))"
            )


def _check_virtual_size(virtual_size: int) -> None:
    if virtual_size % SECTOR or not 0 <= virtual_size <= MAX_VIRTUAL_SIZE:
        raise OutOfRangeError(
            f"a sparse layer cannot have this virtual size (got {virtual_size}, "
            f"wanted a multiple of {SECTOR} up to {MAX_VIRTUAL_SIZE})"
        )


def _check_size(file: LayerFile, header: Header) -> None:
    if header.virtual_size % SECTOR:
        raise FormatError(
            "virtual size is no whole number of sectors", blob=file.name, offset=48, got=header.virtual_size
        )
    size, wanted = file.size, HEADER_SPACE + header.virtual_size
    if size < wanted:
        raise FormatError("sparse layer is cut short", blob=file.name, got=f"{size} bytes", wanted=wanted)
    # Longer is a resize that was interrupted; unless a trailer ends the file, which sealing in place appends.
    end = size - HEADER_SPACE
    if size > wanted and file.read_at(end, len(MAGIC)) == MAGIC:
        raise FormatError("sparse layer was sealed, it can only be read", blob=file.name, offset=end)


def _check_holes(file: LayerFile, virtual_size: int) -> None:
    # An empty layer that is all data after a reopening would hide every lower layer.
    for begin, end in file.data_extents(HEADER_SPACE, HEADER_SPACE + virtual_size):
        raise SourceError(
            f"file system cannot keep a sparse layer: it takes the hole [{begin}, {end}) for data", blob=file.name
        )
