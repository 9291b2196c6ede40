"""All operations of the served file except the transfer of its bytes.

Takes the bytes of a request, returns the bytes of the reply or an errno; never touches /dev/fuse.
"""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

from obdlab.blob import WritableBlob
from obdlab.call import UNBOUND
from obdlab.errors import ObdlabError
from obdlab.system import abi
from obdlab.system.abi import FuseInit, FuseOpcode

if TYPE_CHECKING:
    from obdlab.blob import Blob
    from obdlab.call import Call

#: The served file's name in its mount.
DISK_NAME = "disk"
#: Its inode number.
DISK_ID = 2

MIB = 1 << 20
_FOREVER_S = 1 << 30
_PAGE = 4096
#: Requests the kernel sends without waiting for earlier ones (its default, 12, would starve slow sources).
MAX_BACKGROUND = 256
_HEADER = abi.FUSE_IN_HEADER.size


def errno_of(error: Exception) -> tuple[int, bool]:
    """Map an error to the errno of the reply, and whether the error is an expected one (not a bug)."""
    if isinstance(error, OSError):
        kept = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EOPNOTSUPP)
        return (error.errno if error.errno in kept else errno.EIO), True
    return errno.EIO, isinstance(error, ObdlabError)


class FuseFile:
    """A directory with one file whose bytes are a blob's."""

    def __init__(self, blob: Blob, *, read_only: bool) -> None:
        self._blob = blob
        self._writable = blob if isinstance(blob, WritableBlob) and not read_only else None
        #: Largest READ and WRITE.
        self.max_transfer = MIB
        # A read-only device takes no data in, so its threads need no large buffers.
        self._max_write = _PAGE if self._writable is None else MIB
        self.buffer_size = max(abi.FUSE_MIN_READ_BUFFER, abi.FUSE_WRITE_DATA + self._max_write)
        #: Whether the kernel knows FUSE_NOTIFY_RESEND; set by INIT.
        self.can_send_again = False
        self._handlers = {
            FuseOpcode.INIT: self._init,
            FuseOpcode.LOOKUP: self._lookup,
            FuseOpcode.GETATTR: self._getattr,
            FuseOpcode.SETATTR: self._setattr,
            FuseOpcode.OPEN: self._open,
            FuseOpcode.RELEASE: self._done,
            FuseOpcode.STATFS: self._statfs,
            FuseOpcode.OPENDIR: self._opendir,
            FuseOpcode.READDIR: self._readdir,
            FuseOpcode.RELEASEDIR: self._done,
            FuseOpcode.DESTROY: self._done,
        }

    def answer(self, opcode: int, request: memoryview, call: Call = UNBOUND) -> bytes | int:
        """Answer one request, header included, on the call's terms. Return the reply's bytes, or an errno."""
        if opcode == FuseOpcode.FSYNC:
            return self._fsync(call)
        if opcode == FuseOpcode.FALLOCATE:
            return self._fallocate(request[_HEADER:], call)
        handler = self._handlers.get(opcode)  # type: ignore[call-overload]  # an IntEnum's member equals its number
        if handler is None:
            return errno.ENOSYS
        node_id = abi.FUSE_IN_HEADER.unpack_from(request)[3]
        answer: bytes | int = handler(node_id, request[_HEADER:])
        return answer

    def write(self, offset: int, data: memoryview, call: Call = UNBOUND) -> None:
        """Store the data of a WRITE request. Raises OSError(EROFS) on a read-only device."""
        self._writable_or_refuse().write_at(offset, data, call)

    def _writable_or_refuse(self) -> WritableBlob:
        if self._writable is None:
            raise OSError(errno.EROFS, "the device is read-only")
        return self._writable

    def _init(self, _: int, body: memoryview) -> bytes | int:
        major, minor, readahead, flags = abi.FUSE_INIT_IN.unpack_from(body)
        if major != abi.FUSE_MAJOR or minor < 28:  # 7.28 (Linux 4.20) brought max_pages
            return errno.EPROTO
        wanted = (
            FuseInit.ASYNC_READ
            | FuseInit.BIG_WRITES
            | FuseInit.ASYNC_DIO
            | FuseInit.PARALLEL_DIROPS
            | FuseInit.MAX_PAGES
            | FuseInit.INIT_EXT
            | FuseInit.HAS_RESEND
        )
        if flags & FuseInit.INIT_EXT and minor >= 36:
            flags |= abi.FUSE_INIT_FLAGS2_IN.unpack_from(body, abi.FUSE_INIT_IN.size)[0] << 32
        agreed = wanted & flags
        self.can_send_again = bool(agreed & FuseInit.HAS_RESEND)
        return abi.FUSE_INIT_OUT.pack(
            abi.FUSE_MAJOR,
            min(minor, abi.FUSE_MINOR),
            readahead,
            agreed & 0xFFFFFFFF,
            MAX_BACKGROUND,
            MAX_BACKGROUND * 3 // 4,
            self._max_write,
            1,
            MIB // _PAGE,
            0,
            agreed >> 32,
        )

    def _attr(self, node_id: int) -> bytes:
        if node_id == abi.FUSE_ROOT_ID:
            mode, size, links = stat.S_IFDIR | 0o500, 0, 2
        else:
            mode = stat.S_IFREG | (0o400 if self._writable is None else 0o600)
            size, links = self._blob.size, 1
        blocks = -(-size // abi.SECTOR)
        return abi.FUSE_ATTR.pack(node_id, size, blocks, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, _PAGE, 0)

    def _lookup(self, node_id: int, body: memoryview) -> bytes | int:
        if node_id != abi.FUSE_ROOT_ID or bytes(body).rstrip(b"\0") != DISK_NAME.encode():
            return errno.ENOENT
        entry = abi.FUSE_ENTRY_OUT.pack(DISK_ID, 0, _FOREVER_S, _FOREVER_S, 0, 0)
        return entry + self._attr(DISK_ID)

    def _getattr(self, node_id: int, _: memoryview) -> bytes | int:
        return abi.FUSE_ATTR_OUT.pack(_FOREVER_S, 0, 0) + self._attr(node_id)

    def _setattr(self, node_id: int, body: memoryview) -> bytes | int:
        (valid,) = abi.FUSE_SETATTR_IN.unpack_from(body)
        if valid & abi.FATTR_SIZE:
            return errno.EPERM
        return self._getattr(node_id, body)

    def _open(self, _: int, __: memoryview) -> bytes | int:
        # No caching here: the file system above the loop device caches its reads already.
        flags = abi.FOPEN_DIRECT_IO | abi.FOPEN_PARALLEL_DIRECT_WRITES
        return abi.FUSE_OPEN_OUT.pack(0, flags, 0)

    def _fsync(self, call: Call) -> bytes | int:
        if self._writable is not None:
            call.about_to_wait()
            self._writable.flush()
        return b""

    def _fallocate(self, body: memoryview, call: Call) -> bytes | int:
        __, offset, length, mode, ___ = abi.FUSE_FALLOCATE_IN.unpack_from(body)
        zeroing = abi.FALLOC_FL_PUNCH_HOLE | abi.FALLOC_FL_ZERO_RANGE
        if not mode & zeroing or mode & ~(zeroing | abi.FALLOC_FL_KEEP_SIZE):
            return errno.EOPNOTSUPP
        end = min(offset + length, self._blob.size)
        if end > offset:
            self._writable_or_refuse().discard(offset, end - offset, call)
        return b""

    def _statfs(self, _: int, __: memoryview) -> bytes | int:
        blocks = -(-self._blob.size // _PAGE)
        return abi.FUSE_STATFS_OUT.pack(blocks, 0, 0, 1, 0, _PAGE, 255, _PAGE)

    def _opendir(self, _: int, __: memoryview) -> bytes | int:
        return abi.FUSE_OPEN_OUT.pack(0, 0, 0)

    def _readdir(self, _: int, body: memoryview) -> bytes | int:
        __, offset, size, *___ = abi.FUSE_TRANSFER_IN.unpack_from(body)
        listing = b""
        names = ((b".", 1, stat.S_IFDIR), (b"..", 1, stat.S_IFDIR), (DISK_NAME.encode(), DISK_ID, stat.S_IFREG))
        for position, (name, ino, kind) in enumerate(names[offset:], offset + 1):
            entry = abi.FUSE_DIRENT.pack(ino, position, len(name), kind >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(listing) + len(entry) > size:
                break
            listing += entry
        return listing

    def _done(self, _: int, __: memoryview) -> bytes | int:
        return b""
