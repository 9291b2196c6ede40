"""The files of an image as a start meets them: looked for without a trace, read with one.

Looking for files costs a start nothing, so only :meth:`ImageFiles.add` and :meth:`ImageFiles.note` note ranges of the
disk. Both ways of reading have one bound: the image is hostile, and chooses its directories, links and scripts.
"""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING, Any

from obdlab.errors import FormatError
from obdlab.formats.lsmt.layout import SECTOR
from obdlab.volumes.detect import FileTree, NoSuchFileError
from obdlab.volumes.noting import PAGE, NotedDisk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.layers.stack import Stack

# Bounds on the work for one image. A start of a large Python application opens some 2,000 files.
MAX_FILES = 8192
_MAX_LOOKUPS = 1 << 18
_MAX_PATH = 4096
# A lookup counts once more for each so many bytes of its path and of the real one: both are kept, 128 MiB at most.
_PATH_PIECE = 256
# Noted ranges: some 150 MB. A file may have an extent for each of its blocks.
_MAX_RANGES = 1 << 20
#: Bytes read of one disk.
MAX_READ = 2 << 30
#: Bytes alone do not bound the time of a hostile image.
MAX_S = 120.0
# Names of directories that are kept: some 50 MB.
_MAX_NAMES = 1 << 18
# ext4 reads so many blocks of its inode tables at once (mount option inode_readahead_blks), aligned.
_INODE_BLOCKS = 32


class ImageFiles:
    """Files by real path; ``ranges`` are the bytes ``[begin, end)`` of the disk that were noted, in order.

    Every method raises FormatError for a damaged file system and for more work than a start is worth.
    """

    def __init__(self, disk: Stack) -> None:
        self.ranges: list[tuple[int, int]] = []
        self._name = disk.name
        self._size = disk.size
        # Bytes that the kernel reads around an inode: 0 unless an inode is being opened.
        self._ahead = 0
        self._left = MAX_READ
        self._deadline = time.monotonic() + MAX_S
        self._seen: Any = FileTree(NotedDisk(disk, self._spend), keep_names=_MAX_NAMES)
        self._noted: Any = FileTree(NotedDisk(disk, self._note))
        self._walked: dict[bytes, bool] = {}
        self._lookups = 0
        self._found: dict[bytes, bytes | None] = {}
        self._inodes: dict[bytes, tuple[int, Any]] = {}

    def _spend(self, begin: int, end: int) -> None:
        self._left -= end - begin
        if self._left < 0:
            raise FormatError("start takes too many reads", blob=self._name, wanted=f"at most {MAX_READ} bytes")
        self._check_time()

    # Lookups of names that are kept read nothing, and take time all the same.
    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise FormatError("start takes too long to follow", blob=self._name, wanted=f"at most {MAX_S:g} s")

    def _note(self, begin: int, end: int) -> None:
        self._spend(begin, end)
        if self._ahead:
            begin = begin // self._ahead * self._ahead
            end = min(self._size, max(end, begin + self._ahead))
        self._add_range(begin, end)

    def _add_range(self, begin: int, end: int) -> None:
        if len(self.ranges) >= _MAX_RANGES:
            raise FormatError("start takes too many reads", blob=self._name, wanted=f"at most {_MAX_RANGES} ranges")
        self.ranges.append((begin, end))

    def _open_inode(self, number: int) -> None:
        self._ahead = _INODE_BLOCKS * self._noted.volume.block_size if self._noted.kind == "ext4" else 0
        self._noted.inode(number)
        self._ahead = 0

    def real(self, path: bytes) -> bytes | None:
        """Return the real path of a regular file; None if ``path`` names none, or too many were asked for."""
        self._check_time()
        if path in self._found:
            return self._found[path]
        if not self._may_look_up(path):
            return None
        found = self._found[path] = self._looked_up(path)
        return found

    # Returns False if too many paths were asked for, and for one that no file can have. No such path is kept.
    def _may_look_up(self, path: bytes) -> bool:
        return self._lookups < _MAX_LOOKUPS and len(path) <= _MAX_PATH and b"\0" not in path

    def _looked_up(self, path: bytes) -> bytes | None:
        self._lookups += 1 + len(path) // _PATH_PIECE
        try:
            found: bytes = self._seen.real_path(path)
            number = self._seen.find(found)
        except NoSuchFileError:
            return None
        inode = self._seen.inode(number)
        if not stat.S_ISREG(inode.mode):
            return None
        self._lookups += len(found) // _PATH_PIECE
        self._inodes[found] = number, inode
        return found

    def search(self, path: bytes) -> bytes | None:
        """Like :meth:`real`; of a path that is missing, note the directories that the kernel looks through for it."""
        found = self.real(path)
        if found is None and self._may_look_up(path):
            parts = os.path.normpath(path).split(b"/")
            for number in range(1, len(parts)):
                if not self.open_directory(b"/".join(parts[:number]) or b"/"):
                    break
        return found

    def names(self, directory: bytes) -> list[bytes]:
        """Return the names in a directory, sorted; [] if it is missing."""
        number = self._directory(directory)
        return [] if number is None else list(self._seen.entries(number))

    def size(self, path: bytes) -> int:
        """Return the size of a file that :meth:`real` returned."""
        return int(self._inodes[path][1].size)

    def read(self, path: bytes, offset: int, length: int) -> bytes:
        """Return bytes of such a file with holes as zeros; less at its end."""
        data = bytearray(max(0, min(length, self.size(path) - offset)))
        for first, last, place in self._pieces(path, offset, offset + len(data)):
            data[first - offset : last - offset] = self._seen.disk.read_at(place, last - first)
        return bytes(data)

    def open(self, path: bytes) -> None:
        """Note the reads that open a file by its real path: inodes and directories on the way."""
        parts = path.split(b"/")
        for number in range(1, len(parts)):
            self.open_directory(b"/".join(parts[:number]) or b"/")
        self._open_inode(self._inodes[path][0])

    def open_directory(self, path: bytes) -> bool:
        """Note the reads that look through a directory; return False if it is missing."""
        if path in self._walked:
            return self._walked[path]
        if not self._may_look_up(path):
            return False
        number = self._directory(path)
        self._walked[path] = number is not None
        if number is not None:
            self._open_inode(number)
            self._noted.entries(number)
        return number is not None

    def is_directory(self, path: bytes) -> bool:
        """Return True if the real path of a directory is given."""
        number = self._directory(path)
        return number is not None and self._seen.real_path(path) == path

    def _directory(self, path: bytes) -> int | None:
        self._check_time()
        if not self._may_look_up(path):
            return None
        self._lookups += 1 + len(path) // _PATH_PIECE
        try:
            number: int = self._seen.find(path)
        except NoSuchFileError:
            return None
        return number if self._seen.inode(number).is_directory else None

    def note(self, path: bytes, begin: int, end: int) -> None:
        """Note the bytes ``[begin, end)`` of a file."""
        begin, end = begin // PAGE * PAGE, -(-end // PAGE) * PAGE
        for first, last, place in self._pieces(path, begin, end):
            # The kernel reads whole pages, the last one of a file included.
            stop = place + last - first
            piece = PAGE if last == self.size(path) and not place % PAGE else SECTOR
            self._add_range(place // SECTOR * SECTOR, -(-stop // piece) * piece)

    def _pieces(self, path: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        for at, length, place in self._seen.volume.places(self._inodes[path][1]):
            first, last = max(begin, at), min(end, at + length)
            if first < last:
                yield first, last, place + first - at


def text_of(path: bytes) -> str:
    """Return a path for messages."""
    return os.fsdecode(path)
