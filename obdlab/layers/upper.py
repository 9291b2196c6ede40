"""The writable layer in one sparse file, and the choice between it and the append-mode layer."""

from __future__ import annotations

import os
import threading
import uuid as uuid_module
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from obdlab.errors import FormatError, SourceError
from obdlab.formats.lsmt.layout import (
    HEADER_SPACE,
    SECTOR,
    STRUCT_SIZE,
    Flags,
    Header,
    encode_user_tag,
)
from obdlab.formats.lsmt.segmentmap import SegmentMap
from obdlab.formats.tar import parse_wrap
from obdlab.formats.zfile.layout import HEADER_SIZE as ZFILE_HEADER_SIZE
from obdlab.formats.zfile.layout import is_zfile
from obdlab.layers.append import AppendUpper
from obdlab.layers.layerfile import LayerFile
from obdlab.layers.seal import SwitchMark, append_seal, recover_seal, sealed_records
from obdlab.layers.upperstate import TRANSITIONS, State
from obdlab.layers.writable import Upper, check_virtual_size
from obdlab.states import StateOf

if TYPE_CHECKING:
    from obdlab.blob import Buffer
    from obdlab.call import Call

_HEADER_SECTORS = HEADER_SPACE // SECTOR
_BLOCK = 4096


def open_upper(
    data_path: str | os.PathLike[str], index_path: str | os.PathLike[str], *, read_only: bool = False
) -> Upper:
    """Open a writable layer of either kind, for writing unless ``read_only``; its header names the kind.

    Raises SourceError if a file cannot be opened or is in use, FormatError if the files are not a writable layer. The
    index file of a sparse layer is not read.
    """
    with LayerFile(data_path, os.O_RDONLY) as file:
        start = file.read_at(0, min(HEADER_SPACE, file.size))
        if is_zfile(start[:ZFILE_HEADER_SIZE], blob=file.name) or parse_wrap(start, blob=file.name):
            raise FormatError("compressed or in a tar", blob=file.name, wanted="the data file of a writable layer")
        header = Header.from_bytes(start[:STRUCT_SIZE], blob=file.name)
    if header.flags & Flags.SPARSE:
        return SparseUpper.open(data_path, read_only=read_only)
    return AppendUpper.open(data_path, index_path, read_only=read_only)


