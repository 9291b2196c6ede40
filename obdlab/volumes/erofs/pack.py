"""EROFS structures as bytes. Pure; blocks of 4096 bytes, extended inodes, nothing compressed.

Source: Linux fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

from obdlab.formats.checksum import raw_crc32c
from obdlab.system.superblock import EROFS_MAGIC

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

BLOCK = 4096
#: Inodes begin at multiples of this; an inode's number counts them from the start of the disk.
SLOT = 32
INODE_SIZE = 64
SUPER_OFFSET = 1024
#: Layouts of a file's data: in whole blocks, with the last part behind the inode, in chunks.
PLAIN, INLINE, CHUNKED = 0, 2, 4
#: The address of a chunk that is a hole.
HOLE = 0xFFFFFFFF
#: Types in directory entries.
REGULAR, DIRECTORY, CHARACTER, BLOCK_DEVICE, FIFO, SOCKET, LINK = range(1, 8)

_SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
_EXTENDED = struct.Struct("<HHHHQIIIIqII16x")
_DIRENT = struct.Struct("<QHBx")
_XATTRS = struct.Struct("<IB7x")
_XATTR = struct.Struct("<BBH")
_CHECKSUM, _MTIME = 0x1, 0x2
_CHUNKS = 0x4
_PREFIXES = ((1, b"user."), (4, b"trusted."), (6, b"security."))
_ACLS = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_LONGEST_NAME = 255
_MOST_XATTRS = 4 * 0xFFFF
_UUID = bytes.fromhex("6f62646c61624d698d616765732d6f32")


def superblock(*, root: int, inodes: int, blocks: int, chunks: bool) -> bytes:
    """Return the first block's bytes from SUPER_OFFSET on, with their checksum."""
    values = (BLOCK.bit_length() - 1, 0, root, inodes, 0, 0, blocks, 0, 0, _UUID, b"")
    tail = (_CHUNKS if chunks else 0, 0, 0, 0, 0, 0, 0, 0)
    raw = bytearray(BLOCK - SUPER_OFFSET)
    _SUPER.pack_into(raw, 0, EROFS_MAGIC, 0, _CHECKSUM | _MTIME, *values, *tail)
    struct.pack_into("<I", raw, 4, raw_crc32c(raw, 0xFFFFFFFF))
    return bytes(raw)


def inode(
    number: int,
    *,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime_ns: int,
    links: int,
    layout: int,
    start: int,
    xattrs_size: int,
) -> bytes:
    """Return an inode. ``start`` is the first data block, a device's number, or how chunks are stored."""
    count = (xattrs_size - _XATTRS.size) // 4 + 1 if xattrs_size else 0
    seconds, nanoseconds = divmod(mtime_ns, 10**9)
    return _EXTENDED.pack(
        1 | layout << 1, count, mode, 0, size, start, number & 0xFFFFFFFF, uid, gid, seconds, nanoseconds, links
    )


def device(major: int, minor: int) -> int:
    """Return a device's number as the kernel's new_encode_dev() makes it."""
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def xattrs(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the bytes after an inode for its attributes, given names that file systems store and programs' values.

    Raises OSError (E2BIG, ERANGE) if they cannot be stored.
    """
    entries = sorted((*_split(name), value) for name, value in pairs)
    if not entries:
        return b""
    body = bytearray(_XATTRS.pack(0, 0))
    for index, name, value in entries:
        if len(name) > _LONGEST_NAME:
            raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
        if len(value) > 0xFFFF:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        body += _XATTR.pack(len(name), index, len(value)) + name + value
        body += bytes(-len(body) % 4)
    if len(body) > _MOST_XATTRS:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
    return bytes(body)


def directory_size(names: Sequence[bytes]) -> int:
    """Return the size of a directory with these names, sorted, "." and ".." among them."""
    size = 0
    for first, last in _blocks(names):
        used = sum(len(name) + _DIRENT.size for name in names[first:last])
        size += BLOCK if last < len(names) else used
    return size


def directory(entries: Sequence[tuple[bytes, int, int]]) -> bytes:
    """Return a directory's content: (name, inode number, type), sorted by name, "." and ".." among them."""
    names = [name for name, _, _ in entries]
    content = bytearray()
    for first, last in _blocks(names):
        content += bytes(-len(content) % BLOCK)
        at = (last - first) * _DIRENT.size
        for name, number, kind in entries[first:last]:
            content += _DIRENT.pack(number, at, kind)
            at += len(name)
        content += b"".join(names[first:last])
    return bytes(content)


def _blocks(names: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    # Yields the ranges of names that share a block.
    first = used = 0
    for index, name in enumerate(names):
        need = len(name) + _DIRENT.size
        if used + need > BLOCK:
            yield first, index
            first, used = index, 0
        used += need
    yield first, len(names)


def _split(name: bytes) -> tuple[int, bytes]:
    if name in _ACLS:
        return _ACLS[name], b""
    for index, prefix in _PREFIXES:
        if name.startswith(prefix):
            return index, name.removeprefix(prefix)
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
