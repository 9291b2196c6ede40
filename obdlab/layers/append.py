"""The writable layer in two files: data in the order of writing, and a log of records that place it (append mode)."""

from __future__ import annotations

import logging
import os
import threading
import uuid as uuid_module
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from obdlab.errors import FormatError, OutOfRangeError, SourceError
from obdlab.formats.lsmt.layout import (
    HEADER_SPACE,
    MAX_SEGMENT_SECTORS,
    RECORD_SIZE,
    SECTOR,
    Flags,
    Header,
    encode_record,
    encode_user_tag,
)
from obdlab.formats.lsmt.logreplay import replay
from obdlab.formats.lsmt.segmentmap import SegmentMap
from obdlab.layers.indexlog import Dropped, IndexLog, LogContent, discard_file, read_log
from obdlab.layers.layerfile import LayerFile
from obdlab.layers.readers import Readers
from obdlab.layers.seal import append_seal, recover_seal, sealed_records
from obdlab.layers.upperstate import TRANSITIONS, State
from obdlab.layers.writable import Upper, check_virtual_size
from obdlab.states import StateOf

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.blob import Buffer
    from obdlab.call import Call
    from obdlab.formats.lsmt.index import Run
    from obdlab.formats.lsmt.layout import Segments

logger = logging.getLogger(__name__)

# Each piece of a write gets one record; this is the original's largest I/O.
_PIECE = 4 << 20
# Most sectors freed with one call: writes to the file wait for it, half a second for 1.5 GiB.
_PUNCH_SECTORS = (32 << 20) // SECTOR
# Parts that a collection copies before it lets waiting writes in.
_COPIES_AT_ONCE = 64


