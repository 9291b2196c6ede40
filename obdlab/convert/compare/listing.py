"""Listing a mounted tree, path by path, and the differences of two trees.

The measure of a conversion: the mounted overlaybd image must list as the original image does under overlayfs.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from obdlab.errors import FormatError, ObdlabError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

# Attributes that file systems use for themselves: overlayfs' own marks never belong to an image.
_HIDDEN_XATTRS = ("trusted.overlay.",)
_LOST_AND_FOUND = "lost+found"
#: Most bytes of all files of a tree that are hashed, holes included: a sparse file of some bytes may claim 2^60.
MOST_HASHED = 4 << 40


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """One path of a tree. Fields that do not apply to its type are empty, so that entries compare by field."""

    #: st_mode with its type bits.
    mode: int
    uid: int
    gid: int
    #: Bytes of a regular file; 0 for other types (the size of a directory depends on the file system).
    size: int
    mtime_ns: int
    #: (major, minor) of a device node.
    rdev: tuple[int, int] | None
    #: Text of a symbolic link.
    target: str
    #: Hex SHA-256 of a regular file's bytes, '' if not asked for.
    sha256: str
    xattrs: tuple[tuple[str, bytes], ...]
    #: First path (in order) of the path's hard link group; '' if no other path of the tree is the same file. st_nlink
    #: is useless here: overlayfs still counts names that an upper layer has removed.
    linked_to: str


class ReadableVolume(Protocol):
    """A file system read without a mount: a volume of ext4 or EROFS. The type of inodes is its own."""

    #: In error messages.
    name: str

    def walk(self) -> Iterator[tuple[bytes, int, Any]]:
        """Yield (path, inode number, inode) of everything."""

    def content(self, inode: Any) -> Iterator[bytes]:
        """Yield a file's bytes."""

    def readlink(self, inode: Any) -> bytes:
        """Return a symbolic link's text."""

    def xattrs(self, inode: Any) -> Sequence[tuple[bytes, bytes]]:
        """Return the extended attributes."""


def list_tree(root: str | os.PathLike[str], *, content: bool = True) -> dict[str, TreeEntry]:
    """List every path below ``root`` on its file system; ``root`` itself is ``"."``. Needs only the right to read.

    Names that are not UTF-8 have surrogate escapes. ``content=False`` skips reading files. Raises ObdlabError if the
    tree cannot be read or changes meanwhile.
    """
    top = os.fspath(root)
    try:
        found = dict(_walk(top))
        first_of = _link_groups(found)
        return {
            path: _entry(os.path.join(top, path), status, first_of.get((status.st_dev, status.st_ino), ""), content)
            for path, status in sorted(found.items())
        }
    except OSError as error:
        raise ObdlabError(f"{error.filename or top}: cannot list the tree ({error.strerror})") from error


def list_volume(volume: ReadableVolume, *, content: bool = True) -> dict[str, TreeEntry]:
    """List a file system without mounting it, as :func:`list_tree` would. Raises FormatError if it is damaged."""
    found = {os.fsdecode(path[1:]) or ".": (number, inode) for path, number, inode in volume.walk()}
    groups: dict[int, list[str]] = {}
    for path, (number, inode) in found.items():
        if not inode.is_directory and inode.links > 1:
            groups.setdefault(number, []).append(path)
    first_of = {number: min(paths) for number, paths in groups.items() if len(paths) > 1}
    sums = _content_sums(volume, found.values()) if content else {}
    return {
        path: _volume_entry(volume, inode, first_of.get(number, ""), sums.get(number, ""))
        for path, (number, inode) in sorted(found.items())
    }


def _content_sums(volume: ReadableVolume, inodes: Iterable[tuple[int, Any]]) -> dict[int, str]:
    # By inode number. In that order, which is about the order of the disk and of the layers' tars: a reader of a
    # compressed tar then decompresses each part once.
    sums = {}
    left = MOST_HASHED
    for number, inode in sorted(dict(inodes).items()):
        if stat.S_ISREG(inode.mode):
            left -= inode.size
            if left < 0:
                wanted = f"at most {MOST_HASHED} bytes of files"
                raise FormatError("files are too large to be compared", blob=volume.name, wanted=wanted)
            digest = hashlib.sha256()
            for piece in volume.content(inode):
                digest.update(piece)
            sums[number] = digest.hexdigest()
    return sums


