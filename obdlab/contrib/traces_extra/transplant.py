"""Turning a trace of one image into a trace of another: a rebuilt image has the same files at other places.

The old image's file system maps the read blocks to files, and the new one's maps files to blocks. On the way the new
file system is read as the kernel will read it, so the directories, inodes and extent trees that its mount and the
opening of these files need become part of the new trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from obdlab.formats.lsmt.layout import SECTOR
from obdlab.volumes.noting import PAGE, NotedDisk
from obdlab.volumes.places import FilePlaces, FileVolume

if TYPE_CHECKING:
    from collections.abc import Iterable

    from obdlab.blob import Blob
    from obdlab.layers.ordering import SectorRange
    from obdlab.volumes.places import Place


@dataclass(frozen=True, slots=True)
class Transplanted:
    """``sectors`` of the new disk in the order of use; bytes of files ``kept`` there, and ``lost``.

    ``missing`` has the paths of files that the new image does not have; bytes of the file system itself are in
    neither number.
    """

    sectors: list[SectorRange]
    kept: int
    lost: int
    missing: tuple[bytes, ...]


def transplant(sectors: Iterable[SectorRange], old: Blob, new: Blob) -> Transplanted:
    """Return the sectors of ``new`` that correspond to the ``sectors`` of ``old``; both have an ext4 or an EROFS.

    Raises FormatError for a disk with another or a damaged file system, and the errors of reading the disks.
    """
    places = FilePlaces(old)
    target = _Target(new)
    kept = lost = 0
    missing: dict[bytes, None] = {}
    for begin, end in sectors:
        for path, offset, size in places.files_in(begin * SECTOR, end * SECTOR):
            if path in missing or not target.open(path):
                missing[path] = None
                lost += size
                continue
            found = target.read(path, offset, size)
            kept += found
            lost += size - found
    return Transplanted(target.sectors, kept, lost, tuple(missing))


class _Target:
    # Places on the new disk. `sectors` grows by each read of the disk.
    def __init__(self, disk: Blob) -> None:
        self.sectors: list[SectorRange] = []
        self._volume = FileVolume(NotedDisk(disk, partial(_note, self.sectors)))
        self._files: dict[bytes, list[Place] | None] = {}

    def open(self, path: bytes) -> bool:
        if path not in self._files:
            self._files[path] = self._volume.places_of(path)
        return self._files[path] is not None

    # Reads whole blocks, as the kernel does.
    def read(self, path: bytes, offset: int, length: int) -> int:
        block = self._volume.block_size
        first, stop = offset // block * block, -(-(offset + length) // block) * block
        found = 0
        for at, size, place in self._files[path] or ():
            begin, end = max(first, at), min(stop, at + size)
            if begin < end:
                found += end - begin
                _note(self.sectors, place + begin - at, place + end - at)
        return min(length, found)


# Notes whole pages, as the kernel reads them.
def _note(sectors: list[SectorRange], begin: int, end: int) -> None:
    first, stop = begin // PAGE * PAGE // SECTOR, -(-end // PAGE) * PAGE // SECTOR
    if sectors and sectors[-1][1] == first:
        sectors[-1] = (sectors[-1][0], stop)
    elif first < stop:
        sectors.append((first, stop))
