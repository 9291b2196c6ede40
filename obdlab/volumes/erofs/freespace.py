"""The blocks of an EROFS that grows: new ones at the end, metadata packed and changed in memory until written."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, cast

from obdlab.blob import Blob
from obdlab.volumes.blockranges import sectors_of_blocks
from obdlab.volumes.erofs.pack import BLOCK, SLOT

if TYPE_CHECKING:
    from obdlab.blob import Buffer, WritableBlob
    from obdlab.call import Call
    from obdlab.layers.ordering import SectorRange
    from obdlab.layers.targetdisk import TargetDisk

# Metadata comes in runs of blocks, so that it lies together. The first run is small, as most layers are.
_FIRST_RUN, _LARGEST_RUN = 8, 256
# Number of partly filled blocks of metadata to choose from.
_OPEN = 8
# Changed blocks of metadata kept in memory: 16 MiB.
_MOST_CHANGED = 4096
_DATA_BUFFER = 1 << 20


class Space(Blob):
    """The disk as it will be, and the allocation of its blocks. ``end`` is the first free block.

    Reads see blocks that are not written yet. Raises OSError (ENOSPC) when the disk is full.
    """

    def __init__(self, disk: WritableBlob, end: int) -> None:
        self.name = disk.name
        self.end = end
        self._disk = disk
        self._blocks = min(disk.size // BLOCK, 0xFFFFFFFF)
        self._changed: dict[int, bytearray] = {}
        self._written: set[int] = set()
        #: Free bytes at the end of partly filled blocks, by block.
        self._open: dict[int, int] = {}
        self._run = range(0)
        self._run_size = _FIRST_RUN
        self._data = bytearray()
        self._data_at = 0

    @property
    def size(self) -> int:
        return self._disk.size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        if not length:
            return b""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if first == last:
            block = self._changed.get(first)
            if block is not None:
                return bytes(block[offset - first * BLOCK :][:length])
        elif not self._changed.keys().isdisjoint(range(first, last + 1)):
            self.flush()
        if self._data and offset < self._data_at + len(self._data) and offset + length > self._data_at:
            self._write_data()
        return self._disk.read_at(offset, length, call)

    def data_blocks(self, count: int) -> int:
        """Take ``count`` adjacent blocks and return the first."""
        if count > self._blocks - self.end:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        first = self.end
        self.end += count
        return first

    def metadata_blocks(self, count: int) -> int:
        """Take ``count`` adjacent blocks from the run of metadata, and return the first."""
        if count > len(self._run):
            size = max(count, self._run_size)
            first = self.data_blocks(size)
            self._run = range(first, first + size)
            self._run_size = min(2 * self._run_size, _LARGEST_RUN)
        first = self._run.start
        self._run = range(first + count, self._run.stop)
        return first

    def place(self, size: int) -> int:
        """Return the offset of ``size`` bytes for an inode and its appendix: in one block, if that holds them."""
        if size > BLOCK:
            return self.metadata_blocks(-(-size // BLOCK)) * BLOCK
        fitting = [(free, block) for block, free in self._open.items() if free >= size]
        if fitting:
            free, block = min(fitting)
        else:
            free, block = BLOCK, self.metadata_blocks(1)
            self._hold(block, bytearray(BLOCK))
        left = (free - size) // SLOT * SLOT
        self._open.pop(block, None)
        if left:
            self._open[block] = left
            if len(self._open) > _OPEN:
                del self._open[min(self._open, key=lambda known: (self._open[known], known))]
        return block * BLOCK + BLOCK - free

    def change(self, offset: int, data: Buffer) -> None:
        """Write metadata, for now in memory."""
        view = memoryview(data)
        while view:
            number, at = divmod(offset, BLOCK)
            block = self._changed.get(number)
            if block is None:
                block = self._hold(number, bytearray(self._disk.read_at(number * BLOCK, BLOCK)))
            count = min(len(view), BLOCK - at)
            block[at : at + count] = view[:count]
            view = view[count:]
            offset += count

    def _hold(self, number: int, block: bytearray) -> bytearray:
        # Keeps one more changed block in memory, within the bound.
        if len(self._changed) >= _MOST_CHANGED:
            self.flush()
        self._changed[number] = block
        return block

    def write(self, offset: int, data: Buffer) -> None:
        """Write a file's data. Data that continue the last write are written together with it."""
        if offset != self._data_at + len(self._data) or len(self._data) >= _DATA_BUFFER:
            self._write_data()
            self._data_at = offset
        self._data += data

    def map_at(self, offset: int, length: int, place: int) -> None:
        """Map whole sectors to the target's from ``place`` on. The disk must be a TargetDisk."""
        self._write_data()
        cast("TargetDisk", self._disk).map_at(offset, length, place)

    def discard(self, first: int, count: int) -> None:
        """Discard data blocks that were written here."""
        if count:
            self._write_data()
            self._disk.discard(first * BLOCK, count * BLOCK)

    def flush(self) -> None:
        """Write everything to the disk, adjacent blocks together."""
        self._write_data()
        run, at = bytearray(), 0
        for number, block in sorted(self._changed.items()):
            if run and (number * BLOCK != at + len(run) or len(run) >= _DATA_BUFFER):
                self._disk.write_at(at, run)
                run = bytearray()
            if not run:
                at = number * BLOCK
            run += block
        if run:
            self._disk.write_at(at, run)
        self._written |= self._changed.keys()
        self._changed = {number: self._changed[number] for number in self._open if number in self._changed}

    def metadata(self) -> list[SectorRange]:
        """Return the sectors of the metadata that was flushed, and of the superblock, in the order of the disk."""
        return sectors_of_blocks(self._written | {0}, BLOCK)

    def _write_data(self) -> None:
        if self._data:
            self._disk.write_at(self._data_at, self._data)
            self._data_at += len(self._data)
            self._data = bytearray()
