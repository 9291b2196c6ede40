"""Structures of ext4 on disk: superblock, group descriptors, inodes, extents. Pure: bytes in, values out.

Source: kernel documentation, "ext4 Data Structures and Algorithms". All numbers are little endian.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import TYPE_CHECKING, Self

from obdlab.errors import FormatError
from obdlab.system.superblock import EXT4_MAGIC

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.blob import Buffer

#: Place and size of the superblock.
SUPER_OFFSET = 1024
SUPER_SIZE = 1024
ROOT_INO = 2
FIRST_INO = 11
#: Unit of i_blocks.
SECTOR = 512
#: Longest name.
MAX_NAME = 255
#: Longest initialized extent, which is one block longer than the longest unwritten one.
MAX_EXTENT = 1 << 15
#: Most hard links to one file.
MAX_LINKS = 65000
EXTENT_MAGIC = 0xF30A
EXTENTS_INLINE = 4
#: Where extended attributes in an inode begin, after the fixed fields written here.
EXTRA_ISIZE = 32
GOOD_INODE = 128


class Compat(IntFlag):
    """Features that an older kernel may ignore."""

    EXT_ATTR = 0x8
    RESIZE_INODE = 0x10
    DIR_INDEX = 0x20
    SPARSE_SUPER2 = 0x200


class Incompat(IntFlag):
    """Features that a reader must know."""

    FILETYPE = 0x2
    RECOVER = 0x4
    JOURNAL_DEV = 0x8
    META_BG = 0x10
    EXTENTS = 0x40
    BIT64 = 0x80
    MMP = 0x100
    FLEX_BG = 0x200
    CSUM_SEED = 0x2000
    LARGEDIR = 0x4000


class RoCompat(IntFlag):
    """Features that a writer must know."""

    SPARSE_SUPER = 0x1
    LARGE_FILE = 0x2
    HUGE_FILE = 0x8
    DIR_NLINK = 0x20
    EXTRA_ISIZE = 0x40


class InodeFlag(IntFlag):
    """Flags of one inode."""

    INDEX = 0x1000
    HUGE_FILE = 0x40000
    EXTENTS = 0x80000
    EA_INODE = 0x200000
    INLINE_DATA = 0x10000000


# Plain numbers, here and below: the inverse of an IntFlag has only known bits, but unknown bits are searched for.
#: Readable features. Encryption, inline data, attribute values in inodes of their own and folded names are not.
READABLE = int(
    Incompat.FILETYPE
    | Incompat.META_BG
    | Incompat.EXTENTS
    | Incompat.BIT64
    | Incompat.MMP
    | Incompat.FLEX_BG
    | Incompat.CSUM_SEED
    | Incompat.LARGEDIR
)
#: The features of a file system that obdlab makes.
COMPAT = int(Compat.EXT_ATTR | Compat.DIR_INDEX | Compat.SPARSE_SUPER2)
INCOMPAT = int(Incompat.FILETYPE | Incompat.EXTENTS | Incompat.BIT64 | Incompat.FLEX_BG)
RO_COMPAT = int(
    RoCompat.SPARSE_SUPER | RoCompat.LARGE_FILE | RoCompat.HUGE_FILE | RoCompat.DIR_NLINK | RoCompat.EXTRA_ISIZE
)
#: Features, as (compat, incompat, ro_compat), that a changeable file system may have. obdlab and the original's tools
#: write them (the resize inode's reserved blocks are taken in the bitmaps, and stay as they are).
CHANGEABLE = (COMPAT | int(Compat.RESIZE_INODE), INCOMPAT, RO_COMPAT)
#: Features that a changeable file system must have, since new inodes, directories and descriptors use them.
NEEDED = (
    int(Compat.EXT_ATTR | Compat.DIR_INDEX),
    int(Incompat.FILETYPE | Incompat.EXTENTS | Incompat.BIT64),
    int(RoCompat.LARGE_FILE | RoCompat.HUGE_FILE | RoCompat.DIR_NLINK | RoCompat.EXTRA_ISIZE),
)

_BLOCKS = struct.Struct("<6I")
_FEATURES = struct.Struct("<3I16s")
_GROUP = struct.Struct("<IIIHHHHIHHHHIIIHHHHIHHI")


@dataclass(frozen=True, slots=True)
class Superblock:
    """The fields of the superblock used here; ``raw`` has all."""

    raw: bytes
    inodes: int
    blocks: int
    first_data_block: int
    block_size: int
    blocks_per_group: int
    inodes_per_group: int
    inode_size: int
    compat: int
    incompat: int
    ro_compat: int
    desc_size: int
    hash_seed: tuple[int, int, int, int]
    hash_version: int
    first_meta_bg: int

    @property
    def groups(self) -> int:
        """Number of block groups."""
        return -(-(self.blocks - self.first_data_block) // self.blocks_per_group)

    @classmethod
    def parse(cls, raw: bytes, disk_size: int, name: str = "") -> Self:
        """Read and check a superblock. Raises FormatError if it is malformed or needs unsupported features."""
        if len(raw) != SUPER_SIZE or struct.unpack_from("<H", raw, 56)[0] != EXT4_MAGIC:
            raise FormatError("no ext4 superblock", blob=name, offset=SUPER_OFFSET)

        def number(offset: int) -> int:
            return int.from_bytes(raw[offset : offset + 4], "little")

        def short(offset: int) -> int:
            return int.from_bytes(raw[offset : offset + 2], "little")

        incompat = number(96)
        wide = bool(incompat & Incompat.BIT64)
        dynamic = number(76) >= 1
        found = cls(
            raw=raw,
            inodes=number(0),
            blocks=number(4) | (number(336) << 32 if wide else 0),
            first_data_block=number(20),
            block_size=1024 << min(number(24), 16),
            blocks_per_group=number(32),
            inodes_per_group=number(40),
            inode_size=short(88) if dynamic else GOOD_INODE,
            compat=number(92),
            incompat=incompat,
            ro_compat=number(100),
            desc_size=short(254) if wide else 32,
            hash_seed=struct.unpack_from("<4I", raw, 236),
            hash_version=raw[252],
            first_meta_bg=number(260),
        )
        found._check(disk_size, name)
        return found

    def _check(self, disk_size: int, name: str) -> None:
        def wrong(what: str, got: object, wanted: object = None) -> FormatError:
            return FormatError(f"ext4 superblock: {what}", blob=name, offset=SUPER_OFFSET, got=got, wanted=wanted)

        unknown = self.incompat & ~READABLE
        if unknown & Incompat.RECOVER:
            raise wrong("the journal has not been replayed (mount it once)", hex(self.incompat))
        if unknown:
            raise wrong("features that are not known here", hex(unknown))
        if self.block_size not in (1024, 2048, 4096, 65536, 8192, 16384, 32768):
            raise wrong("block size", self.block_size)
        if not 0 < self.blocks <= disk_size // self.block_size:
            raise wrong("size", f"{self.blocks} blocks", f"at most {disk_size // self.block_size}")
        if not 256 <= self.blocks_per_group <= 8 * self.block_size or self.blocks_per_group % 8:
            raise wrong("blocks per group", self.blocks_per_group)
        if self.first_data_block != (1 if self.block_size == 1024 else 0):
            raise wrong("first data block", self.first_data_block)
        if (
            self.inode_size < GOOD_INODE
            or self.inode_size & (self.inode_size - 1)
            or self.inode_size > self.block_size
        ):
            raise wrong("inode size", self.inode_size)
        if not 0 < self.inodes_per_group <= 8 * self.block_size:
            raise wrong("inodes per group", self.inodes_per_group)
        if self.inodes != self.groups * self.inodes_per_group:
            raise wrong("inodes", self.inodes, self.groups * self.inodes_per_group)
        if self.desc_size not in (32, 64, 128, 256, 512, 1024):
            raise wrong("descriptor size", self.desc_size)

    def with_free(self, free_blocks: int, free_inodes: int) -> bytes:
        """Return the raw superblock with new free counts."""
        raw = bytearray(self.raw)
        struct.pack_into("<II", raw, 12, free_blocks & 0xFFFFFFFF, free_inodes)
        struct.pack_into("<I", raw, 344, free_blocks >> 32)
        return bytes(raw)


@dataclass(slots=True)
class Group:
    """One block group: the places of its bitmaps and inode table, and its free counts."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int
    free_blocks: int
    free_inodes: int
    directories: int

    @classmethod
    def parse(cls, raw: Buffer, offset: int, *, wide: bool) -> Self:
        """Read a descriptor of 64 bytes (``wide``) or 32."""
        if wide:
            f = _GROUP.unpack_from(raw, offset)
            return cls(
                block_bitmap=f[0] | f[12] << 32,
                inode_bitmap=f[1] | f[13] << 32,
                inode_table=f[2] | f[14] << 32,
                free_blocks=f[3] | f[15] << 16,
                free_inodes=f[4] | f[16] << 16,
                directories=f[5] | f[17] << 16,
            )
        return cls(*struct.unpack_from("<IIIHHH", raw, offset))

    def to_bytes(self) -> bytes:
        """Return the 64 bytes; all other fields are zero."""
        low, high = 0xFFFF, 16
        return _GROUP.pack(
            self.block_bitmap & 0xFFFFFFFF, self.inode_bitmap & 0xFFFFFFFF, self.inode_table & 0xFFFFFFFF,
            self.free_blocks & low, self.free_inodes & low, self.directories & low, 0, 0, 0, 0, 0, 0,
            self.block_bitmap >> 32, self.inode_bitmap >> 32, self.inode_table >> 32,
            self.free_blocks >> high, self.free_inodes >> high, self.directories >> high, 0, 0, 0, 0, 0,
        )  # fmt: skip


