"""A tree in memory: the result of applying an image's layers, without a file system to write to.

Files are kept as their digests. :mod:`obdlab.convert.apply` writes to this tree and to ext4; comparing both checks
the file system, the layers and everything between. The rules of applying are the same on either side.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from obdlab.convert.compare.listing import MOST_HASHED, TreeEntry
from obdlab.convert.tree.target import Attributes, Seen
from obdlab.volumes.ext4 import xattr

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from obdlab.blob import Buffer
    from obdlab.convert.tree.target import Xattr

_ZEROS = bytes(1 << 20)
_USER, _ACL, _DEFAULT_ACL = 1, 2, 3


@dataclass(slots=True)
class _Node:
    format: int
    attributes: Attributes
    size: int = 0
    sha256: str = ""
    target: bytes = b""
    rdev: tuple[int, int] | None = None
    children: dict[bytes, _Node] | None = None

    @property
    def mode(self) -> int:
        return self.format | (0o777 if self.format == stat.S_IFLNK else self.attributes.mode)


class MemoryTree:
    """A :class:`obdlab.convert.tree.target.Tree` in memory. ``content=False`` does not hash files.

    Files that are too large to be hashed are refused with OSError (EFBIG).
    """

    def __init__(self, *, content: bool = True) -> None:
        self._content = content
        self._left = MOST_HASHED
        self._root = _Node(stat.S_IFDIR, Attributes(0o755, 0, 0, 0, 0), children={})

    def listing(self) -> dict[str, TreeEntry]:
        """Return the tree's listing, as :func:`obdlab.convert.compare.listing.list_tree` lists a mount."""
        found = dict(self._walk())
        groups: dict[int, list[str]] = {}
        for path, node in found.items():
            if node.children is None:
                groups.setdefault(id(node), []).append(path)
        first_of = {key: min(paths) for key, paths in groups.items() if len(paths) > 1}
        return {path: _entry(node, first_of.get(id(node), "")) for path, node in sorted(found.items())}

    def _walk(self) -> Iterator[tuple[str, _Node]]:
        pending = [(b"", self._root)]
        while pending:
            path, node = pending.pop()
            yield os.fsdecode(path[1:]) or ".", node
            pending += [(path + b"/" + name, child) for name, child in (node.children or {}).items()]

    def look(self, path: bytes) -> Seen | None:
        node = self._find(path)
        return (
            None if node is None else Seen(node.format, replace(node.attributes, mode=node.mode & 0o7777, xattrs=()))
        )

    def xattrs(self, path: bytes) -> list[Xattr]:
        return list(self._node(path).attributes.xattrs)

    def readlink(self, path: bytes) -> bytes:
        return self._node(path).target

    def names(self, path: bytes) -> list[bytes]:
        return list(self._children(path))

    def remove(self, path: bytes) -> None:
        parent, _, name = path.rpartition(b"/")
        del self._children(parent)[name]

    def make_directory(self, path: bytes, attributes: Attributes) -> None:
        self._add(path, _Node(stat.S_IFDIR, attributes, children={}))

    def make_file(
        self, path: bytes, attributes: Attributes, size: int, pieces: Iterable[tuple[int, Buffer]], *, sparse: bool
    ) -> None:
        sha256 = ""
        if self._content:
            sha256 = self._sha256(size, pieces)
        else:
            for _ in pieces:  # reading finds a tar that ends early
                pass
        self._add(path, _Node(stat.S_IFREG, attributes, size=size, sha256=sha256))

    def make_link(self, path: bytes, attributes: Attributes, target: bytes) -> None:
        self._add(path, _Node(stat.S_IFLNK, attributes, target=target))

    def make_node(self, path: bytes, attributes: Attributes, kind: int, rdev: tuple[int, int]) -> None:
        self._add(path, _Node(kind, attributes, rdev=None if kind == stat.S_IFIFO else rdev))

    def make_hard_link(self, path: bytes, target: bytes) -> None:
        parent, _, name = path.rpartition(b"/")
        self._children(parent)[name] = self._node(target)

    def set_attributes(self, path: bytes, attributes: Attributes, *, keep_xattrs: bool) -> None:
        node = self._node(path)
        kept = dict(node.attributes.xattrs) if keep_xattrs else {}
        kept.update(attributes.xattrs)
        node.attributes = replace(attributes, xattrs=kept_xattrs(node.format, attributes.mode, list(kept.items())))

    def set_times(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        node = self._node(path)
        node.attributes = replace(node.attributes, atime_ns=atime_ns, mtime_ns=mtime_ns)

    def _sha256(self, size: int, pieces: Iterable[tuple[int, Buffer]]) -> str:
        self._left -= size
        if self._left < 0:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        digest = hashlib.sha256()
        end = 0
        for offset, piece in pieces:
            _feed_zeros(digest, offset - end)
            digest.update(piece)
            end = offset + len(piece)
        _feed_zeros(digest, size - end)
        return digest.hexdigest()

    def _add(self, path: bytes, node: _Node) -> None:
        attributes = node.attributes
        if attributes.xattrs:
            node.attributes = replace(attributes, xattrs=kept_xattrs(node.format, attributes.mode, attributes.xattrs))
        parent, _, name = path.rpartition(b"/")
        self._children(parent)[name] = node

    def _children(self, path: bytes) -> dict[bytes, _Node]:
        children = self._node(path).children
        if children is None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return children

    def _node(self, path: bytes) -> _Node:
        node = self._find(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return node

    def _find(self, path: bytes) -> _Node | None:
        node: _Node | None = self._root
        for name in path.split(b"/")[1:]:
            if node is None or node.children is None:
                return None
            node = node.children.get(name)
        return node


def _entry(node: _Node, linked_to: str) -> TreeEntry:
    attributes = node.attributes
    return TreeEntry(
        mode=node.mode,
        uid=attributes.uid,
        gid=attributes.gid,
        size=node.size,
        mtime_ns=attributes.mtime_ns,
        rdev=node.rdev,
        target=os.fsdecode(node.target),
        sha256=node.sha256,
        xattrs=tuple(sorted((os.fsdecode(name), value) for name, value in attributes.xattrs)),
        linked_to=linked_to,
    )


def kept_xattrs(kind: int, mode: int, pairs: Sequence[Xattr]) -> tuple[Xattr, ...]:
    """Return the attributes that Linux file systems would keep, as programs then see them.

    Left out are names of other namespaces, and user attributes of files other than regular files and directories; the
    mode's bits win over those of an ACL. Raises OSError (EINVAL) for a malformed ACL.
    """
    kept = []
    for name, value in pairs:
        prefix = (xattr.split_name(name) or (0, b""))[0]
        if prefix == 0 or (prefix == _USER and kind not in (stat.S_IFREG, stat.S_IFDIR)):
            continue
        if prefix in (_ACL, _DEFAULT_ACL):
            if kind == stat.S_IFLNK or (prefix == _DEFAULT_ACL and kind != stat.S_IFDIR):
                continue
            packed = xattr.acl_to_disk(value, mode, default=prefix == _DEFAULT_ACL)
            if packed is None:
                continue
            value = xattr.acl_from_disk(packed)
        kept.append((name, value))
    return tuple(kept)


def _feed_zeros(digest: hashlib._Hash, length: int) -> None:
    while length > 0:
        digest.update(memoryview(_ZEROS)[: min(length, len(_ZEROS))])
        length -= len(_ZEROS)
