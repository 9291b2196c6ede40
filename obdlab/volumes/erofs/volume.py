"""Reading an EROFS file system from a blob, without a mount, as long as it is not compressed.

(Linux Documentation/filesystems/erofs.rst, fs/erofs/erofs_fs.h.)
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.errors import FormatError
from obdlab.system.superblock import EROFS_MAGIC
from obdlab.volumes.tree import MAX_NAMES, MAX_PIECES, FileTree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.blob import Blob

Pair = tuple[bytes, bytes]

SUPER_OFFSET = 1024
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ")
_COMPACT = struct.Struct("<HHHHIIIIHHI")
_EXTENDED = struct.Struct("<HHHHQIIIIqII16x")  # the time is signed
_DIRENT = struct.Struct("<QHBB")
_XATTRS = struct.Struct("<IB7x")
_XATTR = struct.Struct("<BBH")
_CHUNK = struct.Struct("<HHI")
_SLOT = 32
# Features that may be set although they do not matter to uncompressed files: padding, chunks.
_CHUNKED_FILES = 0x4
_KNOWN_FEATURES = 0x1 | _CHUNKED_FILES
_FEATURES = {
    0x2: "large compressed clusters",
    0x8: "several devices or compression heads",
    0x10: "packed tails",
    0x20: "fragments",
    0x40: "attribute name prefixes",
    0x80: "48-bit blocks",
    0x100: "metadata in a box",
}
_PLAIN, _INLINE, _CHUNKED = 0, 2, 4
_CHUNK_BITS, _CHUNK_INDEXES = 0x1F, 0x20
_HOLE = 0xFFFFFFFF
_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
_READ = 1 << 20
# Bounds on memory for a hostile file system: blocks of one directory, and chunks of one file.
_MAX_DIRECTORY = 256 << 20
_MAX_CHUNKS = 1 << 24


@dataclass(frozen=True, slots=True)
class Inode:
    """One inode. ``start`` is its raw address field; ``body`` the offset of inline data, in bytes."""

    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    links: int
    layout: int
    start: int
    body: int
    xattrs_at: int
    xattrs_size: int

    @property
    def is_directory(self) -> bool:
        """True for a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def rdev(self) -> tuple[int, int]:
        """(major, minor) of a device node."""
        return (self.start & 0xFFF00) >> 8, (self.start & 0xFF) | (self.start >> 12 & 0xFFF00)


