"""A directory of the running kernel as a tree: what the file system in user space is compared with. Needs root."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from typing import TYPE_CHECKING

from obdlab.convert.tree.target import Attributes, Seen, Xattr

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from obdlab.blob import Buffer


class OsTree:
    def __init__(self, root: Path) -> None:
        self._root = os.fsencode(root)

    def at(self, path: bytes) -> bytes:
        return self._root + path

    def look(self, path: bytes) -> Seen | None:
        try:
            status = os.lstat(self.at(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        mode, times = stat.S_IMODE(status.st_mode), (status.st_atime_ns, status.st_mtime_ns)
        return Seen(stat.S_IFMT(status.st_mode), Attributes(mode, status.st_uid, status.st_gid, *times))

    def xattrs(self, path: bytes) -> list[Xattr]:
        where = self.at(path)
        names = os.listxattr(where, follow_symlinks=False)
        return [(os.fsencode(name), os.getxattr(where, name, follow_symlinks=False)) for name in names]

    def readlink(self, path: bytes) -> bytes:
        return os.readlink(self.at(path))

    def names(self, path: bytes) -> list[bytes]:
        return os.listdir(self.at(path))

    def remove(self, path: bytes) -> None:
        where = self.at(path)
        if stat.S_ISDIR(os.lstat(where).st_mode):
            shutil.rmtree(where)
        else:
            os.unlink(where)

    def make_directory(self, path: bytes, attributes: Attributes) -> None:
        os.mkdir(self.at(path))
        self.set_attributes(path, attributes, keep_xattrs=True)

    def make_file(
        self, path: bytes, attributes: Attributes, size: int, pieces: Iterable[tuple[int, Buffer]], *, sparse: bool
    ) -> None:
        file = os.open(self.at(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            for offset, piece in pieces:
                assert os.pwrite(file, piece, offset) == len(piece)
            if sparse:
                os.ftruncate(file, size)
        finally:
            os.close(file)
        self.set_attributes(path, attributes, keep_xattrs=True)

    def make_link(self, path: bytes, attributes: Attributes, target: bytes) -> None:
        os.symlink(target, self.at(path))
        self.set_attributes(path, attributes, keep_xattrs=True)

    def make_node(self, path: bytes, attributes: Attributes, kind: int, rdev: tuple[int, int]) -> None:
        os.mknod(self.at(path), 0o600 | kind, os.makedev(*rdev) if kind != stat.S_IFIFO else 0)
        self.set_attributes(path, attributes, keep_xattrs=True)

    def make_hard_link(self, path: bytes, target: bytes) -> None:
        os.link(self.at(target), self.at(path), follow_symlinks=False)

    def set_attributes(self, path: bytes, attributes: Attributes, *, keep_xattrs: bool) -> None:
        # Owner first: chown clears setuid, setgid and security.capability.
        where = self.at(path)
        os.chown(where, attributes.uid, attributes.gid, follow_symlinks=False)
        if not keep_xattrs:
            for name in os.listxattr(where, follow_symlinks=False):
                os.removexattr(where, name, follow_symlinks=False)
        for name, value in attributes.xattrs:
            _set_xattr(where, name, value)
        if not os.path.islink(where):
            os.chmod(where, attributes.mode)
        self.set_times(path, attributes.atime_ns, attributes.mtime_ns)

    def set_times(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        os.utime(self.at(path), ns=(atime_ns, mtime_ns), follow_symlinks=False)


def _set_xattr(where: bytes, name: bytes, value: bytes) -> None:
    try:
        os.setxattr(where, name, value, follow_symlinks=False)
    except OSError as error:
        # As containerd: what the file system does not know is left out, and so is user.* on what is no file.
        if error.errno == errno.ENOTSUP or (error.errno == errno.EPERM and name.startswith(b"user.")):
            return
        if error.errno == errno.ENOSPC:  # what ext4 says of attributes beyond one block
            raise OSError(errno.E2BIG, "extended attributes do not fit") from error
        raise
