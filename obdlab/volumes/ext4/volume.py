"""Reading an ext4 file system from a blob, without a mount."""

from __future__ import annotations

import stat
import struct
from typing import TYPE_CHECKING

import numpy as np

from obdlab.errors import FormatError
from obdlab.volumes.ext4 import directory, xattr
from obdlab.volumes.ext4.layout import (
    ROOT_INO,
    SUPER_OFFSET,
    SUPER_SIZE,
    Extent,
    Group,
    Incompat,
    Inode,
    InodeFlag,
    RoCompat,
    Superblock,
    parse_node,
)
from obdlab.volumes.tree import MAX_NAMES, MAX_PIECES, FileTree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.blob import Blob

_READ = 1 << 20
# Blocks of metadata kept: inodes of one block are mostly read one after another.
_RECENT = 1024
# Bounds on memory for a hostile file system: blocks of one directory, and of a file's extent tree.
_MAX_DIRECTORY = 256 << 20
_MAX_EXTENT_NODES = 1 << 16
# Bound on the work for a block map: block numbers of one file, those of blocks that are read twice counted twice.
_MAX_MAP_NUMBERS = 1 << 26


class Volume(FileTree[Inode]):
    """An ext4 file system for reading. Inodes are known by number; names are bytes.

    Every method raises FormatError if the file system is damaged or of an unsupported kind, and passes on errors of
    the blob.
    """

    def __init__(self, disk: Blob) -> None:
        if disk.size < SUPER_OFFSET + SUPER_SIZE:
            raise FormatError("too small for ext4", blob=disk.name, got=disk.size)
        self.name = disk.name
        self._disk = disk
        self._recent: dict[int, bytes] = {}
        self._recent_groups: dict[int, Group] = {}
        raw = disk.read_at(SUPER_OFFSET, SUPER_SIZE)
        self.superblock = Superblock.parse(raw, disk.size, disk.name)
        self.block_size = self.superblock.block_size

    @property
    def root(self) -> int:
        """Number of the root directory."""
        return ROOT_INO

    def inode(self, number: int) -> Inode:
        """Return an inode; an unused one has mode 0."""
        block, offset = self._place(number)
        return Inode.parse(self._metadata(block), offset, self.superblock.inode_size)

    def entries(self, number: int) -> dict[bytes, tuple[int, int]]:
        """Return a directory's names, with inode number and type, without "." and ".."."""
        found = {}
        for block in self._directory_blocks(number):
            for name, inode, kind in directory.parse_block(block, self.name):
                if name not in (b".", b".."):
                    found[name] = (inode, kind)
            if len(found) > MAX_NAMES:
                raise FormatError(f"directory {number} has too many names", blob=self.name, wanted=MAX_NAMES)
        return found

    # Inodes that share blocks would make an endless walk.
    def identity(self, number: int, directory: Inode) -> int:
        """Return the number of the directory's first block."""
        return self._block_numbers(directory)[0]

    def readlink(self, inode: Inode) -> bytes:
        """Return a symbolic link's text."""
        if not stat.S_ISLNK(inode.mode) or inode.size > self.block_size:
            raise FormatError("no symbolic link", blob=self.name, got=oct(inode.mode))
        return inode.block[: inode.size] if self._is_kept_link(inode) else self.read(inode, 0, inode.size)

    # A short link has its text in place of its block addresses.
    @staticmethod
    def _is_kept_link(inode: Inode) -> bool:
        return stat.S_ISLNK(inode.mode) and inode.size < len(inode.block) and not inode.flags & InodeFlag.EXTENTS

    def xattrs(self, inode: Inode) -> list[xattr.Pair]:
        """Return the extended attributes."""
        found = xattr.parse_inline(inode.tail, self.name)
        if inode.acl_block:
            self._check_block(inode.acl_block)
            found += xattr.parse_block(self._metadata(inode.acl_block), self.name)
        return found

    def has_block_map(self, inode: Inode) -> bool:
        """Return True if the inode maps its content with ext2's block map, not with extents."""
        holds = stat.S_ISREG(inode.mode) or inode.is_directory or stat.S_ISLNK(inode.mode)
        mapped = holds and not inode.flags & (InodeFlag.EXTENTS | InodeFlag.INLINE_DATA)
        return mapped and not self._is_kept_link(inode) and any(inode.block)

    def places(self, inode: Inode) -> Iterator[tuple[int, int, int]]:
        """Yield (offset in the file, length, offset on the disk) of a file's or directory's data, in bytes.

        Holes and content inside the inode are left out.
        """
        if inode.flags & InodeFlag.INLINE_DATA or self._is_kept_link(inode):
            return
        size = self.block_size
        for extent in self.extents(inode):
            if not extent.unwritten:
                yield extent.logical * size, extent.length * size, extent.physical * size

    def extents(self, inode: Inode) -> list[Extent]:
        """Return the extents of a file or directory, in order; the gaps between them are holes."""
        if inode.flags & InodeFlag.INLINE_DATA:
            raise FormatError("inline data is not known here", blob=self.name)
        if not inode.flags & InodeFlag.EXTENTS:
            return self._mapped_blocks(inode)
        found: list[Extent] = []
        end = nodes = 0
        pending: list[tuple[bytes | bytearray, int | None]] = [(inode.block, None)]
        while pending:
            raw, expected_depth = pending.pop()
            depth, extents, children = parse_node(raw, self.name)
            nodes += len(children)
            if expected_depth not in (None, depth) or nodes > _MAX_EXTENT_NODES:
                raise FormatError("damaged extent tree", blob=self.name, got=f"depth {depth}, {nodes} nodes")
            for extent in extents:
                self._check_block(extent.physical, extent.length)
                if extent.logical < end or not extent.length:
                    raise FormatError("extents overlap", blob=self.name, got=extent)
                end = extent.logical + extent.length
            found += extents
            if len(found) > MAX_PIECES:
                raise FormatError("file in too many pieces", blob=self.name, wanted=f"at most {MAX_PIECES}")
            for _, block in reversed(children):
                self._check_block(block)
                pending.append((self._metadata(block), depth - 1))
        return found

    def read(self, inode: Inode, offset: int, length: int) -> bytes:
        """Return a file's bytes, clipped to its size."""
        length = max(0, min(length, inode.size - offset))
        return b"".join(self._pieces(inode, offset, length))

    def content(self, inode: Inode) -> Iterator[bytes]:
        """Yield all of a file's bytes in pieces of at most 1 MiB, holes as zeros."""
        yield from self._pieces(inode, 0, inode.size)

    def free_blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the runs (first, count) of unused blocks, group by group."""
        superblock = self.superblock
        for number in range(superblock.groups):
            group = self._group(number)
            first = superblock.first_data_block + number * superblock.blocks_per_group
            count = min(superblock.blocks_per_group, superblock.blocks - first)
            if group.free_blocks == 0:
                continue
            if group.free_blocks == count:
                yield first, count
                continue
            self._check_block(group.block_bitmap)
            raw = np.frombuffer(self._disk.read_at(group.block_bitmap * self.block_size, self.block_size), np.uint8)
            bits = np.unpackbits(raw, bitorder="little")[:count]
            edges = np.flatnonzero(np.diff(bits, prepend=1, append=1)).tolist()
            for begin, end in zip(edges[::2], edges[1::2], strict=True):
                yield first + begin, end - begin

    # -- inside ------------------------------------------------------------------------------------------------------

    def _pieces(self, inode: Inode, offset: int, length: int) -> Iterator[bytes]:
        size = self.block_size
        at, end = offset, offset + length
        for extent in self.extents(inode):
            first, last = extent.logical * size, (extent.logical + extent.length) * size
            if last <= at or extent.unwritten:
                continue
            yield from _zeros(min(first, end) - at)
            at = max(at, min(first, end))
            while at < min(last, end):
                count = min(min(last, end) - at, _READ)
                yield self._disk.read_at(extent.physical * size + at - first, count)
                at += count
        yield from _zeros(end - at)

    def _mapped_blocks(self, inode: Inode) -> list[Extent]:
        # ext2's block map: twelve blocks, then blocks of block numbers, one to three deep.
        size = self.block_size
        wanted = min(-(-inode.size // size), 1 << 32)
        numbers = struct.unpack("<15I", inode.block)
        found: list[Extent] = []
        logical = 0
        nodes = iter(range(_MAX_MAP_NUMBERS // (size // 4)))
        for place, number in enumerate(numbers):
            if logical >= wanted:
                break
            logical = self._descend(number, max(0, place - 11), logical, wanted, found, nodes)
        return found

    def _descend(
        self, number: int, depth: int, logical: int, wanted: int, found: list[Extent], nodes: Iterator[int]
    ) -> int:
        span: int = (self.block_size // 4) ** depth
        if number == 0:
            return logical + span
        self._check_block(number)
        if len(found) > MAX_PIECES:
            raise FormatError("file in too many pieces", blob=self.name, wanted=f"at most {MAX_PIECES}")
        if depth == 0:
            last = found[-1] if found else None
            if last and last.logical + last.length == logical and last.physical + last.length == number:
                found[-1] = Extent(last.logical, last.length + 1, last.physical)
            else:
                found.append(Extent(logical, 1, number))
            return logical + 1
        if next(nodes, None) is None:
            raise FormatError("block map with too many nodes", blob=self.name, wanted=f"{_MAX_MAP_NUMBERS} numbers")
        raw = self._metadata(number)
        for at in range(0, len(raw), 4):
            if logical >= wanted:
                break
            child = int.from_bytes(raw[at : at + 4], "little")
            logical = self._descend(child, depth - 1, logical, wanted, found, nodes)
        return logical

    def _directory_blocks(self, number: int) -> Iterator[bytes | bytearray]:
        inode = self.inode(number)
        if not inode.is_directory:
            raise FormatError(f"inode {number} is no directory", blob=self.name, got=oct(inode.mode))
        if inode.size > _MAX_DIRECTORY or inode.size % self.block_size:
            raise FormatError(f"directory {number} has an impossible size", blob=self.name, got=inode.size)
        return map(self._metadata, self._block_numbers(inode))

    def _block_numbers(self, inode: Inode) -> list[int]:
        wanted = inode.size // self.block_size
        extents = self.extents(inode)
        if sum(extent.length for extent in extents) != wanted:
            raise FormatError("directory with a hole, or with blocks past its end", blob=self.name, wanted=wanted)
        found = [block for e in extents for block in range(e.physical, e.physical + e.length)]
        if not wanted or len(set(found)) != len(found):
            raise FormatError("directory without a block, or with one twice", blob=self.name, got=wanted)
        return found

    def _metadata(self, block: int) -> bytes | bytearray:
        found = self._recent.get(block)
        if found is None:
            if len(self._recent) >= _RECENT:
                self._recent.clear()
            found = self._recent[block] = self._disk.read_at(block * self.block_size, self.block_size)
        return found

    def _place(self, number: int) -> tuple[int, int]:
        # Returns the block of an inode, and the offset in it.
        if not 0 < number <= self.superblock.inodes:
            raise FormatError("no such inode", blob=self.name, got=number, wanted=f"1 to {self.superblock.inodes}")
        group, index = divmod(number - 1, self.superblock.inodes_per_group)
        block, offset = divmod(index * self.superblock.inode_size, self.block_size)
        return self._group(group).inode_table + block, offset

    def _check_block(self, block: int, length: int = 1) -> None:
        if not 0 < block <= block + length <= self.superblock.blocks:
            raise FormatError("block outside the file system", blob=self.name, got=(block, length))

    # Read on demand: a disk of 2 PiB, all zeros except for its superblock, has 16 million of them.
    def _group(self, number: int) -> Group:
        found = self._recent_groups.get(number)
        if found is None:
            if len(self._recent_groups) >= _RECENT:
                self._recent_groups.clear()
            found = self._recent_groups[number] = self._read_group(number)
        return found

    def _read_group(self, number: int) -> Group:
        superblock = self.superblock
        per_block = self.block_size // superblock.desc_size
        block, index = divmod(number, per_block)
        raw = self._metadata(self._descriptor_block(block, per_block))
        group = Group.parse(raw, index * superblock.desc_size, wide=superblock.desc_size >= 64)
        self._check_block(
            group.inode_table, -(-superblock.inodes_per_group * superblock.inode_size // self.block_size)
        )
        return group

    def _descriptor_block(self, number: int, per_block: int) -> int:
        superblock = self.superblock
        if not superblock.incompat & Incompat.META_BG or number < superblock.first_meta_bg:
            return superblock.first_data_block + 1 + number
        first = number * per_block
        has_super = first == 0 or not superblock.ro_compat & RoCompat.SPARSE_SUPER or _is_sparse_backup(first)
        return superblock.first_data_block + first * superblock.blocks_per_group + int(has_super)


def _is_sparse_backup(group: int) -> bool:
    for base in (3, 5, 7):
        power = base
        while power < group:
            power *= base
        if power == group:
            return True
    return group <= 1


def _zeros(length: int) -> Iterator[bytes]:
    while length > 0:
        yield bytes(min(length, _READ))
        length -= _READ
