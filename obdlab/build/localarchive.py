"""ADD of a local tar archive: its members, unpacked into the root of an image.

Source: Dockerfile reference, "ADD". An archive is known by its content, plain or compressed (gzip, bzip2, xz, zstd).
"""

from __future__ import annotations

import bz2
import errno
import io
import lzma
import os
import stat
from typing import IO, TYPE_CHECKING, cast

from obdlab.build.copying import write_all
from obdlab.build.inside import Ownership, make_directory, remove_file
from obdlab.convert.decompress import decompressed
from obdlab.convert.layer import pieces_file
from obdlab.convert.tar.member import Kind
from obdlab.convert.tar.reader import TarStream
from obdlab.errors import FormatError
from obdlab.formats.compression import compression_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.build.inside import Inside
    from obdlab.convert.tar.member import Member

_HEADER = 512
_MAGIC = slice(257, 262)
_BZIP2, _XZ = b"BZh", b"\xfd7zXZ\0"
_PIECE = 1 << 20
_NODES = {Kind.CHARACTER: stat.S_IFCHR, Kind.BLOCK: stat.S_IFBLK, Kind.FIFO: stat.S_IFIFO}


def is_archive(descriptor: int, name: str) -> bool:
    """Return True if an open file is a tar, or a compressed one. It is at its beginning afterwards."""
    try:
        with io.BufferedReader(cast("io.RawIOBase", _stream(descriptor, name)), 4096) as stream:
            return stream.read(_HEADER)[_MAGIC] == b"ustar"
    except (FormatError, lzma.LZMAError, EOFError, OSError):
        return False
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)


def unpack(descriptor: int, name: str, root: Inside, target: str, owner: Ownership | None) -> None:
    """Unpack an open archive below ``target``; ``owner`` replaces those of its members.

    Raises FormatError for a damaged archive or a member that leads out of it, OSError with the path in the image.
    """
    unpacker = _Unpacker(root, os.fsencode(target), owner, name)
    root.make_directories(os.fsencode(target), owner or Ownership())
    try:
        stream = TarStream(_stream(descriptor, name), name)
        for member in stream:
            unpacker.put(member, stream)
    except (lzma.LZMAError, EOFError) as error:
        raise FormatError(f"damaged compressed data: {error}", blob=name) from error
    unpacker.finish()


def _stream(descriptor: int, name: str) -> IO[bytes] | io.RawIOBase:
    head = os.pread(descriptor, 6, 0)
    file = open(os.dup(descriptor), "rb")  # noqa: SIM115 - closed with the stream over it
    if head.startswith(_BZIP2):
        return cast("IO[bytes]", bz2.BZ2File(file))
    if head.startswith(_XZ):
        return cast("IO[bytes]", lzma.LZMAFile(file))
    if compression_of(head[:4]) in ("gzip", "zstd"):
        return pieces_file(_closing(decompressed(file, name), file))
    return file


def _closing(found: Iterator[bytes], file: IO[bytes]) -> Iterator[bytes]:
    with file:
        yield from found


class _Unpacker:
    def __init__(self, root: Inside, target: bytes, owner: Ownership | None, name: str) -> None:
        self._root = root
        self._target = target
        self._owner = owner
        self._name = name
        self._directories: dict[bytes, int] = {}

    def put(self, member: Member, stream: TarStream) -> None:
        path = self._path(member, member.name)
        owner = self._owner or Ownership(member.uid, member.gid)
        self._root.make_directories(os.path.dirname(path), self._owner or Ownership())
        if member.kind is Kind.DIRECTORY:
            self._directory(path, member, owner)
            return
        with self._root.parent(path) as (parent, name):
            remove_file(parent, name)
            if member.kind is Kind.HARDLINK:
                with self._root.parent(self._path(member, member.link)) as (other, linked):
                    os.link(linked, name, src_dir_fd=other, dst_dir_fd=parent, follow_symlinks=False)
                return
            if member.kind is Kind.FILE:
                self._file(parent, name, member, stream, owner)
            elif member.kind is Kind.SYMLINK:
                os.symlink(member.link, name, dir_fd=parent)
            else:
                os.mknod(name, _NODES[member.kind] | member.mode, os.makedev(*member.rdev), dir_fd=parent)
            if member.kind is not Kind.FILE:
                os.chown(name, owner.uid, owner.gid, dir_fd=parent, follow_symlinks=False)
            os.utime(name, ns=(member.mtime_ns, member.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def finish(self) -> None:
        for path, time_ns in self._directories.items():
            with self._root.directory(path) as directory:
                os.utime(directory, ns=(time_ns, time_ns))

    def _path(self, member: Member, name: bytes) -> bytes:
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise FormatError(
                f"member {name[:200]!r} leads out of the archive", blob=self._name, offset=member.offset
            )
        return os.path.join(self._target, *parts)

    def _directory(self, path: bytes, member: Member, owner: Ownership) -> None:
        found = self._root.status(path)
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "is not a directory in the image", os.fsdecode(path))
        if found is None:
            with self._root.parent(path) as (parent, name):
                make_directory(parent, name, owner, member.mode)
        elif path != self._target:
            with self._root.directory(path) as directory:
                os.fchown(directory, owner.uid, owner.gid)
                os.fchmod(directory, member.mode)
        self._directories[path] = member.mtime_ns

    def _file(self, parent: int, name: bytes, member: Member, stream: TarStream, owner: Ownership) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            for offset, piece in stream.data(member):
                os.lseek(descriptor, offset, os.SEEK_SET)
                write_all(descriptor, piece)
            os.ftruncate(descriptor, member.size)
            os.fchown(descriptor, owner.uid, owner.gid)
            os.fchmod(descriptor, member.mode)
            for key, value in member.xattrs:
                if key.startswith((b"user.", b"security.capability")):
                    os.setxattr(descriptor, key, value)
        finally:
            os.close(descriptor)