# mode uid size atime ctime mtime dtime gid links blocks flags version block generation acl size_high faddr
# blocks_high acl_high uid_high gid_high checksum reserved | extra_isize checksum_hi ctime_x mtime_x atime_x crtime
# crtime_x version_hi projid
_INODE = struct.Struct("<HHIIIIIHHIII60sIIIIHHHHHH")
_INODE_EXTRA = struct.Struct("<HHIIIIIII")
# All 256 bytes: the space after the fixed fields is filled up with zeros.
_WHOLE_INODE = struct.Struct(_INODE.format + _INODE_EXTRA.format[1:] + f"{256 - GOOD_INODE - EXTRA_ISIZE}s")
_NS = 1_000_000_000


# Not frozen, here and below: frozen ones take four times as long to make, and there is one for every file.
@dataclass(slots=True)
class Inode:
    """One inode; must not be changed in place. Times in nanoseconds since 1970.

    ``block`` holds the 60 bytes of extents or a short link's text.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    atime_ns: int = 0
    ctime_ns: int = 0
    mtime_ns: int = 0
    links: int = 1
    #: In units of 512 bytes.
    sectors: int = 0
    flags: int = 0
    block: bytes = bytes(60)
    acl_block: int = 0
    #: The bytes after the fixed fields in an inode of 256 bytes: extended attributes.
    tail: bytes = b""

    @property
    def is_directory(self) -> bool:
        """True for a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def rdev(self) -> tuple[int, int]:
        """(major, minor) of a device node."""
        old, new = struct.unpack_from("<II", self.block)
        if old:
            return old >> 8 & 0xFF, old & 0xFF
        return (new & 0xFFF00) >> 8, (new & 0xFF) | (new >> 12 & 0xFFF00)

    @classmethod
    def parse(cls, raw: Buffer, offset: int, size: int) -> Self:
        """Read the inode at ``offset``; ``size`` is that of the file system's inodes."""
        f = _INODE.unpack_from(raw, offset)
        extra = _INODE_EXTRA.unpack_from(raw, offset + GOOD_INODE) if size > GOOD_INODE + _INODE_EXTRA.size else ()
        extra_size = extra[0] if extra else 0
        has_times = extra_size >= 20  # up to atime's
        ctime_x, mtime_x, atime_x = extra[2:5] if has_times else (0, 0, 0)
        tail = b""
        if extra and extra_size % 4 == 0 and GOOD_INODE + extra_size < size:
            tail = bytes(raw[offset + GOOD_INODE + extra_size : offset + size])
        return cls(
            mode=f[0],
            uid=f[1] | f[19] << 16,
            gid=f[7] | f[20] << 16,
            size=f[2] | f[15] << 32,
            atime_ns=_time_ns(f[3], atime_x),
            ctime_ns=_time_ns(f[4], ctime_x),
            mtime_ns=_time_ns(f[5], mtime_x),
            links=f[8],
            sectors=f[9] | f[17] << 32,
            flags=f[10],
            block=f[12],
            acl_block=f[14] | f[18] << 32,
            tail=tail,
        )

    def write_to(self, raw: bytearray | memoryview, offset: int) -> None:
        """Write the 256 bytes at ``offset``. Times out of range are clipped."""
        mtime, mtime_x = _time_fields(self.mtime_ns)
        atime, atime_x = (mtime, mtime_x) if self.atime_ns == self.mtime_ns else _time_fields(self.atime_ns)
        ctime, ctime_x = (mtime, mtime_x) if self.ctime_ns == self.mtime_ns else _time_fields(self.ctime_ns)
        _WHOLE_INODE.pack_into(
            raw, offset,
            self.mode, self.uid & 0xFFFF, self.size & 0xFFFFFFFF, atime, ctime, mtime, 0, self.gid & 0xFFFF,
            self.links, self.sectors & 0xFFFFFFFF, self.flags, 0, self.block, 0, self.acl_block & 0xFFFFFFFF,
            self.size >> 32, 0, self.sectors >> 32, self.acl_block >> 32, self.uid >> 16, self.gid >> 16, 0, 0,
            EXTRA_ISIZE, 0, ctime_x, mtime_x, atime_x, 0, 0, 0, 0, self.tail,
        )  # fmt: skip

    def changed(self, **fields: object) -> Inode:
        """Return a copy with these fields replaced."""
        return replace(self, **fields)  # type: ignore[arg-type]