def _volume_entry(volume: ReadableVolume, inode: Any, linked_to: str, sha256: str) -> TreeEntry:
    regular = stat.S_ISREG(inode.mode)
    xattrs = sorted((os.fsdecode(name), value) for name, value in volume.xattrs(inode))
    return TreeEntry(
        mode=inode.mode,
        uid=inode.uid,
        gid=inode.gid,
        size=inode.size if regular else 0,
        mtime_ns=inode.mtime_ns,
        rdev=inode.rdev if stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode) else None,
        target=os.fsdecode(volume.readlink(inode)) if stat.S_ISLNK(inode.mode) else "",
        sha256=sha256,
        xattrs=tuple((name, value) for name, value in xattrs if not name.startswith(_HIDDEN_XATTRS)),
        linked_to=linked_to,
    )


def differences(
    got: Mapping[str, TreeEntry],
    wanted: Mapping[str, TreeEntry],
    *,
    ignore: Collection[str] = (),
    ignore_at: Mapping[str, Collection[str]] | None = None,
) -> list[str]:
    """Return one line per path and field where ``got`` differs from ``wanted``; empty if the trees are equal.

    ``ignore`` names fields of :class:`TreeEntry` that are not compared, ``ignore_at`` those of single paths.
    """
    lines = [f"{path}: missing" for path in sorted(wanted.keys() - got.keys())]
    lines += [f"{path}: not wanted" for path in sorted(got.keys() - wanted.keys())]
    names = [field.name for field in fields(TreeEntry)]
    for path in sorted(got.keys() & wanted.keys()):
        if got[path] == wanted[path]:
            continue
        skipped = {*ignore, *(ignore_at or {}).get(path, ())}
        for name in names:
            mine, theirs = getattr(got[path], name), getattr(wanted[path], name)
            if name not in skipped and mine != theirs:
                lines.append(f"{path}: {name} differs (got {_text(name, mine)}, wanted {_text(name, theirs)})")
    return lines


def without_lost_and_found(
    listing: Mapping[str, TreeEntry], other: Mapping[str, TreeEntry]
) -> Mapping[str, TreeEntry]:
    """Return ``listing`` without the ``lost+found`` that mkfs makes in ext4, unless ``other`` has one too.

    Only one as mkfs makes it is left out: in the root, empty, owned by root, mode 0700, without extended attributes.
    """
    found = listing.get(_LOST_AND_FOUND)
    if found is None or _LOST_AND_FOUND in other:
        return listing
    is_made = (found.mode, found.uid, found.gid, found.xattrs) == (stat.S_IFDIR | 0o700, 0, 0, ())
    if not is_made or any(path.startswith(f"{_LOST_AND_FOUND}/") for path in listing):
        return listing
    return {path: entry for path, entry in listing.items() if path != _LOST_AND_FOUND}


def _walk(top: str) -> Iterator[tuple[str, os.stat_result]]:
    status = os.lstat(top)
    device = status.st_dev
    yield ".", status
    pending = [""]
    while pending:
        directory = pending.pop()
        for name in os.listdir(os.path.join(top, directory)):
            path = os.path.join(directory, name)
            try:
                status = os.lstat(os.path.join(top, path))
            except FileNotFoundError:
                # In a directory of only one layer, overlayfs also lists the names that the layer hides.
                continue
            yield path, status
            if stat.S_ISDIR(status.st_mode) and not _is_mountpoint(os.path.join(top, path), status, device):
                pending.append(path)


def _is_mountpoint(path: str, status: os.stat_result, device: int) -> bool:
    # The device number is not enough: under overlayfs directories have another one than their files.
    return status.st_dev != device and os.path.ismount(path)


def _link_groups(found: Mapping[str, os.stat_result]) -> dict[tuple[int, int], str]:
    paths: dict[tuple[int, int], list[str]] = {}
    for path, status in found.items():
        if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
            paths.setdefault((status.st_dev, status.st_ino), []).append(path)
    return {key: min(group) for key, group in paths.items() if len(group) > 1}


def _entry(path: str, status: os.stat_result, linked_to: str, content: bool) -> TreeEntry:
    mode = status.st_mode
    regular = stat.S_ISREG(mode)
    device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
    return TreeEntry(
        mode=mode,
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size if regular else 0,
        mtime_ns=status.st_mtime_ns,
        rdev=(os.major(status.st_rdev), os.minor(status.st_rdev)) if device else None,
        target=os.readlink(path) if stat.S_ISLNK(mode) else "",
        sha256=_sha256(path) if regular and content else "",
        xattrs=_xattrs(path),
        linked_to=linked_to if not stat.S_ISDIR(mode) else "",
    )


def _sha256(path: str) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _xattrs(path: str) -> tuple[tuple[str, bytes], ...]:
    try:
        names = sorted(os.listxattr(path, follow_symlinks=False))
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return ()
        raise
    return tuple(
        (name, os.getxattr(path, name, follow_symlinks=False))
        for name in names
        if not name.startswith(_HIDDEN_XATTRS)
    )


def _text(name: str, value: object) -> str:
    return oct(value) if name == "mode" and isinstance(value, int) else repr(value)