class AppendUpper(Upper):
    """A writable layer whose writes go to the end of a data file, each with a record in an index file.

    Writes and discards must cover whole sectors. Data is never overwritten, so space is freed only by
    :func:`obdlab.layers.gc.collect`, which may be called at any time. :attr:`dropped` counts the parts that opening
    the layer after a crash left out. If the power fails, sectors written since the last flush may read as neither the
    old nor the new: the two files reach storage in any order until then (overlaybd LSMT layout).
    """

    block_size = SECTOR
    takes_partial_blocks = False
    discard_hides = True

    def __init__(
        self,
        file: LayerFile,
        log: IndexLog | None,
        header: Header,
        held: SegmentMap,
        state: State = State.WRITABLE,
    ) -> None:
        self.name = file.name
        self.header = header
        self.dropped = Dropped()
        #: Held by a collection, so that only one runs at a time.
        self.collecting = threading.Lock()
        self._file = file
        self._log = log  # None if opened for reading only, or while it is being opened
        self._map = held
        self._end = max(HEADER_SPACE, file.size // SECTOR * SECTOR)
        # Taken in this order. _syncing keeps flushes and seals apart, _writing guards state, files and log, _lock the
        # map and the count of reads that rely on its answer.
        self._syncing = threading.Lock()
        self._writing = threading.Lock()
        self._lock = threading.Lock()
        #: Ranges that :meth:`punch` need not free again: kept by a collection for the next one.
        self.punched: frozenset[tuple[int, int]] = frozenset()
        self._readers = Readers(self._lock)
        self._state = StateOf(self.name, state, TRANSITIONS)

    @classmethod
    def create(
        cls,
        data_path: str | os.PathLike[str],
        index_path: str | os.PathLike[str],
        virtual_size: int,
        *,
        uuid: str | None = None,
        parent_uuid: str | None = None,
        user_tag: str = "",
    ) -> Self:
        """Make the two files of an empty layer, with a random UUID if none is given. Neither may exist yet.

        A virtual size of 0 means that of the layers below; it is filled in when the layer is stacked. Raises
        SourceError if a file cannot be made, ValueError if a UUID, the tag or the size (a multiple of 512) does not
        fit.
        """
        check_virtual_size(virtual_size)
        header = Header(
            flags=Flags.HEADER | Flags.DATA,
            virtual_size=virtual_size,
            uuid=(uuid or str(uuid_module.uuid4())).upper(),
            parent_uuid=parent_uuid or "",
            user_tag=encode_user_tag(user_tag),
        )
        head = header.to_bytes()
        log_header = replace(header, flags=Flags.HEADER, index_offset=HEADER_SPACE)
        made: list[LayerFile] = []
        try:
            file = LayerFile(data_path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            made.append(file)
            log = LayerFile(index_path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            made.append(log)
            file.lock()
            file.write_at(0, head)
            log.write_at(0, log_header.to_bytes())
        except BaseException:
            for each in made:
                each.close()
                os.unlink(each.name)
            raise
        header = Header.from_bytes(head)
        return cls(file, IndexLog(log, log_header, HEADER_SPACE, 0), header, SegmentMap())

    @classmethod
    def open(
        cls, data_path: str | os.PathLike[str], index_path: str | os.PathLike[str], *, read_only: bool = False
    ) -> Self:
        """Open both files, for writing unless ``read_only``.

        A crash may leave records at the end of the log whose data is missing or short, and odd bytes at the ends of
        the files. They are cut off, a warning is logged, and :attr:`dropped` counts them. Raises SourceError if a
        file cannot be opened or is locked by another opener, FormatError if the files are not such a layer, the layer
        was sealed since, or a record in the middle of the log is malformed.
        """
        mode = os.O_RDONLY if read_only else os.O_RDWR
        file = LayerFile(data_path, mode)
        try:
            file.lock(shared=read_only)
            header = file.read_header(Flags.DATA)
            if header.virtual_size % SECTOR:
                raise FormatError(
                    "virtual size is no whole number of sectors", blob=file.name, offset=48, got=header.virtual_size
                )
            log_file = LayerFile(index_path, mode)
            try:
                content = read_log(log_file, file.size)
                if not read_only:
                    recover_seal(file, header, content.data_end)
                state = State.READ_ONLY if read_only else State.WRITABLE
                layer = cls(file, None, header, SegmentMap.of(replay(content.records.without_tags())), state)
                layer._take_log(log_file, content, read_only=read_only)
            except BaseException:
                log_file.close()
                raise
        except BaseException:
            file.close()
            raise
        return layer

    def _take_log(self, log_file: LayerFile, content: LogContent, *, read_only: bool) -> None:
        self.dropped = content.dropped
        if self.dropped:
            logger.warning(
                "%s: left out what a crash left: %d records without their data, %d odd bytes in %s, %d here",
                *(self.name, self.dropped.records, self.dropped.log_bytes, log_file.name, self.dropped.data_bytes),
            )
        if read_only:
            log_file.close()
            return
        if self.dropped:
            # Before the next append, whose data would make a dropped record valid again.
            log_file.resize(content.end)
            log_file.sync()
            self._file.resize(self._end)
        self._log = IndexLog(log_file, content.header, content.end, (content.end - HEADER_SPACE) // RECORD_SIZE)

    @property
    def log_records(self) -> int:
        """Records in the index file, overridden ones and fillers included."""
        return 0 if self._log is None else self._log.records

    def set_group_commit(self, records: int) -> None:
        """Write records in groups of ``records``, instead of one by one; 0 turns grouping off.

        A crash of this process loses an incomplete group, unless it was flushed.
        """
        with self._writing:
            self._writable_log().set_group_records(records)

    def read_held(self, offset: int, length: int) -> list[tuple[int, bytes | None]]:
        end = offset + length
        if offset < 0 or length < 0 or end > self.header.virtual_size:
            self._check_range(offset, length)
        with self._lock:
            runs = self._map.lookup(offset // SECTOR, (end + SECTOR - 1) // SECTOR)
            phase = self._readers.begin()
        try:
            return self._read_runs(runs, offset, end)
        finally:
            self._readers.end(phase)

    def _read_runs(self, runs: list[Run], offset: int, end: int) -> list[tuple[int, bytes | None]]:
        pieces: list[tuple[int, bytes | None]] = []
        i = 0
        while i < len(runs):
            begin, count, source, moffset = runs[i]
            i += 1
            while source >= 0 and i < len(runs) and runs[i][2] == source and runs[i][3] == moffset + count:
                count += runs[i][1]  # written one after the other: one read
                i += 1
            start, stop = max(begin * SECTOR, offset), min((begin + count) * SECTOR, end)
            if source >= 0:
                data: bytes | None = self._file.read_at((moffset - begin) * SECTOR + start, stop - start)
            elif source == ~0:
                data = bytes(stop - start)
            else:
                data = None
            pieces.append((stop - start, data))
        return pieces

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        view = memoryview(data).cast("B")
        self._check_sectors(offset, len(view))
        with self._writing:
            self._writable_log()
            if offset < 0 or offset + len(view) > self.virtual_size:
                self._make_room(offset, len(view))
            for at in range(0, len(view), _PIECE):
                self._append(offset + at, view[at : at + _PIECE])

    def _append(self, offset: int, view: memoryview) -> None:
        # Records are written in the order of their data, so a crash can only leave the last ones without data.
        begin, count, moffset = offset // SECTOR, len(view) // SECTOR, self._end // SECTOR
        self._file.write_at(self._end, view)
        self._writable_log().append(encode_record(begin, count, moffset))
        self._end += len(view)
        with self._lock:
            self._map.insert(begin, begin + count, moffset)

    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        self._check_sectors(offset, length)
        self._check_range(offset, length)
        with self._writing:
            log = self._writable_log()
            moffset = self._end // SECTOR
            end = (offset + length) // SECTOR
            for begin in range(offset // SECTOR, end, MAX_SEGMENT_SECTORS):
                stop = min(begin + MAX_SEGMENT_SECTORS, end)
                log.append(encode_record(begin, stop - begin, moffset, zeroed=True))
                with self._lock:
                    self._map.insert(begin, stop, moffset, zeroed=True)

    def flush(self) -> None:
        # Data first: a record on stable storage must not point at data that is not there.
        with self._syncing:
            with self._writing:
                if self.state in (State.READ_ONLY, State.RETIRED):  # nothing to flush
                    return
                # A seal may yet be undone: then the log counts, which sealing has written and not synced.
                log = self._log if self.state is State.SEALED and self._log is not None else self._writable_log()
                log.write_group()
            self._file.sync()
            log.sync()

    def set_virtual_size(self, virtual_size: int) -> None:
        with self._writing:
            self._grow(virtual_size)

    def _grow(self, virtual_size: int) -> None:
        log = self._writable_log()
        self._check_growth(virtual_size)
        header = replace(self.header, virtual_size=virtual_size)
        log.set_virtual_size(virtual_size)
        self._file.write_at(0, header.to_bytes())
        self.header = header

    def _make_room(self, offset: int, length: int) -> None:
        if offset < 0:
            self._check_range(offset, length)
        if length:
            self._grow(offset + length)

    def seal_file(self, *, marked: bool = False) -> None:
        with self._syncing, self._writing:
            log = self._writable_log()
            log.write_group()
            with self._lock:
                records = sealed_records(self._map, self.name)
            append_seal(self._file, self.header, records, self._end, marked=marked)
            self._state.become(State.SEALED)
            try:
                self._file.lock(shared=True)
            except BaseException:
                self._file.resize(self._end)
                self._state.become(State.WRITABLE)
                raise

    def unseal(self) -> None:
        with self._syncing, self._writing:
            self._undo_seal()

    def retire(self) -> None:
        with self._syncing, self._writing:
            self._state.become(State.RETIRED)
            self._close_log()

    def close(self) -> None:
        with self._syncing, self._writing:
            self._state.become(State.CLOSED)
            try:
                self._close_log()
            finally:
                self._file.close()

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()

    # The steps of a collection; obdlab.layers.gc calls them.

    def snapshot(self) -> tuple[Segments, int]:
        """Return the segments the layer holds now, and the end of its data in sectors."""
        with self._writing, self._lock:
            return self._map.to_segments(), self._end // SECTOR

    def relocate(self, parts: Sequence[tuple[int, int, int]]) -> int:
        """Append copies of data and map the sectors to them: parts are ``(begin, length, moffset)`` in sectors.

        Parts that are no longer mapped to their ``moffset`` are left out. Returns the number of sectors moved.
        """
        copies = []
        for at in range(0, len(parts), _COPIES_AT_ONCE):
            with self._writing:
                copies += [self._copy(*part) for part in parts[at : at + _COPIES_AT_ONCE]]
        # A write's data is not promised before a flush, but the old data was: the copies must be stored before a
        # record points at them. So must all data of earlier records, as a crash may leave only the last records
        # without data.
        self._file.write_out()
        self._file.sync()
        with self._writing:
            self._file.sync()
            return sum(self._point_to(*part, copy) for part, copy in zip(parts, copies, strict=True))

    def _copy(self, begin: int, length: int, moffset: int) -> int:
        self._writable_log()
        if not self._maps(begin, length, moffset):
            return 0
        at = self._end
        self._file.write_at(at, self._file.read_at(moffset * SECTOR, length * SECTOR))
        self._end += length * SECTOR
        return at // SECTOR

    def _point_to(self, begin: int, length: int, moffset: int, copy: int) -> int:
        if not copy or not self._maps(begin, length, moffset):
            return 0
        self._writable_log().append(encode_record(begin, length, copy))
        with self._lock:
            self._map.insert(begin, begin + length, copy)
        return length

    def _maps(self, begin: int, length: int, moffset: int) -> bool:
        runs = self.lookup(begin, begin + length)
        return all(source >= 0 and at - start == moffset - begin for start, _, source, at in runs)

    def wait_for_readers(self) -> None:
        """Return once every read that began before this call has ended. Raises SourceError after a minute."""
        if not self._readers.wait_for_earlier():
            raise SourceError("reads did not end in time", blob=self.name)

    def punch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Free these ranges of the data file, in sectors. No stored record may make data in them visible."""
        self._writable_log()
        for begin, end in ranges:
            for at in range(begin, end, _PUNCH_SECTORS):
                self._file.punch_hole(at * SECTOR, (min(end, at + _PUNCH_SECTORS) - at) * SECTOR)

    def compact_log(self) -> None:
        """Replace the index file by one with only the visible records. Writes wait only at its end."""
        with self._writing:
            log = self._writable_log()
            log.write_group()
            with self._lock:
                segments = self._map.to_segments()
            since = log.end
        file = log.begin_rewrite(segments)
        unfinished = file.name  # go_on_in renames it: the new index must stay
        with self._syncing, self._writing:
            try:
                self._writable_log()
                self._file.sync()  # first here, too: a stored record must not point at data that is not
                log.go_on_in(file, since)
            except BaseException:
                discard_file(file, unfinished)
                raise
            log.sync()

    def _writable_log(self) -> IndexLog:
        self._check_writable()
        assert self._log is not None, "a writable layer has its log"
        return self._log

    def _check_sectors(self, offset: int, length: int) -> None:
        if offset % SECTOR or length % SECTOR:
            raise OutOfRangeError(
                f"{self.name}: no whole sectors (got [{offset}, {offset + length}), wanted multiples of {SECTOR})"
            )