def _time_ns(seconds: int, extra: int) -> int:
    signed = seconds - (1 << 32) if seconds & 1 << 31 else seconds
    return (signed + ((extra & 3) << 32)) * _NS + min(extra >> 2, _NS - 1)


def _time_fields(time_ns: int) -> tuple[int, int]:
    seconds, rest = divmod(time_ns, _NS)
    if not -(1 << 31) <= seconds < 3 * (1 << 32) + (1 << 31):
        seconds, rest = (-(1 << 31), 0) if seconds < 0 else (3 * (1 << 32) + (1 << 31) - 1, 0)
    low = seconds & 0xFFFFFFFF
    signed = low - (1 << 32) if low & 1 << 31 else low
    return low, ((seconds - signed) >> 32 & 3) | rest << 2


def device_block(major: int, minor: int) -> bytes:
    """Return the ``block`` of a device node's inode."""
    if major < 256 and minor < 256:
        fields = (major << 8 | minor, 0)
    else:
        fields = (0, (minor & 0xFF) | major << 8 | (minor & 0xFFF00) << 12)
    return struct.pack("<II", *fields).ljust(60, b"\0")


@dataclass(slots=True)
class Extent:
    """``length`` blocks of a file from ``logical`` on, at ``physical`` on the disk. ``unwritten``: read as zeros."""

    logical: int
    length: int
    physical: int
    unwritten: bool = False


