"""The tree to which layers are applied: the interface for :mod:`obdlab.convert.apply`, and ext4 in user space.

Paths are canonical bytes: absolute, no trailing slash, no links in them, the root being b"". Errors are OSError with
the kernel's numbers, so that a directory of the kernel can be a tree, too (the tests compare the two).
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from obdlab.convert.tar.reader import Content
from obdlab.formats.lsmt.layout import SECTOR
from obdlab.layers.targetdisk import TargetDisk
from obdlab.volumes.ext4.directory import DIRECTORY
from obdlab.volumes.ext4.editor import EXTENTS, Editor
from obdlab.volumes.ext4.layout import ROOT_INO, Inode, device_block

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from obdlab.blob import Buffer, WritableBlob
    from obdlab.layers.ordering import SectorRange

#: Name and value of an extended attribute, as programs see it.
Xattr = tuple[bytes, bytes]


# Not frozen: frozen ones take four times as long to make, and there is one for every file.
@dataclass(slots=True)
class Attributes:
    """Attributes of a file. Times in nanoseconds."""

    #: Permission bits with setuid, setgid and sticky.
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    xattrs: Sequence[Xattr] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """The file at a path: ``format`` is the type in st_mode's bits."""

    format: int
    attributes: Attributes

    @property
    def is_directory(self) -> bool:
        """True for a directory."""
        return self.format == stat.S_IFDIR

    @property
    def is_link(self) -> bool:
        """True for a symbolic link."""
        return self.format == stat.S_IFLNK


