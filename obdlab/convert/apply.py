"""One OCI layer applied to a tree, such that the tree then shows what containerd's overlayfs would show.

containerd unpacks a layer into an empty directory of its own (the overlay's upper) without looking at the layers
below, and the kernel merges. Here there is one tree, so the applier keeps account of what the current layer has put
there (its *upper*) and does what the merge would do:

* Symbolic links in a member's path are followed only if this layer made them. One from a layer below is replaced by
  a directory, which takes over owner, mode and attributes of the directory it pointed to.
* A directory member over a directory from below keeps the children, but takes nothing else over: extended attributes
  are those of the member alone.
* A whiteout hides what is below and spares what this layer brings, wherever it stands in the tar. A directory that
  is whited out and brought again by the same layer is merged with the one below, as overlayfs merges it.
* Missing parents are made 0755; members that name the root itself are ignored.

Where containerd refuses a layer that makes sense (a hard link to a file from a layer below), it is done; where it
bends a name into the tree (``..`` beyond the root), it is an error.

Links are resolved inside the tree by this module, and once more by the kernel: the worker (``convert.worker``) makes
the tree its root directory, so that even a mistake here could not lead out.
Sources: OCI image layer specification, "Applying Changesets"; kernel documentation, "Overlay Filesystem".
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from obdlab.convert.tarstream import Kind, Member, TarStream
from obdlab.errors import FormatError, ObdlabError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO

WHITEOUT_PREFIX = b".wh."
OPAQUE_MARK = b".wh..wh..opq"
# As many links as containerd follows in one path.
_MAX_LINKS = 255
# What the kernel takes. Names of the tar, and links, could make paths of half a million components.
_MAX_PATH = 4095
# A host's own, overlayfs' marks among them: containerd takes none from an image.
_TRUSTED_XATTR = b"trusted."
_WHITEOUT_RDEV = (0, 0)


class ApplyError(ObdlabError):
    """A layer is well-formed but cannot be written: the file system is full, or refuses what a member asks for."""


@dataclass(slots=True)
class ApplyStatistics:
    """What a layer did: members read, bytes of files written, paths removed for whiteouts."""

    members: int = 0
    file_bytes: int = 0
    whiteouts: int = 0


@dataclass(slots=True)
class _Times:
    atime_ns: int
    mtime_ns: int


@dataclass(slots=True)
class _Upper:
    # What the layer has brought so far, by canonical path (no links, no trailing slash; the root is b"").
    # Directories come with the times they get in the end, since making their children changes them.
    directories: dict[bytes, _Times] = field(default_factory=dict)
    others: set[bytes] = field(default_factory=set)
    # Directories of it that show nothing from below.
    opaque: set[bytes] = field(default_factory=set)

    def __contains__(self, path: bytes) -> bool:
        return path in self.directories or path in self.others

    def forget(self, path: bytes) -> None:
        self.others.discard(path)
        if self.directories.pop(path, None) is None:
            return
        below = path + b"/"
        for name in [name for name in self.directories if name.startswith(below)]:
            del self.directories[name]
        self.others = {name for name in self.others if not name.startswith(below)}
        self.opaque = {name for name in self.opaque if name != path and not name.startswith(below)}


def apply_layer(tar: IO[bytes], blob: str, root: bytes = b"") -> ApplyStatistics:
    """Apply the uncompressed layer tar read from ``tar`` to the tree at ``root``.

    ``root`` is b"" in a process whose root directory is the tree, which is how layers from elsewhere are applied.
    ``blob`` is the layer's name for messages. Reads the stream to its very end.
    Raises FormatError for a malformed or escaping tar (with the offset in the uncompressed stream) and ApplyError if
    the tree cannot take it; the tree is half-changed then.
    """
    return _Applier(TarStream(tar, blob), blob, root).run()


class _Applier:
    def __init__(self, stream: TarStream, blob: str, root: bytes) -> None:
        self._stream = stream
        self._blob = blob
        self._root = root
        status = os.lstat(root or b"/")
        self._upper = _Upper({b"": _Times(status.st_atime_ns, status.st_mtime_ns)})
        self._whiteouts: dict[bytes, None] = {}
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
            # Last: until then the directories below still say what implicit parents look like.
            for path in (*self._whiteouts, *self._upper.opaque):
                self._hide(path)
            self._set_directory_times()
        except OSError as error:
            raise ApplyError(f"{self._blob}: cannot finish the layer: {_reason(error)}") from error
        return self.statistics

    def _apply(self, member: Member) -> None:
        components = self._components(member, member.name, "name")
        if not components:
            return
        base = components.pop()
        parent = self._resolve(components)
        path = parent + b"/" + base
        self._check_whiteout_name(member, base)
        self._enter(parent)
        if base == OPAQUE_MARK:
            self._upper.opaque.add(parent)
        elif base.startswith(WHITEOUT_PREFIX):
            self._whiteouts[parent + b"/" + base.removeprefix(WHITEOUT_PREFIX)] = None
        elif member.kind is Kind.CHARACTER and member.rdev == _WHITEOUT_RDEV:
            self._whiteouts[path] = None  # overlayfs' own form
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
        # The path with this layer's own symbolic links followed, inside the root; `below`: all links that there are.
        # Need not exist yet.
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
            target = os.readlink(self._at(inner))
            if target.startswith(b"/"):
                path = b""
            pending.extend(reversed(target.split(b"/")))
        return path

    def _is_link(self, path: bytes) -> bool:
        status = _lstat(self._at(path))
        return status is not None and stat.S_ISLNK(status.st_mode)

    def _at(self, path: bytes) -> bytes:
        return self._root + path or b"/"

    def _enter(self, path: bytes) -> None:
        # Have the directory and those above it in the upper, as they are below or new.
        missing = []
        while path not in self._upper.directories:
            missing.append(path)
            path = path.rpartition(b"/")[0]
        for inner in reversed(missing):
            self._enter_one(inner)

    def _enter_one(self, path: bytes) -> None:
        if path in self._upper.others:
            raise NotADirectoryError(errno.ENOTDIR, "a parent is not a directory", path)
        where = self._at(path)
        if path in self._whiteouts:
            del self._whiteouts[path]
            self._hide(path)
        status = _lstat(where)
        if status is None:
            self._make_directory(path)
        elif stat.S_ISDIR(status.st_mode):
            self._upper.directories[path] = _Times(status.st_atime_ns, status.st_mtime_ns)
        else:
            self._replace_by_directory(path, status)

    def _make_directory(self, path: bytes) -> None:
        os.mkdir(self._at(path), 0o755)
        os.chmod(self._at(path), 0o755)
        self._upper.directories[path] = _Times(0, 0)

    def _replace_by_directory(self, path: bytes, status: os.stat_result) -> None:
        where = self._at(path)
        template = self._directory_behind(path) if stat.S_ISLNK(status.st_mode) else None
        os.unlink(where)
        self._make_directory(path)
        if template is None:
            return
        seen, xattrs = template
        os.chown(where, seen.st_uid, seen.st_gid)
        for name, value in xattrs:
            os.setxattr(where, name, value)
        os.chmod(where, stat.S_IMODE(seen.st_mode))
        self._upper.directories[path] = _Times(seen.st_atime_ns, seen.st_mtime_ns)

    def _directory_behind(self, link: bytes) -> tuple[os.stat_result, list[tuple[str, bytes]]] | None:
        try:
            where = self._at(self._resolve(link.split(b"/"), below=True))
        except OSError:  # links in a circle
            return None
        status = _lstat(where)
        if status is None or not stat.S_ISDIR(status.st_mode):
            return None
        return status, [(name, os.getxattr(where, name)) for name in _xattr_names(where)]

    # Whiteouts

    def _check_whiteout_name(self, member: Member, base: bytes) -> None:
        if base.startswith(WHITEOUT_PREFIX) and base.removeprefix(WHITEOUT_PREFIX) in (b"", b".", b".."):
            raise self._malformed(member, "malformed whiteout", got=_show(member.name))

    def _hide(self, path: bytes) -> None:
        # Remove what layers below have at the path.
        pending = [path]
        while pending:
            path = pending.pop()
            if path in self._upper.directories:
                pending += [path + b"/" + name for name in os.listdir(self._at(path))]
            elif path not in self._upper.others:
                status = _lstat(self._at(path))
                if status is not None:
                    self.statistics.whiteouts += 1
                    _remove(self._at(path), status)

    # Members

    def _directory(self, member: Member, path: bytes) -> None:
        where = self._at(path)
        self._whiteouts.pop(path, None)
        status = _lstat(where)
        if status is not None and not stat.S_ISDIR(status.st_mode):
            os.unlink(where)
            self._upper.forget(path)
            status = None
        if status is None:
            os.mkdir(where, 0o700)
        elif path not in self._upper.directories:
            for name in _xattr_names(where):
                os.removexattr(where, name)
        self._set_metadata(member, where)
        self._upper.directories[path] = _Times(member.atime_ns, member.mtime_ns)

    def _other(self, member: Member, path: bytes) -> None:
        where = self._at(path)
        target = self._link_target(member, path) if member.kind is Kind.HARDLINK else b""
        self._whiteouts.pop(path, None)
        status = _lstat(where)
        if status is not None:
            _remove(where, status)
            self._upper.forget(path)
        match member.kind:
            case Kind.FILE:
                self._write_file(member, where)
            case Kind.SYMLINK:
                os.symlink(member.link, where)
            case Kind.HARDLINK:
                self._link(member, target, where)
            case Kind.FIFO:
                os.mkfifo(where, 0o600)
            case Kind.CHARACTER:
                os.mknod(where, 0o600 | stat.S_IFCHR, os.makedev(*member.rdev))
            case Kind.BLOCK:
                os.mknod(where, 0o600 | stat.S_IFBLK, os.makedev(*member.rdev))
        self._upper.others.add(path)
        self._set_metadata(member, where)
        os.utime(where, ns=(member.atime_ns, member.mtime_ns), follow_symlinks=False)

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

    def _link(self, member: Member, target: bytes, where: bytes) -> None:
        status = _lstat(self._at(target))
        if status is None or (target in self._whiteouts and target not in self._upper):
            raise self._malformed(member, "hard link to a file that does not exist", got=_show(member.link))
        if stat.S_ISDIR(status.st_mode):
            raise self._malformed(member, "hard link to a directory", got=_show(member.link))
        os.link(self._at(target), where, follow_symlinks=False)

    def _write_file(self, member: Member, where: bytes) -> None:
        file = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            for offset, piece in self._stream.data(member):
                _write_all(file, offset, piece)
            if member.sparse:
                os.ftruncate(file, member.size)
        finally:
            os.close(file)
        self.statistics.file_bytes += member.size

    def _set_metadata(self, member: Member, where: bytes) -> None:
        # Owner first: chown clears setuid, setgid and security.capability.
        os.chown(where, member.uid, member.gid, follow_symlinks=False)
        for name, value in member.xattrs:
            if not name.startswith(_TRUSTED_XATTR):
                _set_xattr(where, name, value)
        if member.kind is Kind.SYMLINK:
            return
        if member.kind is not Kind.HARDLINK or not stat.S_ISLNK(os.lstat(where).st_mode):
            os.chmod(where, member.mode)

    def _set_directory_times(self) -> None:
        for path, times in self._upper.directories.items():
            os.utime(self._at(path), ns=(times.atime_ns, times.mtime_ns))

    # Errors

    def _malformed(self, member: Member, what: str, *, got: str) -> FormatError:
        return FormatError(
            f"member {_show(member.name)}: {what}", blob=self._blob, offset=member.offset, got=got, wanted=None
        )

    def _refused(self, member: Member, error: OSError) -> ObdlabError:
        where = f"{member.kind.value} {_show(member.name)}"
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EMLINK):
            return FormatError(f"cannot make {where}: {_reason(error)}", blob=self._blob, offset=member.offset)
        return ApplyError(f"{self._blob}: cannot make {where}: {_reason(error)}")


def _lstat(path: bytes) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _remove(path: bytes, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        _remove_tree(path)
    else:
        os.unlink(path)


def _remove_tree(path: bytes) -> None:
    # shutil's recursion (before Python 3.13) ends where a hostile layer's nesting does not.
    directories = [path]
    for directory in directories:
        with os.scandir(directory) as children:
            for child in children:
                if child.is_dir(follow_symlinks=False):
                    directories.append(child.path)
                else:
                    os.unlink(child.path)
    for directory in reversed(directories):
        os.rmdir(directory)


def _xattr_names(path: bytes) -> list[str]:
    try:
        return os.listxattr(path)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return []
        raise


def _set_xattr(path: bytes, name: bytes, value: bytes) -> None:
    try:
        os.setxattr(path, name, value, follow_symlinks=False)
    except OSError as error:
        # As containerd: what the file system does not know is left out, and so is user.* on what is no file.
        if error.errno == errno.ENOTSUP or (error.errno == errno.EPERM and name.startswith(b"user.")):
            return
        # ext4 says ENOSPC of attributes beyond one block; that is no full file system.
        reason = "too large" if error.errno == errno.ENOSPC else error.strerror
        raise OSError(errno.EINVAL, f"extended attribute {_show(name)}: {reason}", path) from error


def _write_all(file: int, offset: int, piece: memoryview) -> None:
    while piece:
        written = os.pwrite(file, piece, offset)
        piece = piece[written:]
        offset += written


def _show(name: bytes) -> str:
    text = name.decode(errors="backslashreplace")
    return repr(text if len(text) <= 200 else f"{text[:100]}...{text[-90:]}")


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the image's file system is full (a larger virtual size helps) or the disk below it is"
    return error.strerror or str(error)
