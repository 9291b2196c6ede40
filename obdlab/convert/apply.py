"""Applying an OCI layer to a tree, such that the tree then shows the files that containerd's overlayfs would show.

containerd unpacks a layer into an empty directory of its own (the overlay's upper) without looking at the layers
below, and the kernel merges. Here there is one tree, so the applier records the paths that the current layer has made
(its *upper*) and does the merge itself:

* Symbolic links in a member's path are followed only if this layer made them. One from a layer below is replaced by
  a directory, which takes over owner, mode and attributes of the directory it pointed to.
* A directory member over a directory from below keeps the children and nothing else: extended attributes are those of
  the member alone.
* A whiteout hides paths of the layers below and spares paths of this layer, wherever it comes in the tar. A directory
  that one layer both whites out and contains is merged with the one below, as overlayfs merges it.
* Missing parents are made with mode 0755; members that name the root itself are ignored.

A hard link to a file from a layer below, which containerd refuses, is made. A name that leaves the tree (``..``
beyond the root), which containerd bends back into it, is an error.

This module resolves links inside the tree. The tree is a file system in user space, so even a mistake here could not
reach a path outside.
Sources: OCI image layer specification, "Applying Changesets"; kernel documentation, "Overlay Filesystem".
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from obdlab.convert.tar.member import Kind, Member
from obdlab.convert.tar.reader import TarStream
from obdlab.convert.tree.target import Attributes
from obdlab.errors import FormatError, ObdlabError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import RawIOBase
    from typing import IO

    from obdlab.convert.tree.target import Seen, Tree

WHITEOUT_PREFIX = b".wh."
OPAQUE_MARK = b".wh..wh..opq"
# The number of links that containerd follows in one path.
_MAX_LINKS = 255
# The kernel's limit. Names in the tar, and links, could make paths of half a million components.
_MAX_PATH = 4095
_TRUSTED_XATTR = b"trusted."
_WHITEOUT_RDEV = (0, 0)
# The kernel's errors for requests that no file system can satisfy.
_MALFORMED = frozenset(
    (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EMLINK, errno.E2BIG, errno.EFBIG)
)
_NO_NAMES = (b"", b".", b"..")
# Approximate memory: the bound for all paths of a layer; a directory, and any other path, beside its length.
_MOST_HELD = 1 << 30
_DIRECTORY_OVERHEAD = 1024
_OVERHEAD = 512
_NODES = {Kind.CHARACTER: stat.S_IFCHR, Kind.BLOCK: stat.S_IFBLK, Kind.FIFO: stat.S_IFIFO}
# Attributes of a parent that has no member.
_IMPLICIT = Attributes(0o755, 0, 0, 0, 0)


class ApplyError(ObdlabError):
    """A well-formed layer cannot be written: the file system is full, or refuses a member."""


@dataclass(slots=True)
class ApplyStatistics:
    """Counts of one layer: members read, bytes of files written, paths removed for whiteouts."""

    members: int = 0
    file_bytes: int = 0
    whiteouts: int = 0


@dataclass(slots=True)
class _Times:
    atime_ns: int
    mtime_ns: int


@dataclass(slots=True)
class _Upper:
    # The paths that the layer has made so far, canonical (no links, no trailing slash; the root is b"").
    # Directories have the times to set at the end, since making their children changes them.
    directories: dict[bytes, _Times] = field(default_factory=dict)
    others: set[bytes] = field(default_factory=set)
    # The layer's directories that hide all of the directory below.
    opaque: set[bytes] = field(default_factory=set)

    def __contains__(self, path: bytes) -> bool:
        return path in self.directories or path in self.others


def apply_layer(tar: IO[bytes] | RawIOBase, blob: str, tree: Tree) -> ApplyStatistics:
    """Apply the uncompressed layer tar read from ``tar`` to ``tree``.

    ``blob`` is the layer's name for messages. Reads the stream to its very end.
    Raises FormatError for a malformed or escaping tar (with the offset in the uncompressed stream) and ApplyError if
    the tree refuses it; the tree is then half changed.
    """
    return _Applier(TarStream(tar, blob), blob, tree).run()


class _Applier:
    def __init__(self, stream: TarStream, blob: str, tree: Tree) -> None:
        self._stream = stream
        self._blob = blob
        self._tree = tree
        root = tree.look(b"")
        assert root is not None
        self._upper = _Upper({b"": _times(root.attributes)})
        self._whiteouts: dict[bytes, None] = {}
        # The last member's directory as written, and its resolved path: members of one directory mostly come
        # together.
        self._last_above: bytes | None = None
        self._last_parent = b""
        self._held = 0
        self.statistics = ApplyStatistics()

    def run(self) -> ApplyStatistics:
        for member in self._stream:
            self.statistics.members += 1
            try:
                self._apply(member)
            except OSError as error:
                raise self._refused(member, error) from error
        self._stream.drain()
        try:
            # Last, since implicit parents take their attributes from the directories below.
            for path in (*self._whiteouts, *self._upper.opaque):
                self._hide(path)
            self._set_directory_times()
        except OSError as error:
            raise ApplyError(f"{self._blob}: cannot finish the layer: {_reason(error)}") from error
        return self.statistics

    def _apply(self, member: Member) -> None:
        above, _, base = member.name.rpartition(b"/")
        if above != self._last_above or base in _NO_NAMES:
            components = self._components(member, member.name, "name")
            if not components:
                return
            self._last_above = None if base in _NO_NAMES else above
            base = components.pop()
            self._last_parent = self._resolve(components)
            self._enter(self._last_parent)
        parent = self._last_parent
        path = parent + b"/" + base
        if base.startswith(WHITEOUT_PREFIX):
            self._whiteout(member, parent, base)
        elif member.kind is Kind.CHARACTER and member.rdev == _WHITEOUT_RDEV:
            self._hold(path, _OVERHEAD)
            self._whiteouts[path] = None  # overlayfs' own form of a whiteout
        elif member.kind is Kind.DIRECTORY:
            self._directory(member, path)
        else:
            self._other(member, path)

    # Paths

    def _components(self, member: Member, name: bytes, what: str) -> list[bytes]:
        parts: list[bytes] = []
        for part in name.split(b"/"):
            if part in (b"", b"."):
                continue
            if part != b"..":
                parts.append(part)
            elif parts:
                parts.pop()
            else:
                raise self._malformed(member, f"{what} leads out of the layer's root", got=_show(name))
        return parts

    def _resolve(self, components: Sequence[bytes], *, below: bool = False) -> bytes:
        # Returns the path with this layer's symbolic links followed, inside the root; `below`: with all links
        # followed. The path need not exist yet.
        path = b""
        pending = list(reversed(components))
        links = 0
        while pending:
            part = pending.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                path = path.rpartition(b"/")[0]
                continue
            inner = path + b"/" + part
            if len(inner) > _MAX_PATH:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), inner[:100])
            if not ((below or inner in self._upper.others) and self._is_link(inner)):
                path = inner
                continue
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), inner)
            target = self._tree.readlink(inner)
            if target.startswith(b"/"):
                path = b""
            pending.extend(reversed(target.split(b"/")))
        return path

    def _is_link(self, path: bytes) -> bool:
        seen = self._tree.look(path)
        return seen is not None and seen.is_link

    def _enter(self, path: bytes) -> None:
        # Adds the directory and its parents to the upper, with the attributes they have below or as new ones.
        missing = []
        while path not in self._upper.directories:
            missing.append(path)
            path = path.rpartition(b"/")[0]
        for inner in reversed(missing):
            self._enter_one(inner)

    def _enter_one(self, path: bytes) -> None:
        if path in self._upper.others:
            raise NotADirectoryError(errno.ENOTDIR, "a parent is not a directory", path)
        if path in self._whiteouts:
            del self._whiteouts[path]
            self._hide(path)
        seen = self._tree.look(path)
        if seen is None:
            self._make_directory(path)
        elif seen.is_directory:
            self._hold(path, _DIRECTORY_OVERHEAD)
            self._upper.directories[path] = _times(seen.attributes)
        else:
            self._replace_by_directory(path, seen)

    def _make_directory(self, path: bytes, attributes: Attributes = _IMPLICIT) -> None:
        self._hold(path, _DIRECTORY_OVERHEAD)
        self._tree.make_directory(path, attributes)
        self._upper.directories[path] = _times(attributes)

    def _replace_by_directory(self, path: bytes, seen: Seen) -> None:
        template = self._directory_behind(path) if seen.is_link else None
        self._remove(path)
        self._make_directory(path, template or _IMPLICIT)

    def _directory_behind(self, link: bytes) -> Attributes | None:
        try:
            where = self._resolve(link.split(b"/"), below=True)
        except OSError:  # links in a circle
            return None
        seen = self._tree.look(where)
        if seen is None or not seen.is_directory:
            return None
        return replace(seen.attributes, xattrs=self._tree.xattrs(where))

    # Whiteouts

    def _whiteout(self, member: Member, parent: bytes, base: bytes) -> None:
        hidden = base.removeprefix(WHITEOUT_PREFIX)
        if base == OPAQUE_MARK:
            self._upper.opaque.add(parent)
        elif hidden in _NO_NAMES:
            raise self._malformed(member, "malformed whiteout", got=_show(member.name))
        else:
            self._hold(parent, _OVERHEAD)
            self._whiteouts[parent + b"/" + hidden] = None

    def _hide(self, path: bytes) -> None:
        # Removes the path, unless this layer made it.
        pending = [path]
        while pending:
            path = pending.pop()
            if path in self._upper.directories:
                pending += [path + b"/" + name for name in self._tree.names(path)]
            elif path not in self._upper.others and self._tree.look(path) is not None:
                self.statistics.whiteouts += 1
                self._tree.remove(path)

    # Members

    def _directory(self, member: Member, path: bytes) -> None:
        self._whiteouts.pop(path, None)
        self._hold(path, _DIRECTORY_OVERHEAD)
        attributes = _attributes(member)
        seen = self._tree.look(path)
        if seen is not None and not seen.is_directory:
            self._remove(path)
            seen = None
        if seen is None:
            self._tree.make_directory(path, attributes)
        else:
            self._tree.set_attributes(path, attributes, keep_xattrs=path in self._upper.directories)
        self._upper.directories[path] = _times(attributes)

    def _other(self, member: Member, path: bytes) -> None:
        self._hold(path, _OVERHEAD)
        target = self._link_target(member, path) if member.kind is Kind.HARDLINK else b""
        self._whiteouts.pop(path, None)
        if self._tree.look(path) is not None:
            self._remove(path)
        attributes = _attributes(member)
        match member.kind:
            case Kind.FILE:
                pieces = self._stream.data(member)
                self._tree.make_file(path, attributes, member.size, pieces, sparse=member.sparse)
                self.statistics.file_bytes += member.size
            case Kind.SYMLINK:
                self._tree.make_link(path, attributes, member.link)
            case Kind.HARDLINK:
                self._link(member, target, path)
                self._tree.set_attributes(path, attributes, keep_xattrs=True)
            case kind:
                self._tree.make_node(path, attributes, _NODES[kind], member.rdev)
        self._upper.others.add(path)

    def _remove(self, path: bytes) -> None:
        # Removes the path from the tree and from the upper. Only removed paths are visited: the cost of one removal
        # must not depend on the size of the rest of the layer.
        self._last_above = None
        pending = [path]
        while pending:
            inner = pending.pop()
            self._upper.others.discard(inner)
            if self._upper.directories.pop(inner, None) is not None:
                self._upper.opaque.discard(inner)
                pending += [inner + b"/" + name for name in self._tree.names(inner)]
        self._tree.remove(path)

    def _hold(self, path: bytes, overhead: int) -> None:
        # Every path of a layer is kept until its end.
        self._held += len(path) + overhead
        if self._held > _MOST_HELD:
            raise ApplyError(
                f"{self._blob}: too many names in one layer to hold in memory "
                f"({len(self._upper.others)} files, {len(self._upper.directories)} directories so far)"
            )

    def _link_target(self, member: Member, path: bytes) -> bytes:
        components = self._components(member, member.link, "hard link target")
        if not components:
            raise self._malformed(member, "hard link to the root", got=_show(member.link))
        base = components.pop()
        target = self._resolve(components) + b"/" + base
        if target not in self._upper:
            target = self._resolve(components, below=True) + b"/" + base
        if target == path:
            raise self._malformed(member, "hard link to itself", got=_show(member.link))
        return target

    def _link(self, member: Member, target: bytes, path: bytes) -> None:
        seen = self._tree.look(target)
        if seen is None or (target in self._whiteouts and target not in self._upper):
            raise self._malformed(member, "hard link to a file that does not exist", got=_show(member.link))
        if seen.is_directory:
            raise self._malformed(member, "hard link to a directory", got=_show(member.link))
        self._tree.make_hard_link(path, target)

    def _set_directory_times(self) -> None:
        for path, times in self._upper.directories.items():
            self._tree.set_times(path, times.atime_ns, times.mtime_ns)

    # Errors

    def _malformed(self, member: Member, what: str, *, got: str) -> FormatError:
        return FormatError(
            f"member {_show(member.name)}: {what}", blob=self._blob, offset=member.offset, got=got, wanted=None
        )

    def _refused(self, member: Member, error: OSError) -> ObdlabError:
        where = f"{member.kind.value} {_show(member.name)}"
        if error.errno in (
            errno.ENOTDIR,
            errno.ENAMETOOLONG,
            errno.ELOOP,
            errno.EINVAL,
            errno.EMLINK,
            errno.E2BIG,
            errno.EFBIG,
        ):
            return FormatError(f"cannot make {where}: {_reason(error)}", blob=self._blob, offset=member.offset)
        return ApplyError(f"{self._blob}: cannot make {where}: {_reason(error)}")


def _attributes(member: Member) -> Attributes:
    # A host's own attributes do not belong to an image: overlayfs' marks are among them, and containerd drops them
    # too.
    xattrs = tuple(pair for pair in member.xattrs if not pair[0].startswith(_TRUSTED_XATTR)) if member.xattrs else ()
    return Attributes(member.mode, member.uid, member.gid, member.atime_ns, member.mtime_ns, xattrs)


def _times(attributes: Attributes) -> _Times:
    return _Times(attributes.atime_ns, attributes.mtime_ns)


def _show(name: bytes) -> str:
    text = name.decode(errors="backslashreplace")
    return repr(text if len(text) <= 200 else f"{text[:100]}...{text[-90:]}")


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the image's file system is full (a larger virtual size helps) or the disk below it is"
    return error.strerror or str(error)
