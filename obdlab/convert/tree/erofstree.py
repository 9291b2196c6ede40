"""EROFS as a tree for applying layers."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from obdlab.convert.tree.memorytree import kept_xattrs
from obdlab.convert.tree.target import Attributes, Seen, in_target
from obdlab.volumes.erofs.editor import Directory, Editor, File

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from obdlab.blob import Buffer, WritableBlob
    from obdlab.convert.tree.target import Xattr
    from obdlab.layers.ordering import SectorRange
    from obdlab.volumes.erofs.volume import Inode


class ErofsTree:
    """An EROFS on a disk as a :class:`obdlab.convert.tree.target.Tree`. :meth:`finish` writes the changes in memory.

    EROFS stores no time of access: the time of modification stands for it. On a
    :class:`~obdlab.layers.targetdisk.TargetDisk` the contents of files stay in the target.
    """

    def __init__(self, disk: WritableBlob, *, fresh: bool) -> None:
        self._disk = disk
        self._editor = Editor(disk, fresh=fresh)
        self._directories: dict[bytes, Directory] = {b"": self._editor.root}

    def finish(self) -> list[SectorRange]:
        """Write all changes to the disk; return the sectors of the metadata. The tree cannot be used after that."""
        self._editor.finish()
        return self._editor.metadata()

    def look(self, path: bytes) -> Seen | None:
        node = self._find(path)
        if node is None:
            return None
        held = self._held(node)
        attributes = Attributes(held.mode & 0o7777, held.uid, held.gid, held.mtime_ns, held.mtime_ns)
        return Seen(stat.S_IFMT(held.mode), attributes)

    def xattrs(self, path: bytes) -> list[Xattr]:
        return self._editor.xattrs(self._node(path))

    def readlink(self, path: bytes) -> bytes:
        return self._editor.readlink(self._file(path))

    def names(self, path: bytes) -> list[bytes]:
        return list(self._editor.entries(self._directory(path)))

    def remove(self, path: bytes) -> None:
        parent, name = self._place(path)
        self._editor.remove(parent, name)
        # The cost depends on what is removed alone. No directory is known without the one above it.
        pending = [path]
        while pending:
            known = pending.pop()
            directory = self._directories.pop(known, None)
            entries = {} if directory is None else directory.entries or {}
            pending += [known + b"/" + inner for inner, node in entries.items() if isinstance(node, Directory)]

    def make_directory(self, path: bytes, attributes: Attributes) -> None:
        parent, name = self._place(path)
        values = _fields(stat.S_IFDIR, attributes.mode, attributes, attributes.xattrs)
        self._directories[path] = self._editor.add_directory(parent, name, **values)

    def make_file(
        self, path: bytes, attributes: Attributes, size: int, pieces: Iterable[tuple[int, Buffer]], *, sparse: bool
    ) -> None:
        mapped = in_target(self._disk, size, pieces)
        self._add(path, stat.S_IFREG, attributes, size=size, pieces=pieces, sparse=sparse, mapped=mapped)

    def make_link(self, path: bytes, attributes: Attributes, target: bytes) -> None:
        self._add(path, stat.S_IFLNK, attributes, target=target)

    def make_node(self, path: bytes, attributes: Attributes, kind: int, rdev: tuple[int, int]) -> None:
        self._add(path, kind, attributes, rdev=rdev)

    def make_hard_link(self, path: bytes, target: bytes) -> None:
        self._editor.link(*self._place(path), self._file(target))

    def set_attributes(self, path: bytes, attributes: Attributes, *, keep_xattrs: bool) -> None:
        node = self._node(path)
        xattrs = dict(self._editor.xattrs(node)) if keep_xattrs else {}
        xattrs.update(attributes.xattrs)
        old_mode = self._held(node).mode
        kind = stat.S_IFMT(old_mode)
        mode = old_mode & 0o7777 if kind == stat.S_IFLNK else attributes.mode
        self._change(path, node, _fields(kind, mode, attributes, list(xattrs.items())))

    def set_times(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        node = self._node(path)
        held = self._held(node)
        kept = {"mode": held.mode, "uid": held.uid, "gid": held.gid, "xattrs": self._editor.xattrs(node)}
        self._change(path, node, {**kept, "mtime_ns": mtime_ns})

    def _held(self, node: File | Directory) -> Directory | Inode:
        return node if isinstance(node, Directory) else self._editor.inode(node)

    def _change(self, path: bytes, node: File | Directory, values: dict[str, Any]) -> None:
        if isinstance(node, Directory):
            self._editor.set_directory(node, **values)
        else:
            self._editor.set_file(self._place(path)[0], node, **values)

    def _add(self, path: bytes, kind: int, attributes: Attributes, **content: Any) -> None:
        mode = 0o777 if kind == stat.S_IFLNK else attributes.mode
        parent, name = self._place(path)
        self._editor.add_file(parent, name, **_fields(kind, mode, attributes, attributes.xattrs), **content)

    def _place(self, path: bytes) -> tuple[Directory, bytes]:
        # Returns the parent, and the name in it.
        parent, _, name = path.rpartition(b"/")
        return self._directories.get(parent) or self._directory(parent), name

    def _node(self, path: bytes) -> File | Directory:
        node = self._find(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return node

    def _file(self, path: bytes) -> File:
        node = self._node(path)
        if isinstance(node, Directory):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return node

    def _directory(self, path: bytes) -> Directory:
        node = self._node(path)
        if not isinstance(node, Directory):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return node

    def _find(self, path: bytes) -> File | Directory | None:
        known = self._directories.get(path)
        if known is not None:
            return known
        parent, _, name = path.rpartition(b"/")
        above = self._directories.get(parent) or self._find(parent)
        if not isinstance(above, Directory):
            return None
        found = self._editor.entries(above).get(name)
        if isinstance(found, Directory):
            self._directories[path] = found
        return found


# The attributes of a file as the editor takes them.
def _fields(kind: int, mode: int, attributes: Attributes, xattrs: Sequence[Xattr]) -> dict[str, Any]:
    return {
        "mode": kind | mode,
        "uid": attributes.uid,
        "gid": attributes.gid,
        "mtime_ns": attributes.mtime_ns,
        "xattrs": kept_xattrs(kind, mode, xattrs) if xattrs else (),
    }
