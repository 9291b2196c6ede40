"""The file of each byte of a disk, for any known file system (ext4, EROFS)."""

from __future__ import annotations

import stat
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from obdlab.errors import FormatError
from obdlab.formats.lsmt.layout import SECTOR
from obdlab.volumes.detect import FileTree, NoSuchFileError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from obdlab.blob import Blob
    from obdlab.layers.ordering import SectorRange

    #: (offset in the file, length, offset on the disk) in bytes.
    Place = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Used:
    """Bytes read of each file and its size, in the order of first use; and bytes outside of files."""

    files: dict[bytes, tuple[int, int]]
    elsewhere: int


# Takes some 600 MB. The largest images have about a million files, nearly all in one piece.
_MAX_ROWS = 4 << 20


class FileVolume:
    """The file system on a disk, and the places of its files.

    Raises FormatError, here and in every method, for a damaged or unknown file system, and the disk's own errors.
    """

    def __init__(self, disk: Blob) -> None:
        self._tree = FileTree(disk)
        self._volume: Any = self._tree.volume
        self.block_size: int = self._volume.block_size

    def places_of(self, path: bytes) -> list[Place] | None:
        """Return the places of a file's or directory's data; None if the path is missing. Links are not followed.

        On the way it reads everything that the kernel reads to open the path.
        """
        number = self._volume.lookup(path)
        if number is None:
            return None
        inode = self._volume.inode(number)
        if inode.is_directory:
            self._volume.entries(number)
        return list(self._volume.places(inode))

    def real_path(self, path: bytes) -> bytes | None:
        """Return the path of a file from "/" on, with links resolved; None if the file is missing."""
        try:
            return self._tree.real_path(path)
        except NoSuchFileError:
            return None

    def walk(self) -> Iterator[tuple[bytes, bool, int, list[Place]]]:
        """Yield (path, is a directory, size, places) of every file and directory, the root (b"") first."""
        for path, _, inode in self._volume.walk():
            if inode.is_directory or stat.S_ISREG(inode.mode):
                yield path, inode.is_directory, inode.size, list(self._volume.places(inode))

    def paths(self) -> Iterator[tuple[bytes, bool]]:
        """Yield (path, is a directory) of every entry."""
        return ((path, inode.is_directory) for path, _, inode in self._volume.walk())


class FilePlaces:
    """The bytes of the disk that belong to files and directories, sorted by place."""

    def __init__(self, disk: Blob) -> None:
        volume = FileVolume(disk)
        #: In bytes, by path.
        self.sizes: dict[bytes, int] = {}
        self.block_size = volume.block_size
        rows: list[tuple[int, int, int, bytes]] = []
        for path, _, size, places in volume.walk():
            self.sizes[path] = size
            rows += ((place, length, at, path) for at, length, place in places)
            if len(rows) > _MAX_ROWS:
                raise FormatError("files in too many pieces", blob=disk.name, wanted=f"at most {_MAX_ROWS}")
        rows.sort(key=lambda row: row[0])
        self._rows = rows
        self._starts = [row[0] for row in rows]

    def files_in(self, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield (path, offset in the file, length) of the file data in the bytes ``[begin, end)`` of the disk."""
        number = max(0, bisect_right(self._starts, begin) - 1)
        while number < len(self._rows) and self._rows[number][0] < end:
            place, length, at, path = self._rows[number]
            first, last = max(begin, place), min(end, place + length)
            if first < last:
                yield path, at + first - place, last - first
            number += 1

    def links(self) -> dict[bytes, tuple[bytes, ...]]:
        """Return all paths, by each of them, of every file with data that has several (hard links)."""
        found: dict[int, list[bytes]] = {}
        for place, _, at, path in self._rows:
            if at == 0:
                found.setdefault(place, []).append(path)
        return {path: tuple(sorted(paths)) for paths in found.values() if len(paths) > 1 for path in paths}

    def pieces(self, sectors: Iterable[SectorRange]) -> Iterator[tuple[int, int, bytes | None]]:
        """Yield (offset, length, path) of ranges of the disk; the path is None for bytes outside of files.

        File data inside of a block of the file system (EROFS's inline data) counts as outside.
        """
        for begin, end in sectors:
            at, stop = begin * SECTOR, end * SECTOR
            while at < stop:
                until, path = self._next(at, stop)
                yield at, until - at, path
                at = until

    def _next(self, at: int, stop: int) -> tuple[int, bytes | None]:
        number = bisect_right(self._starts, at) - 1
        if number >= 0:
            place, length, _, path = self._rows[number]
            if not place % self.block_size and at < self._up(place + length):
                return min(stop, self._up(place + length)), path
        number += 1
        while number < len(self._rows) and self._rows[number][0] % self.block_size:
            number += 1
        return (min(stop, self._rows[number][0]) if number < len(self._rows) else stop), None

    # The rest of a file's last block belongs to the file.
    def _up(self, end: int) -> int:
        return -(-end // self.block_size) * self.block_size


def files_of(sectors: Iterable[SectorRange], disk: Blob) -> Used:
    """Return which files the sectors of a disk belong to. Raises as :class:`FileVolume`."""
    places = FilePlaces(disk)
    files: dict[bytes, int] = {}
    elsewhere = 0
    for _, length, path in places.pieces(sectors):
        if path is None:
            elsewhere += length
        else:
            files[path] = files.get(path, 0) + length
    return Used({path: (size, places.sizes[path]) for path, size in files.items()}, elsewhere)