class SparseUpper(Upper):
    """A writable layer in one sparse file: the disk's byte X lies at file byte 4096 + X (overlaybd's sparse mode).

    The allocated blocks of the file are the ranges the layer holds, so there is no index to write: opening asks the
    file system which ranges are data. It answers in blocks of 4 KiB, so a layer over others must be written through a
    :class:`~obdlab.layers.stack.WritableStack`, which fills up blocks.
    """

    block_size = _BLOCK
    takes_partial_blocks = True
    discard_hides = False

    def __init__(self, file: LayerFile, header: Header, held: SegmentMap, state: State = State.WRITABLE) -> None:
        self.name = file.name
        self.header = header
        self._file = file
        self._map = held
        self._lock = threading.Lock()
        self._state = StateOf(self.name, state, TRANSITIONS)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        virtual_size: int,
        *,
        index_path: str | os.PathLike[str] | None = None,
        uuid: str | None = None,
        parent_uuid: str | None = None,
        user_tag: str = "",
    ) -> Self:
        """Make an empty layer file, with a random UUID if none is given. The file must not exist yet.

        A virtual size of 0 means that of the layers below; it is filled in when the layer is stacked. ``index_path``
        gets an empty file, which configurations must name although it stays empty. Raises SourceError if the file
        cannot be made, ValueError if a UUID, the tag or the size does not fit; the size must be a multiple of 512. A
        file system that does not report 4 KiB holes is refused (SourceError).
        """
        check_virtual_size(virtual_size)
        head = Header(
            flags=Flags.HEADER | Flags.DATA | Flags.SPARSE,
            virtual_size=virtual_size,
            uuid=uuid or str(uuid_module.uuid4()),
            parent_uuid=parent_uuid or "",
            user_tag=encode_user_tag(user_tag),
        ).to_bytes()
        file = LayerFile(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            file.lock()
            file.write_at(0, head)
            file.resize(HEADER_SPACE + virtual_size)
            _check_holes(file, virtual_size)
            if index_path is not None:
                LayerFile(index_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL).close()
        except BaseException:
            file.close()
            os.unlink(path)
            raise
        return cls(file, Header.from_bytes(head), SegmentMap(join=True))

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False) -> Self:
        """Open a layer file, for writing unless ``read_only``.

        Raises SourceError if the file cannot be opened or is locked by another opener, FormatError if it is not a
        sparse writable layer, is cut short, or was sealed in place since.
        """
        file = LayerFile(path, os.O_RDONLY if read_only else os.O_RDWR)
        try:
            file.lock(shared=read_only)
            header = file.read_header(Flags.DATA | Flags.SPARSE)
            _check_size(file, header, read_only=read_only)
            held = SegmentMap(join=True)
            for begin, end in file.data_extents(HEADER_SPACE, HEADER_SPACE + header.virtual_size):
                held.insert(begin // SECTOR - _HEADER_SECTORS, -(-end // SECTOR) - _HEADER_SECTORS, begin // SECTOR)
        except BaseException:
            file.close()
            raise
        return cls(file, header, held, State.READ_ONLY if read_only else State.WRITABLE)

    def read_held(self, offset: int, length: int) -> list[tuple[int, bytes | None]]:
        end = offset + length
        if offset < 0 or length < 0 or end > self.header.virtual_size:
            self._check_range(offset, length)
        with self._lock:
            runs = self._map.lookup(offset // SECTOR, (end + SECTOR - 1) // SECTOR)
        if len(runs) == 1:
            return [(length, self._file.read_at(HEADER_SPACE + offset, length) if runs[0][2] >= 0 else None)]
        pieces: list[tuple[int, bytes | None]] = []
        for begin, count, source, _ in runs:
            start, stop = max(begin * SECTOR, offset), min((begin + count) * SECTOR, end)
            size = stop - start
            pieces.append((size, self._file.read_at(HEADER_SPACE + start, size) if source >= 0 else None))
        return pieces

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        self._check_range(offset, length)
        return self._file.read_at(HEADER_SPACE + offset, length)

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        view = memoryview(data).cast("B")
        self._check_writable()
        self._make_room(offset, len(view))
        written = 0
        try:
            while written < len(view):
                written += self._file.write_some(HEADER_SPACE + offset + written, view[written:])
        finally:
            # Also if the disk filled up midway: the map must match the file.
            if written:
                begin, end = offset // SECTOR, -(-(offset + written) // SECTOR)
                with self._lock:
                    self._map.insert(begin, end, begin + _HEADER_SECTORS)

    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        """Make the range read as zeros and free its space; the layer no longer holds its whole sectors."""
        self._check_writable()
        self._check_range(offset, length)
        if not length:
            return
        self._file.punch_hole(HEADER_SPACE + offset, length)
        with self._lock:
            self._map.remove(-(-offset // SECTOR), (offset + length) // SECTOR)

    def flush(self) -> None:
        self._file.sync()

    def set_virtual_size(self, virtual_size: int) -> None:
        # The file is extended first, and stored so, that a crash in between leaves a layer that opens.
        self._check_writable()
        self._check_growth(virtual_size)
        self._file.resize(HEADER_SPACE + virtual_size)
        if not self.virtual_size:
            _check_holes(self._file, virtual_size)
        self._file.sync()
        header = replace(self.header, virtual_size=virtual_size)
        self._file.write_at(0, header.to_bytes())
        self.header = header

    def seal_file(self, *, marked: bool = False) -> None:
        self._check_writable()
        self._state.become(State.SEALED)
        try:
            with self._lock:
                records = sealed_records(self._map, self.name)
            append_seal(self._file, self.header, records, HEADER_SPACE + self.virtual_size, marked=marked)
            self._file.lock(shared=True)
        except BaseException:
            self._state.become(State.WRITABLE)
            raise

    def unseal(self) -> None:
        self._undo_seal()

    def retire(self) -> None:
        self._state.become(State.RETIRED)  # there is only the data file

    def close(self) -> None:
        self._state.become(State.CLOSED)
        self._file.close()


def _check_size(file: LayerFile, header: Header, *, read_only: bool) -> None:
    if header.virtual_size % SECTOR:
        raise FormatError(
            "virtual size is no whole number of sectors", blob=file.name, offset=48, got=header.virtual_size
        )
    wanted = HEADER_SPACE + header.virtual_size
    if not read_only and file.size == wanted:
        SwitchMark(file.name).remove()  # of a restack interrupted before the seal
    elif file.size > wanted and not read_only:
        recover_seal(file, header)
        # The excess is left by an interrupted resize or seal; a later growth must not expose it.
        file.resize(wanted)
    if file.size < wanted:
        raise FormatError("sparse layer is cut short", blob=file.name, got=f"{file.size} bytes", wanted=wanted)


def _check_holes(file: LayerFile, virtual_size: int) -> None:
    # If all of an empty layer were data after a reopening, it would hide every lower layer.
    for begin, end in file.data_extents(HEADER_SPACE, HEADER_SPACE + virtual_size):
        raise SourceError(
            f"file system cannot keep a sparse layer: it takes the hole [{begin}, {end}) for data", blob=file.name
        )
