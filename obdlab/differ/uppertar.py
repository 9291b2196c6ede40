"""The upper directory of an overlay as the tar of a layer.

A running container may change the directory meanwhile, and a hostile one swap directories for links. So each step
starts from an open directory and follows no link.

(Overlay Filesystem, kernel documentation, on whiteouts and opaque directories; OCI image specification, image layer
filesystem changeset; POSIX.1-2024 pax.)
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from obdlab.convert.apply import ApplyError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BLOCK = 512
_PIECE = 1 << 20
_MOST_DEPTH = 256
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: The kernel's own attributes; in user namespaces they are user's.
_OVERLAY = ("trusted.overlay.", "user.overlay.")
_OPAQUE = "opaque"
# A file whose data or name is in the layers below, and a deleted one in another form than the usual.
_UNREADABLE = ("metacopy", "redirect", "whiteout")
_WHITEOUT, _OPAQUE_NAME = b".wh.", b".wh..wh..opq"
_MOST_OCTAL = {8: 0o7777777, 12: 0o77777777777}
_TYPES = {
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}


def upper_tar(upper: Path) -> Iterator[bytes]:
    """Yield the tar of an overlay's upper directory in pieces of at most 1 MiB. Raises OSError.

    Sockets are left out, and so are attributes that belong to the host. Raises ApplyError for a directory that no
    layer can express: too deep, changed meanwhile, or with files that depend on the layers below.
    """
    descriptor = os.open(upper, _DIRECTORY)
    try:
        yield from _Writer().below(descriptor, b"", 0)
    finally:
        os.close(descriptor)
    yield bytes(2 * _BLOCK)


class _Writer:
    def __init__(self) -> None:
        # The first name of each file with several.
        self._linked: dict[tuple[int, int], bytes] = {}

    def below(self, directory: int, prefix: bytes, depth: int) -> Iterator[bytes]:
        if depth > _MOST_DEPTH:
            raise ApplyError(f"{_shown(prefix)}: more than {_MOST_DEPTH} directories deep")
        for name in sorted(map(os.fsencode, os.listdir(directory))):
            path = prefix + name
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            match stat.S_IFMT(status.st_mode):
                case stat.S_IFSOCK:
                    continue
                case stat.S_IFCHR if status.st_rdev == 0:
                    yield _plain(prefix + _WHITEOUT + name)
                case stat.S_IFDIR:
                    yield from self._directory(directory, name, path, depth)
                case stat.S_IFREG:
                    yield from self._file(directory, name, path)
                case _:
                    link = os.readlink(name, dir_fd=directory) if stat.S_ISLNK(status.st_mode) else b""
                    place = b"/proc/self/fd/%d/%s" % (directory, name)
                    yield _header(path, status, os.fsencode(link), _attributes(place, path)[0])

    def _directory(self, parent: int, name: bytes, path: bytes, depth: int) -> Iterator[bytes]:
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            attributes, marks = _attributes(descriptor, path)
            yield _header(path + b"/", os.fstat(descriptor), b"", attributes)
            if marks.get(_OPAQUE) in (b"y", b"x"):
                yield _plain(path + b"/" + _OPAQUE_NAME)
            yield from self.below(descriptor, path + b"/", depth + 1)
        finally:
            os.close(descriptor)

    def _file(self, parent: int, name: bytes, path: bytes) -> Iterator[bytes]:
        descriptor = os.open(name, _FILE, dir_fd=parent)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _changed(path)
            attributes, _ = _attributes(descriptor, path)
            first = self._linked.setdefault((status.st_dev, status.st_ino), path) if status.st_nlink > 1 else path
            if first != path:
                yield _header(path, status, first, {}, kind=b"1")
                return
            yield _header(path, status, b"", attributes)
            left = status.st_size
            while left:
                data = os.read(descriptor, min(left, _PIECE))
                if not data:
                    raise _changed(path)
                left -= len(data)
                yield data
            yield bytes(-status.st_size % _BLOCK)
        finally:
            os.close(descriptor)


# Returns those of the file, and the kernel's marks by their names without prefix.
def _attributes(place: int | bytes, path: bytes) -> tuple[dict[str, bytes], dict[str, bytes]]:
    follow = isinstance(place, int)
    found: dict[str, bytes] = {}
    marks: dict[str, bytes] = {}
    for name in os.listxattr(place, follow_symlinks=follow):
        mark = next((name.removeprefix(prefix) for prefix in _OVERLAY if name.startswith(prefix)), None)
        if mark in _UNREADABLE:
            raise ApplyError(f"{_shown(path)}: depends on the layers below (overlay attribute {mark})")
        if mark is not None:
            marks[mark] = os.getxattr(place, name, follow_symlinks=follow)
        elif not name.startswith("trusted."):
            found[name] = os.getxattr(place, name, follow_symlinks=follow)
    return found, marks


def _header(
    path: bytes, status: os.stat_result, link: bytes, attributes: dict[str, bytes], *, kind: bytes = b""
) -> bytes:
    kind = kind or _TYPES[stat.S_IFMT(status.st_mode)]
    size = status.st_size if kind == b"0" else 0
    seconds, nanoseconds = divmod(max(0, status.st_mtime_ns), 1_000_000_000)
    records = _record(b"path", path) + _record(b"mtime", b"%d.%09d" % (seconds, nanoseconds))
    if link:
        records += _record(b"linkpath", link)
    for key, number in ((b"uid", status.st_uid), (b"gid", status.st_gid)):
        records += _record(key, b"%d" % number)
    if size > _MOST_OCTAL[12]:
        records += _record(b"size", b"%d" % size)
    for name in sorted(attributes):
        records += _record(b"SCHILY.xattr." + os.fsencode(name), attributes[name])
    device = (os.major(status.st_rdev), os.minor(status.st_rdev)) if kind in (b"3", b"4") else (0, 0)
    mode = stat.S_IMODE(status.st_mode)
    own = _block(path, mode, (status.st_uid, status.st_gid), size, seconds, kind, link, device)
    return _extended(records) + own


# A member of no bytes, which stands for a mark.
def _plain(path: bytes) -> bytes:
    return _extended(_record(b"path", path)) + _block(path, 0, (0, 0), 0, 0, b"0")


def _extended(records: bytes) -> bytes:
    header = _block(b"pax", 0o644, (0, 0), len(records), 0, b"x")
    return header + records + bytes(-len(records) % _BLOCK)


def _record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3  # blank, equals sign, line feed
    size = length + len(b"%d" % length)
    size = length + len(b"%d" % size)
    return b"%d %s=%s\n" % (size, key, value)


def _block(
    path: bytes,
    mode: int,
    owner: tuple[int, int],
    size: int,
    seconds: int,
    kind: bytes,
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> bytes:
    def octal(number: int, width: int) -> bytes:
        return b"%0*o\0" % (width - 1, min(number, _MOST_OCTAL[width]))

    before = path[:100].ljust(100, b"\0") + octal(mode, 8) + octal(owner[0], 8) + octal(owner[1], 8)
    before += octal(size, 12) + octal(seconds, 12)
    after = (
        kind + link[:100].ljust(100, b"\0") + b"ustar\x0000" + bytes(64) + octal(device[0], 8) + octal(device[1], 8)
    )
    checksum = sum(before) + 8 * 0x20 + sum(after)
    return (before + b"%06o\0 " % checksum + after).ljust(_BLOCK, b"\0")


def _changed(path: bytes) -> ApplyError:
    return ApplyError(f"{_shown(path)}: was changed while it was read (pause the container)")


def _shown(path: bytes) -> str:
    return repr(path[-200:].decode(errors="backslashreplace"))
