"""The files of an image, read in user space from any known file system, without mount or privileges."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Protocol

from obdlab.errors import FormatError, ObdlabError
from obdlab.system.superblock import SUPERBLOCK_END, kind_of
from obdlab.volumes.erofs import volume as erofs
from obdlab.volumes.ext4 import volume as ext4

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.blob import Blob

_MAX_LINKS = 40
_MAX_TARGET = 4096
_PIECE = 1 << 20
_NOT_NAMES = (b"", b".", b"..")


class NoSuchFileError(ObdlabError, code="no-such-file"):
    """An image has no file of that name, or the path goes through a file that is not a directory."""


class FileInode(Protocol):
    """The inode of one file. Times in nanoseconds since 1970."""

    @property
    def mode(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def links(self) -> int: ...
    @property
    def rdev(self) -> tuple[int, int]: ...
    @property
    def is_directory(self) -> bool: ...


class _Volume(Protocol):
    def inode(self, number: int, /) -> FileInode: ...
    def entries(self, number: int, /) -> dict[bytes, tuple[int, int]]: ...
    def readlink(self, inode: FileInode, /) -> bytes: ...
    def xattrs(self, inode: FileInode, /) -> Sequence[tuple[bytes, bytes]]: ...
    def content(self, inode: FileInode, /) -> Iterator[bytes]: ...
    def places(self, inode: FileInode, /) -> Iterator[tuple[int, int, int]]: ...


def open_volume(disk: Blob) -> ext4.Volume | erofs.Volume:
    """Open the file system on a disk. Raises FormatError if it is unknown or damaged."""
    head = disk.read_at(0, min(disk.size, SUPERBLOCK_END)).ljust(SUPERBLOCK_END, b"\0")
    kind = kind_of(head)
    if kind == "ext4":
        return ext4.Volume(disk)
    if kind == "erofs":
        return erofs.Volume(disk)
    raise FormatError("no file system that can be read here", blob=disk.name, wanted="ext4 or erofs")


class FileTree:
    """The files on a disk, by number; names and paths are bytes.

    Raises FormatError, here and in every method, for a damaged or unknown file system, and the disk's own errors.
    """

    def __init__(self, disk: Blob, *, keep_names: int = 0) -> None:
        """Open the file system. Up to ``keep_names`` names of directories are kept, so that these are read once."""
        self.name = disk.name
        self.disk = disk
        self._keep_left = keep_names
        self._kept: dict[int, dict[bytes, tuple[int, int]]] = {}
        #: The opened volume, for features that only one kind of file system has.
        self.volume = volume = open_volume(disk)
        # Each volume's methods take only its own inodes, and get no others here.
        self._volume: _Volume = volume  # type: ignore[assignment]
        self.kind = "erofs" if isinstance(volume, erofs.Volume) else "ext4"
        self.root = volume.root

    def inode(self, number: int) -> FileInode:
        """Return the inode of a file."""
        return self._volume.inode(number)

    def entries(self, number: int) -> dict[bytes, int]:
        """Return a directory's files by name, in order of names."""
        found = self._entries(number)
        for name in found:
            if name in _NOT_NAMES or b"/" in name or b"\0" in name:
                raise FormatError("directory with an impossible name", blob=self.name, got=name[:80])
        return {name: found[name][0] for name in sorted(found)}

    def find(self, path: bytes, *, follow: bool = True) -> int:
        """Return the number of the file at ``path`` from the root, following links inside the image.

        Without ``follow`` the last part may be a link. Raises NoSuchFileError.
        """
        return self._line(path, follow=follow)[-1][0]

    def real_path(self, path: bytes) -> bytes:
        """Return the path of a file from "/" on, with links resolved. Raises NoSuchFileError."""
        return b"/" + b"/".join(name for _, name in self._line(path, follow=True)[1:])

    # Returns numbers and names from the root to the file.
    def _line(self, path: bytes, *, follow: bool) -> list[tuple[int, bytes]]:
        root = (self.root, b"")
        line = [root]
        pending = [part for part in path.split(b"/") if part not in (b"", b".")][::-1]
        links = 0
        while pending:
            part = pending.pop()
            if part == b"..":
                line = line[:-1] or line
                continue
            number = self._child(line[-1][0], part, path)
            inode = self.inode(number)
            if not stat.S_ISLNK(inode.mode) or not (pending or follow):
                line.append((number, part))
                continue
            links += 1
            target = self.readlink(number)
            if links > _MAX_LINKS or len(target) > _MAX_TARGET:
                raise NoSuchFileError(f"{_text(path)}: {os.strerror(errno.ELOOP)}")
            if target.startswith(b"/"):
                line = [root]
            pending += [each for each in target.split(b"/") if each not in (b"", b".")][::-1]
        return line

    def readlink(self, number: int) -> bytes:
        """Return a symbolic link's text."""
        return self._volume.readlink(self._volume.inode(number))

    def xattrs(self, number: int) -> Sequence[tuple[bytes, bytes]]:
        """Return the extended attributes."""
        return self._volume.xattrs(self._volume.inode(number))

    def content(self, number: int) -> Iterator[bytes]:
        """Yield all of a regular file's bytes in pieces of at most 1 MiB, holes as zeros."""
        return self._volume.content(self._volume.inode(number))

    def data(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of a regular file in pieces of at most 1 MiB, holes left out, however large."""
        inode = self._volume.inode(number)
        for at, length, place in self._volume.places(inode):
            end = min(at + length, inode.size)
            for offset in range(at, end, _PIECE):
                yield offset, self.disk.read_at(place + offset - at, min(_PIECE, end - offset))

    def _entries(self, number: int) -> dict[bytes, tuple[int, int]]:
        found = self._kept.get(number)
        if found is None:
            found = self._volume.entries(number)
            if len(found) < self._keep_left:
                self._keep_left -= len(found) + 1
                self._kept[number] = found
        return found

    def _child(self, directory: int, name: bytes, path: bytes) -> int:
        if not self.inode(directory).is_directory:
            raise NoSuchFileError(f"{_text(path)}: {os.strerror(errno.ENOTDIR)} (in the image)")
        found = self._entries(directory).get(name)
        if found is None:
            raise NoSuchFileError(f"{_text(path)}: {os.strerror(errno.ENOENT)} (in the image)")
        return found[0]


def _text(path: bytes) -> str:
    return path.decode(errors="backslashreplace")
