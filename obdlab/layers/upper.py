"""Writable layers: the sparse one that obdlab writes, and the append-only one of the original, read only here."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import uuid as uuid_module
from typing import TYPE_CHECKING, Self

import numpy as np

from obdlab.blob import Blob, check_range
from obdlab.errors import FormatError, OutOfRangeError, SourceError
from obdlab.formats.lsmt.index import SegmentIndex
from obdlab.formats.lsmt.layout import (
    HEADER_SPACE,
    MAGIC,
    MAX_VIRTUAL_SIZE,
    MAX_WRITABLE_RECORDS,
    RECORD_SIZE,
    SECTOR,
    STRUCT_SIZE,
    Flags,
    Header,
    check_mapped,
    decode_segments,
    encode_user_tag,
    mapped_inside,
)
from obdlab.formats.lsmt.segmentmap import SegmentMap

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from obdlab.blob import Buffer
    from obdlab.formats.lsmt.index import Run

_HEADER_SECTORS = HEADER_SPACE // SECTOR
_BLOCK = 4096
# linux/falloc.h
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class SparseUpper:
    """A writable layer in one sparse file: the disk's byte X lies at file byte 4096 + X (overlaybd's sparse mode).

    What is allocated in the file is what the layer holds, so there is no index to write: opening asks the file
    system which ranges are data. It answers in blocks of 4 KiB, so that a layer over others must be written through
    a :class:`~obdlab.layers.stack.WritableStack`, which fills up blocks. All methods may be called from several
    threads; overlapping writes must be ordered by the caller. I/O errors of the file are raised as SourceError.
    """

    #: A write should fill blocks of this size, counted from the disk's start.
    block_size = _BLOCK

    def __init__(self, descriptor: int, path: str, header: Header, held: SegmentMap) -> None:
        self.name = path
        self.header = header
        self._file = _FileBlob(descriptor, path)
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
        size must be a multiple of 512.
        """
        _check_virtual_size(virtual_size)
        name = os.fspath(path)
        header = Header(
            flags=Flags.HEADER | Flags.DATA | Flags.SPARSE,
            virtual_size=virtual_size,
            uuid=uuid or str(uuid_module.uuid4()).upper(),
            parent_uuid=parent_uuid or "",
            user_tag=encode_user_tag(user_tag),
        )
        head = header.to_bytes()
        descriptor = _open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            _write_header(descriptor, name, head)
            _truncate(descriptor, name, HEADER_SPACE + virtual_size)
        except BaseException:
            os.close(descriptor)
            os.unlink(name)
            raise
        return cls(descriptor, name, Header.from_bytes(head), SegmentMap(join=True))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a layer file for reading and writing.

        Raises SourceError if the file cannot be had, FormatError if it is no sparse writable layer, is cut short, or
        was sealed in place since.
        """
        name = os.fspath(path)
        descriptor = _open(name, os.O_RDWR)
        try:
            header = _read_header(_FileBlob(descriptor, name), wanted=Flags.DATA | Flags.SPARSE)
            if header.virtual_size % SECTOR:
                raise FormatError("virtual size is no whole number of sectors", blob=name, got=header.virtual_size)
            _check_sparse_size(descriptor, name, header)
            held = SegmentMap(join=True)
            for begin, end in _data_extents(descriptor, name, HEADER_SPACE + header.virtual_size):
                held.insert(begin // SECTOR - _HEADER_SECTORS, -(-end // SECTOR) - _HEADER_SECTORS, begin // SECTOR)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, name, header, held)

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
                written += _write(self._file.descriptor, self.name, HEADER_SPACE + offset + written, view[written:])
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
        _punch_hole(self._file.descriptor, self.name, HEADER_SPACE + offset, length)
        with self._lock:
            self._map.remove(-(-offset // SECTOR), (offset + length) // SECTOR)

    def flush(self) -> None:
        """Return once everything written before is on stable storage."""
        try:
            os.fdatasync(self._file.descriptor)
        except OSError as error:
            raise _failed("flushing", self.name, None, error) from error

    def set_virtual_size(self, virtual_size: int) -> None:
        """Grow the disk. The file is extended first, so that a crash in between leaves a layer that opens."""
        _check_virtual_size(virtual_size)
        if virtual_size < self.virtual_size:
            raise OutOfRangeError(f"{self.name}: a layer cannot shrink (got {virtual_size}, has {self.virtual_size})")
        header = Header(
            flags=self.header.flags,
            virtual_size=virtual_size,
            uuid=self.header.uuid,
            parent_uuid=self.header.parent_uuid,
            user_tag=self.header.user_tag,
        )
        _truncate(self._file.descriptor, self.name, HEADER_SPACE + virtual_size)
        _write_header(self._file.descriptor, self.name, header.to_bytes())
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
        data = _FileBlob.open(os.fspath(data_path))
        try:
            with _FileBlob.open(os.fspath(index_path)) as log:
                header = _read_header(data, wanted=Flags.DATA)
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


class _FileBlob(Blob):
    # A layer's own file by positional reads; its size may grow. Once closed, its descriptor's number is another's.

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: str) -> _FileBlob:
        return cls(_open(path, os.O_RDONLY), path)

    @property
    def descriptor(self) -> int:
        if self._descriptor < 0:
            raise SourceError("layer file is closed", blob=self.name)
        return self._descriptor

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self.descriptor, length, offset)
            while len(data) < length:  # a pread gives at most 2 GiB
                more = os.pread(self.descriptor, length - len(data), offset + len(data))
                if not more:
                    check_range(self, offset, length)
                    raise SourceError("file ends early", blob=self.name, offset=offset + len(data))
                data += more
        except OSError as error:
            raise _failed("reading", self.name, offset, error) from error
        return data

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _read_header(blob: Blob, *, wanted: Flags) -> Header:
    header = Header.from_bytes(blob.read_at(0, min(STRUCT_SIZE, blob.size)), blob=blob.name)
    looked_at = Flags.DATA | Flags.SPARSE | Flags.SEALED
    if header.flags & looked_at != wanted:
        raise FormatError(
            "LSMT file is another kind of writable layer",
            blob=blob.name,
            offset=28,
            got=f"flags {int(header.flags):#x}",
            wanted=f"{int(wanted):#x} of {int(looked_at):#x}",
        )
    return header


def _check_virtual_size(virtual_size: int) -> None:
    if virtual_size % SECTOR or not 0 <= virtual_size <= MAX_VIRTUAL_SIZE:
        raise OutOfRangeError(
            f"a sparse layer cannot have this virtual size (got {virtual_size}, "
            f"wanted a multiple of {SECTOR} up to {MAX_VIRTUAL_SIZE})"
        )


def _check_sparse_size(descriptor: int, name: str, header: Header) -> None:
    size = os.fstat(descriptor).st_size
    wanted = HEADER_SPACE + header.virtual_size
    if size < wanted:
        raise FormatError("sparse layer is cut short", blob=name, got=f"{size} bytes", wanted=wanted)
    # Longer is a resize that was interrupted; unless a trailer ends the file, which sealing in place appends.
    if size > wanted and os.pread(descriptor, len(MAGIC), size - HEADER_SPACE) == MAGIC:
        raise FormatError("sparse layer was sealed, it can only be read", blob=name, offset=size - HEADER_SPACE)


def _data_extents(descriptor: int, name: str, end: int) -> Iterator[tuple[int, int]]:
    # File ranges of [4096, end) that the file system holds data for.
    at = HEADER_SPACE
    while at < end:
        try:
            begin = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data after `at`
                return
            raise _failed("looking for data", name, at, error) from error
        if begin < end:
            yield begin, min(at, end)


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


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _failed("opening", path, None, error) from error


def _truncate(descriptor: int, name: str, size: int) -> None:
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        raise _failed(f"resizing to {size} bytes", name, None, error) from error


def _punch_hole(descriptor: int, name: str, offset: int, length: int) -> None:
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    while _libc.fallocate(descriptor, mode, offset, length):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise _failed("punching a hole", name, offset, OSError(code, os.strerror(code)))


def _write(descriptor: int, name: str, offset: int, data: Buffer) -> int:
    # At least one byte; how many, is returned.
    try:
        return os.pwrite(descriptor, data, offset)
    except OSError as error:
        raise _failed("writing", name, offset, error) from error


def _write_header(descriptor: int, name: str, head: bytes) -> None:
    written = 0
    while written < len(head):
        written += _write(descriptor, name, written, head[written:])


def _failed(doing: str, name: str, offset: int | None, error: OSError) -> SourceError:
    failure = SourceError(f"{doing} failed: {error.strerror}", blob=name, offset=offset)
    failure.__cause__ = error
    return failure