class Volume(FileTree[Inode]):
    """An EROFS file system for reading. Inodes are known by number; names are bytes.

    Every method raises FormatError if the file system is damaged, compressed or of an unsupported kind, and passes on
    errors of the blob.
    """

    def __init__(self, disk: Blob) -> None:
        self.name = disk.name
        self._disk = disk
        if disk.size < SUPER_OFFSET + _SUPER.size:
            raise FormatError("too small for EROFS", blob=disk.name, got=disk.size)
        fields = _SUPER.unpack(disk.read_at(SUPER_OFFSET, _SUPER.size))
        if fields[0] != EROFS_MAGIC:
            raise FormatError("no EROFS", blob=disk.name, got=hex(fields[0]), wanted=hex(EROFS_MAGIC))
        bits, self._root, self._time, self._time_ns = fields[3], fields[5], fields[7], fields[8]
        features = fields[14]
        unknown = [text for bit, text in _FEATURES.items() if features & bit]
        if features & ~_KNOWN_FEATURES or not 9 <= bits <= 16 or fields[18]:
            what = ", ".join(unknown) or f"features {features:#x}, block size 2^{bits}, directories 2^{fields[18]}"
            raise FormatError(f"EROFS with what is not known here: {what}", blob=disk.name)
        self.block_size = 1 << bits
        #: Blocks and inodes that the superblock counts, and True if files may be stored in chunks.
        self.blocks, self.inodes, self.has_chunks = int(fields[9]), int(fields[6]), bool(features & _CHUNKED_FILES)
        self._meta, self._shared = fields[10] * self.block_size, fields[11] * self.block_size

    @property
    def root(self) -> int:
        """Number of the root directory."""
        return int(self._root)

    def inode(self, number: int) -> Inode:
        """Return an inode."""
        at = self._meta + number * _SLOT
        raw = self._read(at, min(_EXTENDED.size, self._disk.size - at))
        if len(raw) < _COMPACT.size:
            raise FormatError("inode past the end", blob=self.name, got=number)
        form = int.from_bytes(raw[:2], "little")
        layout = form >> 1 & 7
        if form & 1:
            if len(raw) < _EXTENDED.size:
                raise FormatError("inode past the end", blob=self.name, got=number)
            _, count, mode, _, size, start, _, uid, gid, mtime, nsec, links = _EXTENDED.unpack(raw)
            end = at + _EXTENDED.size
        else:
            _, count, mode, links, size, _, start, _, uid, gid, _ = _COMPACT.unpack(raw[: _COMPACT.size])
            mtime, nsec, end = self._time, self._time_ns, at + _COMPACT.size
        xattrs_size = _XATTRS.size + 4 * (count - 1) if count else 0
        if layout not in (_PLAIN, _INLINE, _CHUNKED):
            raise FormatError(f"inode {number} is compressed, which is not known here", blob=self.name)
        chunk = self.block_size << (start & _CHUNK_BITS) if layout == _CHUNKED else 1 << 60
        if size > min(1 << 60, chunk * _MAX_CHUNKS):
            raise FormatError(f"inode {number} has an impossible size", blob=self.name, got=size)
        if not -(1 << 63) <= mtime < 1 << 63 or nsec >= 10**9:
            raise FormatError(f"inode {number} has an impossible time", blob=self.name, got=(mtime, nsec))
        mtime_ns = mtime * 10**9 + nsec
        return Inode(mode, uid, gid, size, mtime_ns, links, layout, start, end + xattrs_size, end, xattrs_size)

    def entries(self, number: int) -> dict[bytes, tuple[int, int]]:
        """Return a directory's names, with inode number and type, without "." and ".."."""
        inode = self.inode(number)
        if not inode.is_directory or inode.size > _MAX_DIRECTORY:
            raise FormatError(f"inode {number} is no directory", blob=self.name, got=(oct(inode.mode), inode.size))
        found: dict[bytes, tuple[int, int]] = {}
        for offset in range(0, inode.size, self.block_size):
            for name, child, kind in self._block_entries(self.read(inode, offset, self.block_size)):
                if name not in (b".", b".."):
                    found[name] = (child, kind)
            if len(found) > MAX_NAMES:
                raise FormatError(f"directory {number} has too many names", blob=self.name, wanted=MAX_NAMES)
        return found

    def places(self, inode: Inode) -> Iterator[tuple[int, int, int]]:
        """Yield (offset in the file, length, offset on the disk) of a file's or directory's data, in bytes.

        Holes are left out; pieces that are adjacent on the disk are joined.
        """
        at, begin, size, start, pieces = 0, 0, 0, 0, 0
        while at < inode.size:
            place, count = self._place(inode, at)
            count = min(count, inode.size - at)
            if place is not None and size and start + size == place and begin + size == at:
                size += count
            elif place is not None:
                if size:
                    yield begin, size, start
                pieces += 1
                if pieces > MAX_PIECES:
                    raise FormatError("file in too many pieces", blob=self.name, wanted=f"at most {MAX_PIECES}")
                begin, size, start = at, count, place
            at += count
        if size:
            yield begin, size, start

    def readlink(self, inode: Inode) -> bytes:
        """Return a symbolic link's text."""
        if not stat.S_ISLNK(inode.mode) or inode.size > self.block_size:
            raise FormatError("no symbolic link", blob=self.name, got=oct(inode.mode))
        return self.read(inode, 0, inode.size)

    def xattrs(self, inode: Inode) -> list[Pair]:
        """Return the extended attributes."""
        if not inode.xattrs_size:
            return []
        raw = self._read(inode.xattrs_at, inode.xattrs_size)
        _, shared = _XATTRS.unpack_from(raw)
        at = _XATTRS.size
        if at + 4 * shared > len(raw):
            raise FormatError("more shared attributes than fit", blob=self.name, got=shared)
        found = [self._shared_xattr(*struct.unpack_from("<I", raw, at + 4 * index)) for index in range(shared)]
        at += 4 * shared
        while at + _XATTR.size <= len(raw):
            pair, at = self._xattr(raw, at)
            found.append(pair)
        return found

    def read(self, inode: Inode, offset: int, length: int) -> bytes:
        """Return a file's bytes, clipped to its size."""
        return b"".join(self._pieces(inode, offset, max(0, min(length, inode.size - offset))))

    def content(self, inode: Inode) -> Iterator[bytes]:
        """Yield all of a file's bytes in pieces of at most 1 MiB, holes as zeros."""
        yield from self._pieces(inode, 0, inode.size)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _block_entries(self, block: bytes) -> Iterator[tuple[bytes, int, int]]:
        if len(block) < _DIRENT.size:
            raise FormatError("directory block without entries", blob=self.name)
        first = _DIRENT.unpack_from(block)[1]
        if first % _DIRENT.size or not 0 < first <= len(block):
            raise FormatError("damaged directory block", blob=self.name, got=first)
        entries = [_DIRENT.unpack_from(block, at) for at in range(0, first, _DIRENT.size)]
        ends = [entry[1] for entry in entries[1:]] + [len(block)]
        for (number, start, kind, _), end in zip(entries, ends, strict=True):
            name = block[start:end].split(b"\0", 1)[0]
            if not start < end <= len(block) or not name or b"/" in name:
                raise FormatError("damaged directory entry", blob=self.name, got=name[:80])
            yield name, number, kind

    def _pieces(self, inode: Inode, offset: int, length: int) -> Iterator[bytes]:
        at, end = offset, offset + length
        while at < end:
            place, count = self._place(inode, at)
            count = min(count, end - at, _READ)
            yield bytes(count) if place is None else self._read(place, count)
            at += count

    # The place of a file's byte on the disk (None in a hole), and the number of bytes that follow it there.
    def _place(self, inode: Inode, at: int) -> tuple[int | None, int]:
        size = self.block_size
        if inode.layout == _CHUNKED:
            return self._chunk(inode, at)
        if inode.layout == _INLINE:
            tail = inode.size // size * size
            if at >= tail:
                if inode.body % size + inode.size - tail > size:
                    raise FormatError("inline data crosses a block", blob=self.name, offset=inode.body)
                return inode.body + at - tail, inode.size - at
            return inode.start * size + at, tail - at
        return inode.start * size + at, inode.size - at

    def _chunk(self, inode: Inode, at: int) -> tuple[int | None, int]:
        bits = inode.start & _CHUNK_BITS
        chunk = self.block_size << bits
        unit = 8 if inode.start & _CHUNK_INDEXES else 4
        if inode.start & 0xFFFF & ~(_CHUNK_BITS | _CHUNK_INDEXES):
            raise FormatError("chunks of a kind not known here", blob=self.name, got=hex(inode.start))
        entry = -(-inode.body // unit) * unit + at // chunk * unit
        raw = self._read(entry, unit)
        device, block = _CHUNK.unpack(raw)[1:] if unit == 8 else (0, int.from_bytes(raw, "little"))
        left = chunk - at % chunk
        if block == _HOLE:
            return None, left
        if device:
            raise FormatError("data on another device, which is not known here", blob=self.name, got=device)
        return block * self.block_size + at % chunk, left

    def _shared_xattr(self, number: int) -> Pair:
        at = self._shared + 4 * number
        name_size, _, value_size = _XATTR.unpack(self._read(at, _XATTR.size))
        return self._xattr(self._read(at, _XATTR.size + name_size + value_size), 0)[0]

    def _xattr(self, raw: bytes, at: int) -> tuple[Pair, int]:
        name_size, index, value_size = _XATTR.unpack_from(raw, at)
        start = at + _XATTR.size
        end = start + name_size + value_size
        if end > len(raw) or index not in _PREFIXES:
            raise FormatError("damaged or unknown extended attribute", blob=self.name, got=(index, name_size))
        name = _PREFIXES[index] + raw[start : start + name_size]
        return (name, raw[start + name_size : end]), -(-end // 4) * 4

    def _read(self, at: int, length: int) -> bytes:
        if length < 0 or at + length > self._disk.size:
            raise FormatError("place outside the file system", blob=self.name, offset=at, got=length)
        return self._disk.read_at(at, length)
