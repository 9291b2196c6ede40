"""Files of a directory tree that is not trusted: a build context, or the mounted root of an image.

Names are looked up as a process would whose root the directory is (openat2(2) with RESOLVE_IN_ROOT): a link of the
image to /etc leads to the image's own /etc. New files are made by a single name in a directory that was opened so.
All names are bytes.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.closing import Closing
from obdlab.system import abi

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
#: For a name that may be another file's by now: neither waits for a pipe nor follows a link.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Ownership:
    """User and group of new files, by number."""

    uid: int = 0
    gid: int = 0


class Inside(Closing):
    """The tree below a directory. Raises OSError, also if the directory cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, _DIRECTORY | os.O_CLOEXEC)

    @property
    def descriptor(self) -> int:
        """The descriptor of the directory."""
        return self._fd

    def close(self) -> None:
        """Close the directory."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def status(self, path: bytes, *, follow: bool = True) -> os.stat_result | None:
        """Return the status of a path; None if it is missing. A link is followed inside the tree, if ``follow``."""
        flags = os.O_PATH | (0 if follow else os.O_NOFOLLOW)
        try:
            descriptor = abi.open_in_root(self._fd, path, flags)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise
        try:
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def directory(self, path: bytes) -> Iterator[int]:
        """Open a directory for the block, following links inside the tree."""
        descriptor = abi.open_in_root(self._fd, path, _DIRECTORY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """Open the directory of a path for the block; give it with the path's last name, which is not followed."""
        head, name = os.path.split(os.path.normpath(b"/" + path))
        with self.directory(head) as directory:
            yield directory, name

    def make_directories(self, path: bytes, owner: Ownership, mode: int = 0o755) -> None:
        """Make a directory and its missing parents. Raises OSError if one of the names is something else."""
        at = b"/"
        for name in os.path.normpath(b"/" + path).split(b"/"):
            if not name:
                continue
            child = os.path.join(at, name)
            found = self.status(child)
            if found is None:
                with self.directory(at) as parent:
                    make_directory(parent, name, owner, mode)
            elif not stat.S_ISDIR(found.st_mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), child)
            at = child

    def read_small(self, path: bytes, most: int) -> bytes:
        """Return the content of a regular file of at most ``most`` bytes; b"" if there is no such file."""
        try:
            descriptor = abi.open_in_root(self._fd, path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return b""
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            return file.read(most) if stat.S_ISREG(found.st_mode) and found.st_size <= most else b""


def make_directory(parent: int, name: bytes, owner: Ownership, mode: int) -> None:
    """Make a directory of just this mode and owner. Raises OSError, also if the name exists."""
    os.mkdir(name, 0o700, dir_fd=parent)
    descriptor = os.open(name, _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.fchown(descriptor, owner.uid, owner.gid)
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def remove_file(parent: int, name: bytes) -> None:
    """Remove a file or link, if there is one. Raises OSError (EISDIR) for a directory."""
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    os.unlink(name, dir_fd=parent)


def open_regular(parent: int, name: bytes) -> int:
    """Open a regular file for reading. Raises OSError, also if the name is something else by now."""
    descriptor = os.open(name, _READ, dir_fd=parent)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file any more", name)
    return descriptor


def pieces(descriptor: int) -> Iterator[bytes]:
    """Yield the rest of an open file in pieces of at most 1 MiB."""
    while piece := os.read(descriptor, _PIECE):
        yield piece
