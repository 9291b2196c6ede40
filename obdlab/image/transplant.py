"""A trace of one image made one of another: a rebuilt image has the same files at other places.

What was read is followed from blocks to files by the old image's file system (ext4), and from files to blocks by the
new one's. On the way there the new file system is read as the kernel will read it: directories, inodes and extent
trees that its mount and the opening of these files need are part of the new trace for that reason.
"""

from __future__ import annotations

import stat
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.blob import Blob
from obdlab.ext4.layout import InodeFlag
from obdlab.ext4.volume import Volume
from obdlab.formats.lsmt.layout import SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from obdlab.ext4.layout import Extent, Inode
    from obdlab.layers.ordering import SectorRange


@dataclass(frozen=True, slots=True)
class Transplanted:
    """``sectors`` of the new disk in the order of use; how many bytes of files were found there, and how many not.

    ``missing`` has the paths of files that the new image does not have; bytes of the file system itself are in
    neither number.
    """

    sectors: list[SectorRange]
    kept: int
    lost: int
    missing: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Used:
    """Bytes read of each file and its size, in the order of first use; and bytes that are no file's."""

    files: dict[bytes, tuple[int, int]]
    elsewhere: int


def files_of(sectors: Iterable[SectorRange], disk: Blob) -> Used:
    """Return which files the sectors of a disk with an ext4 belong to. Raises as :func:`transplant`."""
    volume = Volume(disk)
    sizes: dict[bytes, int] = {}
    files: dict[bytes, int] = {}
    elsewhere = 0
    for _, length, path in _Places(volume, sizes).pieces(sectors):
        if path is None:
            elsewhere += length
        else:
            files[path] = files.get(path, 0) + length
    return Used({path: (size, sizes[path]) for path, size in files.items()}, elsewhere)


def pieces_of(sectors: Iterable[SectorRange], disk: Blob) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (offset, length, path) of what was read of the disk, None for what is no file's."""
    return _Places(Volume(disk)).pieces(sectors)


def transplant(sectors: Iterable[SectorRange], old: Blob, new: Blob) -> Transplanted:
    """Return what corresponds on ``new`` to the ``sectors`` of ``old``, both disks with an ext4.

    Raises FormatError for a disk with another or a damaged file system, and what reading the disks raises.
    """
    places = _Places(Volume(old))
    target = _Target(new)
    kept = lost = 0
    missing: dict[bytes, None] = {}
    for begin, end in sectors:
        for path, first, count in places.files_in(begin * SECTOR, end * SECTOR):
            size = count * places.block_size
            if path in missing or not target.open(path):
                missing[path] = None
                lost += size
                continue
            found = target.read(path, first * places.block_size, size)
            kept += found
            lost += size - found
    return Transplanted(target.sectors, kept, lost, tuple(missing))


class _Places:
    # Which file each block of a disk belongs to. Blocks of directories count as all of the directory.
    def __init__(self, volume: Volume, sizes: dict[bytes, int] | None = None) -> None:
        self.block_size = volume.block_size
        rows: list[tuple[int, int, int, bytes]] = []
        for path, _, inode in volume.walk():
            if inode.is_directory or stat.S_ISREG(inode.mode):
                if sizes is not None:
                    sizes[path] = inode.size
                rows += ((e.physical, e.length, e.logical, path) for e in _data_of(volume, inode))
        rows.sort(key=lambda row: row[0])
        self._rows = rows
        self._starts = [row[0] for row in rows]

    def files_in(self, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield (path, first block of the file, how many) of what the bytes ``[begin, end)`` of the disk hold."""
        block, stop = begin // self.block_size, -(-end // self.block_size)
        number = max(0, bisect_right(self._starts, block) - 1)
        while number < len(self._rows) and self._rows[number][0] < stop:
            physical, length, logical, path = self._rows[number]
            first, last = max(block, physical), min(stop, physical + length)
            if first < last:
                yield path, logical + first - physical, last - first
            number += 1

    def pieces(self, sectors: Iterable[SectorRange]) -> Iterator[tuple[int, int, bytes | None]]:
        """Yield (offset, length, path or None) of ranges of the disk."""
        for begin, end in sectors:
            at, stop = begin * SECTOR, end * SECTOR
            while at < stop:
                number = bisect_right(self._starts, at // self.block_size) - 1
                path, until = None, stop
                if number >= 0:
                    physical, length, _, found = self._rows[number]
                    if at < (physical + length) * self.block_size:
                        path, until = found, (physical + length) * self.block_size
                if path is None and number + 1 < len(self._starts):
                    until = self._starts[number + 1] * self.block_size
                until = min(until, stop)
                yield at, until - at, path
                at = until


class _Target:
    # Where the new disk has it. `sectors` grows by what is read of the disk.
    def __init__(self, disk: Blob) -> None:
        self.sectors: list[SectorRange] = []
        self._volume = Volume(_Noted(disk, self.sectors))
        self._files: dict[bytes, list[Extent] | None] = {}

    def open(self, path: bytes) -> bool:
        if path not in self._files:
            number = self._volume.lookup(path)
            if number is None:
                self._files[path] = None
            else:
                inode = self._volume.inode(number)
                if inode.is_directory:
                    self._volume.entries(number)
                self._files[path] = _data_of(self._volume, inode)
        return self._files[path] is not None

    def read(self, path: bytes, offset: int, length: int) -> int:
        size = self._volume.block_size
        first, stop = offset // size, -(-(offset + length) // size)
        blocks = 0
        for extent in self._files[path] or ():
            begin, end = max(first, extent.logical), min(stop, extent.logical + extent.length)
            if begin < end:
                blocks += end - begin
                at = (extent.physical + begin - extent.logical) * size
                _note(self.sectors, at, at + (end - begin) * size)
        return min(length, blocks * size)


class _Noted(Blob):
    # A disk whose reads are noted.
    def __init__(self, disk: Blob, sectors: list[SectorRange]) -> None:
        self.name = disk.name
        self._disk = disk
        self._sectors = sectors

    @property
    def size(self) -> int:
        return self._disk.size

    def read_at(self, offset: int, length: int) -> bytes:
        _note(self._sectors, offset, offset + length)
        return self._disk.read_at(offset, length)


def _data_of(volume: Volume, inode: Inode) -> list[Extent]:
    if inode.flags & InodeFlag.INLINE_DATA:
        return []
    return [extent for extent in volume.extents(inode) if not extent.unwritten]


def _note(sectors: list[SectorRange], begin: int, end: int) -> None:
    first, stop = begin // SECTOR, -(-end // SECTOR)
    if sectors and sectors[-1][1] == first:
        sectors[-1] = (sectors[-1][0], stop)
    elif first < stop:
        sectors.append((first, stop))