_NODE = struct.Struct("<HHHHI")
_EXTENT = struct.Struct("<IHHI")
_INDEX = struct.Struct("<IIHH")


def parse_node(raw: Buffer, name: str = "") -> tuple[int, list[Extent], list[tuple[int, int]]]:
    """Read a node of an extent tree: depth; extents if depth is 0; else (first logical block, child block) pairs.

    Raises FormatError.
    """
    magic, entries, _, depth, _ = _NODE.unpack_from(raw)
    if magic != EXTENT_MAGIC or 12 + 12 * entries > len(raw) or depth > 5:
        raise FormatError("damaged extent tree", blob=name, got=f"magic {magic:#x}, {entries} entries, depth {depth}")
    if depth:
        return (
            depth,
            [],
            [
                (logical, low | high << 32)
                for logical, low, high, _ in _INDEX.iter_unpack(bytes(raw[12 : 12 + 12 * entries]))
            ],
        )
    found = []
    for logical, length, high, low in _EXTENT.iter_unpack(bytes(raw[12 : 12 + 12 * entries])):
        unwritten = length > MAX_EXTENT
        found.append(Extent(logical, length - MAX_EXTENT if unwritten else length, low | high << 32, unwritten))
    return 0, found, []


def extent_node(extents: Sequence[Extent], size: int) -> bytes:
    """Return a leaf of ``size`` bytes (60 in an inode)."""
    body = b"".join(_EXTENT.pack(e.logical, e.length, e.physical >> 32, e.physical & 0xFFFFFFFF) for e in extents)
    return (_NODE.pack(EXTENT_MAGIC, len(extents), (size - 12) // 12, 0, 0) + body).ljust(size, b"\0")


def index_node(children: list[tuple[int, int]], depth: int, size: int) -> bytes:
    """Return an inner node over (first logical block, block of the child)."""
    body = b"".join(_INDEX.pack(logical, block & 0xFFFFFFFF, block >> 32, 0) for logical, block in children)
    return (_NODE.pack(EXTENT_MAGIC, len(children), (size - 12) // 12, depth, 0) + body).ljust(size, b"\0")
