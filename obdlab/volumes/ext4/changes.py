"""Blocks of an ext4 file system being changed: taking and freeing, metadata in memory, writing of content.

This module knows only blocks; :mod:`obdlab.volumes.ext4.editor` knows names and inodes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, cast

from obdlab.errors import FormatError
from obdlab.volumes.blockranges import sectors_of_blocks
from obdlab.volumes.ext4 import directory
from obdlab.volumes.ext4.allocator import Allocator
from obdlab.volumes.ext4.layout import (
    CHANGEABLE,
    EXTENTS_INLINE,
    MAX_EXTENT,
    NEEDED,
    SUPER_OFFSET,
    Extent,
    Group,
    Inode,
    InodeFlag,
    extent_node,
    index_node,
    parse_node,
)
from obdlab.volumes.ext4.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from obdlab.blob import Buffer, WritableBlob
    from obdlab.layers.ordering import SectorRange
    from obdlab.layers.targetdisk import TargetDisk

INODE_SIZE = 256
_LAST_ORPHAN = 232
_FLAGS = 352
_UNSIGNED_HASH = 2
# Blocks of metadata held in memory; above this they are written early.
_MOST_HELD = 16384
# 16 TiB of groups as mkfs makes them, 40 MB in memory; overlaybd devices have 64 GiB.
_MOST_GROUPS = 1 << 17
#: Most blocks of a file, holes included.
MOST_BLOCKS = (1 << 32) - 1
# Size of the buffer of adjacent writes, one for all: fresh memory for each would cost as much as the copy.
_GATHERED = 4 << 20


class Gathered:
    """A disk written in large pieces: most files are small, and lie side by side.

    Unflushed bytes cannot be read back from the disk.
    """

    def __init__(self, disk: WritableBlob) -> None:
        self._disk = disk
        self._space = memoryview(bytearray(_GATHERED))
        self._begin = 0  # offset on the disk
        self._used = 0

    def write(self, offset: int, data: Buffer) -> None:
        """Write bytes (items of one byte), now or later."""
        length = len(data)
        used = self._used
        if offset != self._begin + used or used + length > _GATHERED:
            self.flush()
            if length > _GATHERED:
                self._disk.write_at(offset, data)
                return
            self._begin, used = offset, 0
        self._space[used : used + length] = data
        self._used = used + length

    def flush(self) -> None:
        """Write the gathered bytes."""
        if self._used:
            self._disk.write_at(self._begin, self._space[: self._used])
            self._begin += self._used
            self._used = 0


class Changes(Volume):
    """An ext4 file system whose changed metadata is in memory until :meth:`write_out`; content is written at once.

    Raises FormatError for a file system that is damaged or differs from those of
    :func:`~obdlab.volumes.ext4.mkfs.make_filesystem` and the original's tools, and OSError (ENOSPC) if it is full.
    """

    def __init__(self, disk: WritableBlob) -> None:
        super().__init__(disk)
        self._target = disk
        superblock = self.superblock
        self._check_writable()
        if superblock.groups > _MOST_GROUPS:
            raise FormatError("ext4 too large to be changed", blob=disk.name, got=f"{superblock.groups} groups")
        self._cache: dict[int, bytearray] = {}
        groups = self._groups = [self._read_group(number) for number in range(superblock.groups)]
        self.blocks = Allocator(
            superblock.blocks, superblock.blocks_per_group, [group.free_blocks for group in groups],
            _loader(disk, self.block_size, [group.block_bitmap for group in groups]), self.name,
        )  # fmt: skip
        self.inodes = Allocator(
            superblock.inodes, superblock.inodes_per_group, [group.free_inodes for group in groups],
            _loader(disk, self.block_size, [group.inode_bitmap for group in groups]), self.name,
        )  # fmt: skip
        self._dirty: set[int] = set()
        self._written: set[int] = set()
        self._gathered = Gathered(disk)

    # -- content -----------------------------------------------------------------------------------------------------

    def write_pieces(self, runs: Sequence[tuple[int, int]], pieces: Iterable[tuple[int, Buffer]]) -> None:
        """Write contiguous bytes into runs of blocks (first, length); the rest of the last block becomes zeros."""
        size = self.block_size
        write = self._gathered.write
        places = iter(runs)
        at = end = 0
        for _, piece in pieces:
            if len(piece) <= end - at:
                write(at, piece)
                at += len(piece)
                continue
            view = memoryview(piece)
            while view:
                if at == end:
                    first, length = next(places)
                    at, end = first * size, (first + length) * size
                part = view[: end - at]
                write(at, part)
                at += len(part)
                view = view[len(part) :]
        if at % size:
            write(at, bytes(-at % size))

    def map_runs(self, runs: Sequence[tuple[int, int]], size: int, place: int) -> None:
        """Map runs of blocks (first, length) to ``size`` bytes of the target from ``place`` on, in whole sectors.

        The disk must be a :class:`~obdlab.layers.targetdisk.TargetDisk`.
        """
        disk = cast("TargetDisk", self._target)
        self._gathered.flush()  # it may hold what these blocks were before
        for first, length in runs:
            mapped = min(size, length * self.block_size)
            if mapped:
                disk.map_at(first * self.block_size, mapped, place)
            size -= mapped
            place += mapped

    def write_sparse(self, pieces: Iterable[tuple[int, Buffer]]) -> list[Extent]:
        """Write (offset, bytes), ascending, into blocks taken only where there are bytes. Returns the extents."""
        size = self.block_size
        extents: list[Extent] = []
        block, content = -1, bytearray()

        def store() -> None:
            if block >= 0:
                physical = self.blocks.take(1)[0][0]
                self._gathered.write(physical * size, content)
                append_extent(extents, Extent(block, 1, physical))

        for offset, piece in pieces:
            view = memoryview(piece)
            while view:
                number, start = divmod(offset, size)
                if number != block:
                    store()
                    block, content = number, bytearray(size)
                part = view[: size - start]
                content[start : start + len(part)] = part
                offset += len(part)
                view = view[len(part) :]
        store()
        return extents

    def _pieces(self, inode: Inode, offset: int, length: int) -> Iterator[bytes]:
        self._gathered.flush()
        return super()._pieces(inode, offset, length)

    # -- blocks ------------------------------------------------------------------------------------------------------

    def extent_tree(self, extents: Sequence[Extent]) -> tuple[bytes, int]:
        """Return the inode's 60 bytes, and the number of blocks the tree takes beside them."""
        if len(extents) <= EXTENTS_INLINE:
            return extent_node(extents, 60), 0
        per_node = (self.block_size - 12) // 12
        level = []
        nodes = 0
        for at in range(0, len(extents), per_node):
            group = extents[at : at + per_node]
            level.append((group[0].logical, self.new_block(extent_node(group, self.block_size))))
        depth = 1
        nodes += len(level)
        while len(level) > EXTENTS_INLINE:
            parts = [level[at : at + per_node] for at in range(0, len(level), per_node)]
            level = [(part[0][0], self.new_block(index_node(part, depth, self.block_size))) for part in parts]
            depth += 1
            nodes += len(level)
        return index_node(level, depth, 60), nodes

    def new_block(self, content: bytes) -> int:
        """Take a block for metadata and return its number."""
        block = self.blocks.take(1)[0][0]
        self.replace(block, content)
        return block

    def free_block(self, block: int) -> None:
        """Free a block of metadata."""
        self.blocks.give_back(block, 1)
        self._cache.pop(block, None)
        self._dirty.discard(block)
        self._written.discard(block)

    def free_tree(self, inode: Inode) -> None:
        """Free the blocks of an extent tree, not those it maps. Raises FormatError for a block map."""
        if not inode.flags & InodeFlag.EXTENTS:
            raise FormatError("ext4 file with a block map, not extents, cannot be changed here", blob=self.name)
        pending: list[Buffer] = [inode.block]
        while pending:
            _, _, children = parse_node(pending.pop(), self.name)
            for _, block in children:
                pending.append(bytes(self._metadata(block)))
                self.free_block(block)

    def free_xattr_block(self, block: int) -> None:
        """Drop one use of a block of extended attributes, and free it after the last."""
        # The kernel shares these blocks; obdlab does not.
        self._check_block(block)
        users = struct.unpack_from("<I", self._metadata(block), 4)[0]
        if users > 1:
            struct.pack_into("<I", self.writable(block), 4, users - 1)
        else:
            self.free_block(block)

    # -- metadata ----------------------------------------------------------------------------------------------------

    def block(self, number: int) -> bytes | bytearray:
        """Return a block of metadata in its current state."""
        return self._metadata(number)

    def writable(self, block: int) -> bytearray:
        """Return a block of metadata for changing it."""
        found = self._cache.get(block)
        if found is None:
            if len(self._cache) >= _MOST_HELD:
                self._write_dirty()
                self._cache.clear()
            found = self._cache[block] = bytearray(self._disk.read_at(block * self.block_size, self.block_size))
        self._dirty.add(block)
        return found

    def replace(self, block: int, content: bytes) -> None:
        """Replace the content of a block, filled up with zeros."""
        if len(self._cache) >= _MOST_HELD and block not in self._cache:
            self._write_dirty()
            self._cache.clear()
        self._cache[block] = bytearray(content.ljust(self.block_size, b"\0"))
        self._dirty.add(block)

    def write_out(self) -> None:
        """Write all changes, metadata in the order of the disk, the superblock last."""
        self._gathered.flush()
        for group, bits in self.blocks.changed():
            self.replace(self._groups[group].block_bitmap, bits)
        for group, bits in self.inodes.changed():
            self.replace(self._groups[group].inode_bitmap, bits)
        self._write_groups()
        self._write_dirty()
        self._target.write_at(SUPER_OFFSET, self.superblock.with_free(self.blocks.left, self.inodes.left))

    def metadata(self) -> list[SectorRange]:
        """Return the sectors that were written and that mounting and walking read, after :meth:`write_out`.

        These are superblock, group descriptors, inode tables, directories, extent nodes and attributes, in the order
        of the disk. Bitmaps are left out: only writing reads them.
        """
        first = self.superblock.first_data_block
        descriptors = -(-len(self._groups) * self.superblock.desc_size // self.block_size)
        bitmaps = {block for group in self._groups for block in (group.block_bitmap, group.inode_bitmap)}
        return sectors_of_blocks((self._written | {*range(first + 1 + descriptors)}) - bitmaps, self.block_size)

    def _write_dirty(self) -> None:
        for block in sorted(self._dirty):
            self._gathered.write(block * self.block_size, self._cache[block])
        self._gathered.flush()
        self._recent.clear()
        self._written |= self._dirty
        self._dirty.clear()

    def _group(self, number: int) -> Group:
        return self._groups[number]

    def _metadata(self, block: int) -> bytes | bytearray:
        return self._cache.get(block) or super()._metadata(block)

    def _write_groups(self) -> None:
        per_block = self.block_size // self.superblock.desc_size
        for number, group in enumerate(self._groups):
            group.free_blocks, group.free_inodes = self.blocks.free[number], self.inodes.free[number]
            block, index = divmod(number, per_block)
            where = self.superblock.first_data_block + 1 + block
            offset, content = index * self.superblock.desc_size, group.to_bytes()
            if self._metadata(where)[offset : offset + 64] != content:
                self.writable(where)[offset : offset + 64] = content

    def _check_writable(self) -> None:
        found = self.superblock
        features = (found.compat, found.incompat, found.ro_compat)
        unknown = [got & ~known for got, known in zip(features, CHANGEABLE, strict=True)]
        if any(unknown):
            raise FormatError(
                "ext4 with features that cannot be changed here", blob=self.name, got=_feature_text(unknown)
            )
        missing = [needed & ~got for got, needed in zip(features, NEEDED, strict=True)]
        if any(missing):
            raise FormatError(
                "ext4 lacks features that changing it needs", blob=self.name, wanted=_feature_text(missing)
            )
        sizes = (found.block_size, found.inode_size, found.desc_size)
        if sizes != (4096, INODE_SIZE, 64):
            raise FormatError(
                "ext4 cannot be changed with these sizes of block, inode, descriptor", blob=self.name, got=sizes,
                wanted=(4096, INODE_SIZE, 64),
            )  # fmt: skip
        is_unsigned = struct.unpack_from("<I", found.raw, _FLAGS)[0] & _UNSIGNED_HASH
        if found.hash_version != directory.HALF_MD4 or is_unsigned:
            raise FormatError(
                "ext4 with another hash of names than signed half MD4 cannot be changed here", blob=self.name,
                got=f"version {found.hash_version}{', unsigned' if is_unsigned else ''}",
            )  # fmt: skip
        if struct.unpack_from("<I", found.raw, _LAST_ORPHAN)[0]:
            raise FormatError("ext4 with orphaned inodes (mount it once)", blob=self.name)


def _feature_text(features: Sequence[int]) -> str:
    names = ("compat", "incompat", "ro_compat")
    return ", ".join(f"{name} {bits:#x}" for name, bits in zip(names, features, strict=True) if bits)


def _loader(disk: WritableBlob, size: int, blocks: list[int]) -> Callable[[int], bytes]:
    # Reads a group's bitmap from the disk. (A method of the file system would make a reference cycle that keeps all
    # its buffers.)
    return lambda group: disk.read_at(blocks[group] * size, size)


def extents_of(runs: Sequence[tuple[int, int]]) -> list[Extent]:
    """Return the extents of a file without holes that lies in these runs (first, length)."""
    extents = []
    logical = 0
    for first, length in runs:
        while length:
            count = min(length, MAX_EXTENT)
            extents.append(Extent(logical, count, first))
            logical, first, length = logical + count, first + count, length - count
    return extents


def append_extent(extents: list[Extent], new: Extent) -> None:
    """Append an extent, or extend the last one if the new one continues it."""
    if extents:
        last = extents[-1]
        follows = last.logical + last.length == new.logical and last.physical + last.length == new.physical
        if follows and last.length + new.length <= MAX_EXTENT:
            extents[-1] = Extent(last.logical, last.length + new.length, last.physical)
            return
    extents.append(new)
