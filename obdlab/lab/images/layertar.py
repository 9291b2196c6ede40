"""From a directory to an image layer: tar with OCI whiteouts, gzip.

The directory is an overlayfs upper ("Overlay Filesystem", kernel documentation): a character device 0/0 stands for a
deleted path, and a directory that hides the lower one has the xattr ``trusted.overlay.opaque``. An image layer has
``.wh.<name>`` and ``.wh..wh..opq`` instead ("OCI image layer filesystem changeset", whiteouts).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tarfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

WHITEOUT_PREFIX = ".wh."
OPAQUE_WHITEOUT = ".wh..wh..opq"
#: The time of all paths that a build changes, so that building again gives the same layer.
BUILD_EPOCH_S = 1594771200  # 2020-07-15

_OVERLAY_XATTR = "trusted.overlay."
_TAR_TYPES = {
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


@dataclass(frozen=True, slots=True)
class LayerFile:
    """A finished layer: digest and size of its gzip, digest of its tar (the "diff ID")."""

    digest: str
    size: int
    diff_id: str


def write_layer(upper: Path, target: Path, changed_after_s: float) -> LayerFile:
    """Write the upper directory as a gzipped layer to ``target``.

    A modification time after ``changed_after_s`` (Unix time: when building began) becomes BUILD_EPOCH_S; older
    ones came with a package and are kept. The same tree gives the same bytes. Raises OSError.
    """
    with target.open("wb") as stream:
        sink = _GzipSink(stream)
        write_tar(upper, cast("BinaryIO", sink), changed_after_s)  # the sink has no method but write
        return sink.finish()


def write_tar(upper: Path, sink: BinaryIO, changed_after_s: float) -> None:
    """Write the upper directory as a layer's tar (pax) to ``sink``."""
    seen: dict[tuple[int, int], str] = {}
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 18) as tar:
        for path, name in _walk(upper):
            status = path.lstat()
            if stat.S_ISSOCK(status.st_mode):
                continue  # tar cannot hold sockets, and a socket in an image is useless
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                tar.addfile(_whiteout(name, WHITEOUT_PREFIX))
                continue
            entry = _entry(path, name, status, changed_after_s)
            first = seen.setdefault((status.st_dev, status.st_ino), name)
            if first != name and not stat.S_ISDIR(status.st_mode):
                entry.type, entry.linkname, entry.size = tarfile.LNKTYPE, first, 0
            if entry.isreg():
                with path.open("rb") as content:
                    tar.addfile(entry, content)
            else:
                tar.addfile(entry)
            if stat.S_ISDIR(status.st_mode) and _is_opaque(path):
                tar.addfile(_whiteout(f"{name}/", OPAQUE_WHITEOUT))


def settle_times(tree: Path, changed_after_s: float) -> None:
    """Set the time of paths changed after ``changed_after_s`` in the tree itself to BUILD_EPOCH_S, as in the layer.

    Layers above copy files up with their time, possibly in a much later build.
    """
    for path, _ in _walk(tree):
        if path.lstat().st_mtime > changed_after_s:
            os.utime(path, (BUILD_EPOCH_S, BUILD_EPOCH_S), follow_symlinks=False)


def _walk(upper: Path) -> Iterator[tuple[Path, str]]:
    # Sorted, parents first, with the root itself: a layer may change its mode or owner.
    yield upper, "."
    pending = [("", upper)]
    while pending:
        prefix, directory = pending.pop()
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
        below = []
        for entry in entries:
            name = prefix + entry.name
            yield directory / entry.name, name
            if entry.is_dir(follow_symlinks=False):
                below.append((name + "/", directory / entry.name))
        pending += reversed(below)


def _entry(path: Path, name: str, status: os.stat_result, changed_after_s: float) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.mode = stat.S_IMODE(status.st_mode)
    entry.uid, entry.gid = status.st_uid, status.st_gid
    entry.mtime = BUILD_EPOCH_S if status.st_mtime > changed_after_s else int(status.st_mtime)
    kind = stat.S_IFMT(status.st_mode)
    entry.type = _TAR_TYPES.get(kind, tarfile.REGTYPE)
    if kind == stat.S_IFREG:
        entry.size = status.st_size
    elif kind == stat.S_IFLNK:
        entry.linkname = os.readlink(path)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        entry.devmajor, entry.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    entry.pax_headers = {
        f"SCHILY.xattr.{key}": os.fsdecode(os.getxattr(path, key, follow_symlinks=False))
        for key in sorted(os.listxattr(path, follow_symlinks=False))
        if not key.startswith(_OVERLAY_XATTR)
    }
    return entry


def _whiteout(name: str, prefix: str) -> tarfile.TarInfo:
    directory, _, last = name.rpartition("/")
    entry = tarfile.TarInfo(f"{directory}/{prefix}{last}" if directory else prefix + last)
    entry.mtime = BUILD_EPOCH_S
    return entry


def _is_opaque(directory: Path) -> bool:
    with contextlib.suppress(OSError):  # ENODATA: not set
        return os.getxattr(directory, f"{_OVERLAY_XATTR}opaque") == b"y"
    return False


class _GzipSink:
    # Writes tar bytes as gzip without name and time, and digests both.

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._deflate = zlib.compressobj(6, zlib.DEFLATED, 31)
        self._plain, self._packed = hashlib.sha256(), hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> int:
        self._plain.update(data)
        self._emit(self._deflate.compress(data))
        return len(data)

    def finish(self) -> LayerFile:
        self._emit(self._deflate.flush())
        return LayerFile(f"sha256:{self._packed.hexdigest()}", self._size, f"sha256:{self._plain.hexdigest()}")

    def _emit(self, data: bytes) -> None:
        self._packed.update(data)
        self._size += len(data)
        self._stream.write(data)