class Tree(Protocol):
    """The target of applying layers. Paths must exist, except for ``look`` and paths that are made."""

    def look(self, path: bytes) -> Seen | None:
        """Return the file at the path without its extended attributes; None if it is missing."""

    def xattrs(self, path: bytes) -> list[Xattr]:
        """Return the extended attributes."""

    def readlink(self, path: bytes) -> bytes:
        """Return a symbolic link's text."""

    def names(self, path: bytes) -> list[bytes]:
        """Return the names in a directory."""

    def remove(self, path: bytes) -> None:
        """Remove the path, a directory with all its content."""

    def make_directory(self, path: bytes, attributes: Attributes) -> None:
        """Make a directory."""

    def make_file(
        self, path: bytes, attributes: Attributes, size: int, pieces: Iterable[tuple[int, Buffer]], *, sparse: bool
    ) -> None:
        """Make a file of ``size`` bytes from (offset, bytes); with ``sparse`` they may leave holes."""

    def make_link(self, path: bytes, attributes: Attributes, target: bytes) -> None:
        """Make a symbolic link."""

    def make_node(self, path: bytes, attributes: Attributes, kind: int, rdev: tuple[int, int]) -> None:
        """Make a device node (S_IFCHR, S_IFBLK) or a fifo (S_IFIFO)."""

    def make_hard_link(self, path: bytes, target: bytes) -> None:
        """Give the file at ``target`` one more name."""

    def set_attributes(self, path: bytes, attributes: Attributes, *, keep_xattrs: bool) -> None:
        """Set all attributes; with ``keep_xattrs`` extended ones that are not named stay."""

    def set_times(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        """Set only the times."""


def in_target(disk: WritableBlob, size: int, pieces: Iterable[tuple[int, Buffer]]) -> tuple[int, bytes] | None:
    """Return where the target of a disk has a file's content; None if the disk has no target, or that no such place.

    The result is the offset of the content in the target, and the bytes of the last sector if that cannot be mapped
    since the target has no zeros behind the file. The pieces have been read.
    """
    if not isinstance(disk, TargetDisk) or not isinstance(pieces, Content) or pieces.place is None:
        return None
    rest = size % SECTOR
    end = bytearray()
    for offset, piece in pieces:
        end += piece[max(0, size - rest - offset) :]
    return pieces.place, b"" if pieces.is_padded() else bytes(end)


class Ext4Tree:
    """An ext4 file system on a disk as a tree. :meth:`finish` writes the changes in memory.

    On a :class:`~obdlab.layers.targetdisk.TargetDisk` the contents of files stay in the target.
    """

    def __init__(self, disk: WritableBlob) -> None:
        self._disk = disk
        self._editor = Editor(disk)
        self._directories: dict[bytes, int] = {b"": ROOT_INO}

    def finish(self) -> list[SectorRange]:
        """Write all changes to the disk; return the sectors of the metadata. The tree cannot be used after that."""
        self._editor.finish()
        return self._editor.metadata()

    def look(self, path: bytes) -> Seen | None:
        number = self._find(path)
        if number is None:
            return None
        inode = self._editor.inode(number)
        attributes = Attributes(inode.mode & 0o7777, inode.uid, inode.gid, inode.atime_ns, inode.mtime_ns)
        return Seen(stat.S_IFMT(inode.mode), attributes)

    def xattrs(self, path: bytes) -> list[Xattr]:
        return self._editor.xattrs(self._editor.inode(self._number(path)))

    def readlink(self, path: bytes) -> bytes:
        return self._editor.readlink(self._editor.inode(self._number(path)))

    def names(self, path: bytes) -> list[bytes]:
        return list(self._editor.entries(self._number(path)))

    def remove(self, path: bytes) -> None:
        parent, name = self._place(path)
        pending = [path] if path in self._directories else []
        while pending:
            known = pending.pop()
            number = self._directories.pop(known)
            inner = [
                known + b"/" + name for name, (_, kind) in self._editor.entries(number).items() if kind == DIRECTORY
            ]
            pending += [one for one in inner if one in self._directories]
        self._editor.remove(parent, name)

    def make_directory(self, path: bytes, attributes: Attributes) -> None:
        inode = _inode(stat.S_IFDIR, attributes).changed(links=2)
        self._directories[path] = self._add(path, inode, attributes)

    def make_file(
        self, path: bytes, attributes: Attributes, size: int, pieces: Iterable[tuple[int, Buffer]], *, sparse: bool
    ) -> None:
        mapped = in_target(self._disk, size, pieces)
        if mapped is None:
            block, sectors = self._editor.write_content(size, pieces, sparse=sparse)
        else:
            block, sectors = self._editor.map_content(size, *mapped)
        mtime_ns = attributes.mtime_ns
        inode = Inode(
            stat.S_IFREG | attributes.mode, attributes.uid, attributes.gid, size, attributes.atime_ns, mtime_ns,
            mtime_ns, 1, sectors, EXTENTS, block,
        )  # fmt: skip
        self._add(path, inode, attributes)

    def make_link(self, path: bytes, attributes: Attributes, target: bytes) -> None:
        inode = self._editor.with_link(_inode(stat.S_IFLNK, attributes).changed(mode=stat.S_IFLNK | 0o777), target)
        self._add(path, inode, attributes)

    def make_node(self, path: bytes, attributes: Attributes, kind: int, rdev: tuple[int, int]) -> None:
        inode = _inode(kind, attributes)
        if kind != stat.S_IFIFO:
            inode = inode.changed(block=device_block(*rdev))
        self._add(path, inode, attributes)

    def make_hard_link(self, path: bytes, target: bytes) -> None:
        number = self._number(target)
        self._editor.link(*self._place(path), number)

    def set_attributes(self, path: bytes, attributes: Attributes, *, keep_xattrs: bool) -> None:
        number = self._number(path)
        inode = self._editor.inode(number)
        xattrs = dict(self._editor.xattrs(inode)) if keep_xattrs else {}
        xattrs.update(attributes.xattrs)
        kind = stat.S_IFMT(inode.mode)
        changed = inode.changed(
            mode=inode.mode if kind == stat.S_IFLNK else kind | attributes.mode,
            uid=attributes.uid,
            gid=attributes.gid,
            atime_ns=attributes.atime_ns,
            mtime_ns=attributes.mtime_ns,
            ctime_ns=attributes.mtime_ns,
        )
        if xattrs or inode.tail or inode.acl_block:
            changed = self._editor.with_xattrs(changed, list(xattrs.items()))
        self._editor.set_inode(number, changed)

    def set_times(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        number = self._number(path)
        inode = self._editor.inode(number)
        if (inode.atime_ns, inode.mtime_ns) != (atime_ns, mtime_ns):
            self._editor.set_inode(number, inode.changed(atime_ns=atime_ns, mtime_ns=mtime_ns, ctime_ns=mtime_ns))

    def _add(self, path: bytes, inode: Inode, attributes: Attributes) -> int:
        if attributes.xattrs:
            inode = self._editor.with_xattrs(inode, attributes.xattrs)
        return self._editor.add(*self._place(path), inode)

    def _place(self, path: bytes) -> tuple[int, bytes]:
        # Returns the parent's inode number, and the name in it.
        parent, _, name = path.rpartition(b"/")
        number = self._directories.get(parent)
        return self._number(parent) if number is None else number, name

    def _number(self, path: bytes) -> int:
        number = self._find(path)
        if number is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return number

    def _find(self, path: bytes) -> int | None:
        number = self._directories.get(path)
        if number is not None:
            return number
        parent, _, name = path.rpartition(b"/")
        above = self._directories.get(parent)
        if above is None:
            above = self._find(parent)
            if above is None or not self._editor.inode(above).is_directory:
                return None
            self._directories[parent] = above
        found = self._editor.entries(above).get(name)
        return None if found is None else found[0]


def _inode(kind: int, attributes: Attributes) -> Inode:
    return Inode(
        mode=kind | attributes.mode,
        uid=attributes.uid,
        gid=attributes.gid,
        atime_ns=attributes.atime_ns,
        ctime_ns=attributes.mtime_ns,
        mtime_ns=attributes.mtime_ns,
    )
