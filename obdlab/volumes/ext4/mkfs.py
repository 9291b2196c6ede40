"""An empty ext4, with the same bytes for the same size everywhere.

Its layout serves reading over a network: no journal, all metadata packed at the front (one flex group, no backups of
superblock and descriptors in between), inode tables left unwritten, since they read as zeros. UUID and hash seed are
fixed, so that converted images do not differ by them.
"""

from __future__ import annotations

import struct
import uuid
from typing import TYPE_CHECKING

from obdlab.errors import FormatError
from obdlab.system.superblock import EXT4_MAGIC
from obdlab.volumes.ext4 import directory
from obdlab.volumes.ext4.layout import (
    COMPAT,
    EXTRA_ISIZE,
    FIRST_INO,
    INCOMPAT,
    RO_COMPAT,
    ROOT_INO,
    SUPER_OFFSET,
    SUPER_SIZE,
    Extent,
    Group,
    Inode,
    InodeFlag,
    extent_node,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.blob import WritableBlob

BLOCK = 4096
#: Bytes of the disk per inode.
INODE_RATIO = 16384
#: Smallest size; below it metadata would not leave room.
MIN_SIZE = 1 << 20
MAX_SIZE = 16 << 40
_PER_GROUP = 8 * BLOCK
_INODE_SIZE = 256
_UUID = uuid.UUID("6f62646c-6162-4d69-8d61-6765732d6f31")
# 2^20 groups, more than any image has, so all are in one flex group.
_LOG_FLEX = 20
_SIGNED_HASH = 1
_ACL_AND_USER_XATTR = 0xC


def make_filesystem(disk: WritableBlob, size: int | None = None, *, inode_ratio: int = INODE_RATIO) -> None:
    """Write an empty file system of ``size`` bytes (default: all) to a disk that reads as zeros.

    The root directory belongs to root, has mode 0755 and is empty, without even lost+found. Raises FormatError for an
    unsupported size.
    """
    blocks = (disk.size if size is None else size) // BLOCK
    if not MIN_SIZE <= blocks * BLOCK <= min(MAX_SIZE, disk.size):
        raise FormatError("no size for ext4", blob=disk.name, got=blocks * BLOCK, wanted=f"{MIN_SIZE} to {MAX_SIZE}")
    shape = _Shape(blocks, inode_ratio)
    if shape.metadata_end + 1 >= blocks:
        raise FormatError("metadata leaves no room", blob=disk.name, got=blocks, wanted=shape.metadata_end + 2)
    root = shape.metadata_end
    head = _superblock(shape) + shape.descriptors()
    disk.write_at(SUPER_OFFSET, head[:SUPER_SIZE].ljust(BLOCK - SUPER_OFFSET, b"\0") + head[SUPER_SIZE:])
    disk.write_at(shape.block_bitmaps * BLOCK, shape.block_bitmap_bytes())
    disk.write_at(shape.inode_bitmaps * BLOCK, shape.inode_bitmap_bytes())
    inode = bytearray(BLOCK)
    Inode(
        mode=0o40755,
        links=2,
        size=BLOCK,
        sectors=BLOCK // 512,
        flags=InodeFlag.EXTENTS,
        block=extent_node([Extent(0, 1, root)], 60),
    ).write_to(inode, (ROOT_INO - 1) * _INODE_SIZE)
    disk.write_at(shape.inode_tables * BLOCK, inode)
    dots = [(b".", ROOT_INO, directory.DIRECTORY), (b"..", ROOT_INO, directory.DIRECTORY)]
    disk.write_at(root * BLOCK, directory.pack_block(dots, BLOCK))


class _Shape:
    # The place of each structure, in blocks.
    def __init__(self, blocks: int, inode_ratio: int) -> None:
        groups = -(-blocks // _PER_GROUP)
        per_block = BLOCK // _INODE_SIZE
        wanted = max(blocks * BLOCK // inode_ratio // groups, per_block)
        # Rounded to whole blocks of the table, which are whole bytes of the bitmap too.
        self.inodes_per_group = min(-(-wanted // per_block) * per_block, _PER_GROUP)
        self.blocks, self.groups = blocks, groups
        self.table_blocks = self.inodes_per_group // per_block
        self.block_bitmaps = 1 + -(-groups * 64 // BLOCK)
        self.inode_bitmaps = self.block_bitmaps + groups
        self.inode_tables = self.inode_bitmaps + groups
        self.metadata_end = self.inode_tables + groups * self.table_blocks

    @property
    def used_blocks(self) -> int:
        return self.metadata_end + 1  # and the root directory's

    @property
    def inodes(self) -> int:
        return self.groups * self.inodes_per_group

    def descriptors(self) -> bytes:
        packed = bytearray()
        for number in range(self.groups):
            first = number * _PER_GROUP
            size = min(_PER_GROUP, self.blocks - first)
            used = max(0, min(size, self.used_blocks - first))
            packed += Group(
                block_bitmap=self.block_bitmaps + number,
                inode_bitmap=self.inode_bitmaps + number,
                inode_table=self.inode_tables + number * self.table_blocks,
                free_blocks=size - used,
                free_inodes=self.inodes_per_group - (FIRST_INO - 1 if number == 0 else 0),
                directories=int(number == 0),
            ).to_bytes()
        return bytes(packed)

    def block_bitmap_bytes(self) -> bytes:
        # Blocks past the end count as used.
        return _bits(self.groups * _PER_GROUP, [(0, self.used_blocks), (self.blocks, self.groups * _PER_GROUP)])

    def inode_bitmap_bytes(self) -> bytes:
        beyond = (self.inodes_per_group, _PER_GROUP)
        first, others = _bits(_PER_GROUP, [(0, FIRST_INO - 1), beyond]), _bits(_PER_GROUP, [beyond])
        return first + others * (self.groups - 1)


def _bits(count: int, ones: Sequence[tuple[int, int]]) -> bytes:
    # Returns a bitmap with these ranges set.
    found = bytearray(count // 8)
    for begin, end in ones:
        first, last = min(-(-begin // 8) * 8, end), max(begin, end // 8 * 8)
        for bit in {*range(begin, first), *range(max(last, first), end)}:
            found[bit // 8] |= 1 << bit % 8
        if first < last:
            found[first // 8 : last // 8] = b"\xff" * ((last - first) // 8)
    return bytes(found)


def _superblock(shape: _Shape) -> bytes:
    raw = bytearray(SUPER_SIZE)
    free = shape.blocks - shape.used_blocks
    pack = struct.pack_into
    pack(
        "<6I", raw, 0, shape.inodes, shape.blocks & 0xFFFFFFFF, 0, free & 0xFFFFFFFF, shape.inodes - FIRST_INO + 1, 0
    )
    pack("<5I", raw, 24, 2, 2, _PER_GROUP, _PER_GROUP, shape.inodes_per_group)
    # Never mounted, no check by mount count; clean; after errors the kernel continues.
    pack("<HHHHH", raw, 52, 0, 0xFFFF, EXT4_MAGIC, 1, 1)
    pack("<I", raw, 76, 1)
    pack("<IH", raw, 84, FIRST_INO, _INODE_SIZE)
    pack("<3I", raw, 92, COMPAT, INCOMPAT, RO_COMPAT)
    raw[104:120] = _UUID.bytes
    raw[236:252] = _UUID.bytes
    pack("<BBHI", raw, 252, directory.HALF_MD4, 0, 64, _ACL_AND_USER_XATTR)
    pack("<3I", raw, 336, shape.blocks >> 32, 0, free >> 32)
    pack("<HHI", raw, 348, EXTRA_ISIZE, EXTRA_ISIZE, _SIGNED_HASH)
    raw[372] = _LOG_FLEX
    return bytes(raw)
