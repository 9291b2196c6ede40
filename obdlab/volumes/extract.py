"""Copying files out of an image into a directory, without mounting it."""

from __future__ import annotations

import logging
import os
import stat
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.volumes.tree import Walk

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.volumes.detect import FileInode, FileTree

logger = logging.getLogger(__name__)

_SAME_FOR_ALL = 0o777
# Each level is a nested Python call.
_MAX_DEPTH = 400
# overlayfs' own marks never belong to an image.
_HIDDEN_XATTRS = b"trusted.overlay."


class ExtractError(ObdlabError, code="extract"):
    """A file cannot be written to its target."""


class Extractor:
    """Copies files and trees. ``archive`` keeps owners, special files, all mode bits and attributes, as root may.

    Otherwise files belong to the caller, and special files are skipped with a warning. Modification times and holes
    are kept in any case. ``advance`` gets the bytes as they are written.
    """

    def __init__(
        self, tree: FileTree, *, archive: bool = False, advance: Callable[[int], None] | None = None
    ) -> None:
        self._tree = tree
        self._archive = archive
        self._advance = advance or (lambda _: None)
        self._links: dict[int, bytes] = {}
        self._bounds = Walk(tree.name, _MAX_DEPTH)

    def copy(self, number: int, target: bytes) -> None:
        """Copy a file, or a directory with all its contents, to ``target``; an existing directory is filled.

        Existing files are not replaced. Raises ExtractError, FormatError, or the errors of the image's source.
        """
        try:
            self._copy(number, target, b"")
        except OSError as error:
            where = os.fsdecode(error.filename or target)
            raise ExtractError(f"{where}: cannot be written ({error.strerror})") from error

    # Every path below the target is made here, so no path leads through a link of the image.
    def _copy(self, number: int, target: bytes, path: bytes) -> None:
        inode = self._tree.inode(number)
        kind = stat.S_IFMT(inode.mode)
        first = self._links.get(number)
        if first is not None:
            os.link(first, target, follow_symlinks=False)
            return
        if kind == stat.S_IFDIR:
            self._bounds.enter(number, path)
            if not (os.path.isdir(target) and not os.path.islink(target)):
                os.mkdir(target, 0o700)
            entries = self._tree.entries(number)
            self._bounds.count(b"", entries)
            for name, child in entries.items():
                self._copy(child, os.path.join(target, name), path + b"/" + name)
        elif kind == stat.S_IFREG:
            self._write(number, inode, target)
        elif kind == stat.S_IFLNK:
            os.symlink(self._tree.readlink(number), target)
        elif not self._archive or kind not in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
            logger.warning("%s: a special file, left out", os.fsdecode(target))
            return
        else:
            os.mknod(target, kind | 0o600, os.makedev(*inode.rdev))
        if inode.links > 1 and kind != stat.S_IFDIR:
            self._links[number] = target
        self._finish(number, inode, target)

    def _write(self, number: int, inode: FileInode, target: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(target, flags, 0o600), "wb", buffering=0) as file:
            written = 0
            for offset, piece in self._tree.data(number):
                if piece.count(0) != len(piece):
                    view = memoryview(piece)
                    while view:
                        view = view[os.pwrite(file.fileno(), view, offset + len(piece) - len(view)) :]
                self._advance(offset + len(piece) - written)
                written = offset + len(piece)
            file.truncate(inode.size)
            self._advance(inode.size - written)

    def _finish(self, number: int, inode: FileInode, target: bytes) -> None:
        link = stat.S_ISLNK(inode.mode)
        if self._archive:
            os.chown(target, inode.uid, inode.gid, follow_symlinks=False)
        if not link:
            os.chmod(target, stat.S_IMODE(inode.mode) if self._archive else inode.mode & _SAME_FOR_ALL)
        if self._archive:
            for name, value in self._tree.xattrs(number):
                if not name.startswith(_HIDDEN_XATTRS):
                    os.setxattr(target, name, value, follow_symlinks=False)
        os.utime(target, ns=(inode.mtime_ns, inode.mtime_ns), follow_symlinks=False)
