"""Changing an ext4 file system that obdlab made, without a mount.

Metadata is kept in memory and written by :meth:`Editor.finish`, block by block and in order, so that only blocks that
really change are written; file content is written as it comes. Whatever happens before that leaves the disk useless,
as a crash of the kernel would: it is a layer in the making, thrown away then.

Nothing depends on time, place or order of anything but the calls: same calls, same bytes.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from obdlab.errors import FormatError
from obdlab.ext4 import directory, xattr
from obdlab.ext4.allocator import Allocator
from obdlab.ext4.layout import (
    COMPAT,
    EXTENTS_INLINE,
    EXTRA_ISIZE,
    GOOD_INODE,
    INCOMPAT,
    MAX_EXTENT,
    MAX_LINKS,
    MAX_NAME,
    RO_COMPAT,
    SECTOR,
    SUPER_OFFSET,
    Extent,
    Inode,
    InodeFlag,
    extent_node,
    index_node,
    parse_node,
)
from obdlab.ext4.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from obdlab.blob import Buffer, WritableBlob

_INODE_SIZE = 256
_INLINE_SPACE = _INODE_SIZE - GOOD_INODE - EXTRA_ISIZE
_SHORT_LINK = 60
# Content is written in pieces of this much, as files are mostly small and follow each other on the disk.
_GATHER = 4 << 20
_LAST_ORPHAN = 232

_KINDS = {
    stat.S_IFREG: directory.FILE,
    stat.S_IFDIR: directory.DIRECTORY,
    stat.S_IFCHR: directory.CHARACTER,
    stat.S_IFBLK: directory.BLOCK,
    stat.S_IFIFO: directory.FIFO,
    stat.S_IFSOCK: directory.SOCKET,
    stat.S_IFLNK: directory.SYMLINK,
}


@dataclass(slots=True)
class _Directory:
    parent: int
    entries: dict[bytes, tuple[int, int]]
    #: Its blocks on disk when it was read; empty if it is new.
    blocks: list[int] = field(default_factory=list)
    #: Which of them a name was in, for those that were there.
    home: dict[bytes, int] = field(default_factory=dict)
    is_tree: bool = False
    changed: set[bytes] = field(default_factory=set)

    @property
    def links(self) -> int:
        found = 2 + sum(kind == directory.DIRECTORY for _, kind in self.entries.values())
        return found if found < MAX_LINKS else 1  # 1: too many to count


class Editor(Volume):
    """An ext4 file system being changed. Inodes are known by number.

    Raises FormatError for a file system that was not made by :func:`~obdlab.ext4.mkfs.make_filesystem`, or is
    damaged, and OSError, with the kernel's numbers, for what the file system cannot do.
    """

    def __init__(self, disk: WritableBlob) -> None:
        super().__init__(disk)
        self._target = disk
        superblock = self.superblock
        self._check_writable()
        self._blocks = Allocator(
            superblock.blocks, superblock.blocks_per_group, [group.free_blocks for group in self._groups],
            lambda group: self._disk.read_at(self._groups[group].block_bitmap * self.block_size, self.block_size),
            self.name,
        )  # fmt: skip
        self._inodes = Allocator(
            superblock.inodes, superblock.inodes_per_group, [group.free_inodes for group in self._groups],
            lambda group: self._disk.read_at(self._groups[group].inode_bitmap * self.block_size, self.block_size),
            self.name,
        )  # fmt: skip
        self._cache: dict[int, bytearray] = {}
        self._dirty: set[int] = set()
        self._directories: dict[int, _Directory] = {}
        self._gathered = bytearray()
        self._gathered_at = 0

    # -- names -------------------------------------------------------------------------------------------------------

    def entries(self, number: int) -> dict[bytes, tuple[int, int]]:
        """Return a directory's names as they are now. Not to be changed by the caller."""
        return self._directory(number).entries

    def add(self, parent: int, name: bytes, inode: Inode) -> int:
        """Make a file, or whatever the inode's mode says, under a name that is not in use. Returns its number."""
        kind = _KINDS[stat.S_IFMT(inode.mode)]
        home = self._directory_for(parent, name)
        number = self._inodes.take(1)[0][0] + 1
        if kind == directory.DIRECTORY:
            self._directories[number] = _Directory(parent, {})
            self._groups[(number - 1) // self.superblock.inodes_per_group].directories += 1
        self.set_inode(number, inode)
        home.entries[name] = (number, kind)
        home.changed.add(name)
        return number

    def link(self, parent: int, name: bytes, number: int) -> None:
        """Give a file, which is no directory, one more name."""
        inode = self.inode(number)
        if inode.is_directory:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if inode.links >= MAX_LINKS:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        home = self._directory_for(parent, name)
        self.set_inode(number, inode.changed(links=inode.links + 1))
        home.entries[name] = (number, _KINDS[stat.S_IFMT(inode.mode)])
        home.changed.add(name)

    def remove(self, parent: int, name: bytes) -> int:
        """Take a name away, with everything below it, and free what has no other name. Returns how many went."""
        home = self._directory(parent)
        number, _ = home.entries.pop(name)
        home.changed.add(name)
        count = 0
        pending = [number]
        while pending:
            number = pending.pop()
            count += 1
            inode = self.inode(number)
            if inode.is_directory:
                pending += [child for child, _ in self.entries(number).values()]
                self._free(number, inode)
            elif inode.links > 1:
                self.set_inode(number, inode.changed(links=inode.links - 1))
            else:
                self._free(number, inode)
        return count

    # -- inodes ------------------------------------------------------------------------------------------------------

    def set_inode(self, number: int, inode: Inode) -> None:
        """Write an inode. Links of a directory are counted by :meth:`finish`."""
        block, offset = self._place(number)
        inode.write_to(self._writable(block), offset)

    def with_xattrs(self, inode: Inode, pairs: Sequence[xattr.Pair]) -> Inode:
        """Return the inode with these extended attributes and no others; ACLs as programs see them.

        Names that ext4 does not keep are left out, and user attributes of what is neither file nor directory, as the
        kernel would refuse them. The mode's bits win over those of an ACL.
        """
        if inode.acl_block:
            self._free_xattr_block(inode.acl_block)
            inode = inode.changed(acl_block=0, sectors=inode.sectors - self.block_size // SECTOR)
        kept = []
        for name, value in pairs:
            split = xattr.split_name(name)
            if split is None or (split[0] == 1 and stat.S_IFMT(inode.mode) not in (stat.S_IFREG, stat.S_IFDIR)):
                continue
            if len(split[1]) > MAX_NAME:
                raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
            if split[0] in (2, 3):
                if stat.S_ISLNK(inode.mode) or (split[0] == 3 and not inode.is_directory):
                    continue
                packed = xattr.acl_to_disk(value, inode.mode, default=split[0] == 3)
                if packed is None:
                    continue
                value = packed
            kept.append((name, value))
        tail, block = xattr.place(kept, inline_space=_INLINE_SPACE, block_size=self.block_size)
        if not block:
            return inode.changed(tail=tail)
        where = self._blocks.take(1)[0][0]
        self._replace(where, block)
        return inode.changed(tail=tail, acl_block=where, sectors=inode.sectors + self.block_size // SECTOR)

    def with_link(self, inode: Inode, target: bytes) -> Inode:
        """Return the inode of a symbolic link to ``target``."""
        if not 0 < len(target) < self.block_size:
            code = errno.ENAMETOOLONG if target else errno.ENOENT
            raise OSError(code, os.strerror(code))
        if len(target) < _SHORT_LINK:
            return inode.changed(size=len(target), block=target.ljust(60, b"\0"))
        return self.with_content(inode, len(target), [(0, target)])

    def with_content(
        self, inode: Inode, size: int, pieces: Iterable[tuple[int, Buffer]], *, sparse: bool = False
    ) -> Inode:
        """Return the inode of a file of ``size`` bytes, whose content is written now.

        ``pieces`` are (offset, bytes), ascending. Without ``sparse`` they follow each other from 0 to the end; with
        it, blocks that no piece touches become holes.
        """
        if sparse:
            extents = self._write_sparse(pieces)
        else:
            runs = self._blocks.take(-(-size // self.block_size))
            extents = _extents_of(runs)
            self._write_pieces(runs, pieces)
        block, nodes = self._extent_tree(extents)
        blocks = sum(extent.length for extent in extents) + nodes
        return inode.changed(
            size=size, block=block, flags=inode.flags | InodeFlag.EXTENTS, sectors=blocks * self.block_size // SECTOR
        )

    def finish(self) -> None:
        """Write everything that is not yet on the disk. Nothing may be called after it."""
        for number, found in self._directories.items():
            if found.changed or not found.blocks:
                self._write_directory(number, found)
        self._flush_gathered()
        for group, bits in self._blocks.changed():
            self._replace(self._groups[group].block_bitmap, bits)
        for group, bits in self._inodes.changed():
            self._replace(self._groups[group].inode_bitmap, bits)
        self._write_groups()
        self._write_dirty()
        self._target.write_at(SUPER_OFFSET, self.superblock.with_free(self._blocks.left, self._inodes.left))

    # -- content -----------------------------------------------------------------------------------------------------

    def _write_pieces(self, runs: list[tuple[int, int]], pieces: Iterable[tuple[int, Buffer]]) -> None:
        size = self.block_size
        places = iter(runs)
        at = end = 0
        for _, piece in pieces:
            view = memoryview(piece)
            while view:
                if at == end:
                    first, length = next(places)
                    at, end = first * size, (first + length) * size
                part = view[: end - at]
                self._gather(at, part)
                at += len(part)
                view = view[len(part) :]
        if at % size:
            self._gather(at, bytes(-at % size))

    def _write_sparse(self, pieces: Iterable[tuple[int, Buffer]]) -> list[Extent]:
        size = self.block_size
        extents: list[Extent] = []
        block, content = -1, bytearray()

        def store() -> None:
            if block >= 0:
                physical = self._blocks.take(1)[0][0]
                self._gather(physical * size, content)
                _append(extents, Extent(block, 1, physical))

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

    def _gather(self, offset: int, data: Buffer) -> None:
        if offset != self._gathered_at + len(self._gathered) or len(self._gathered) >= _GATHER:
            self._flush_gathered()
            self._gathered_at = offset
        self._gathered += data

    def _flush_gathered(self) -> None:
        if self._gathered:
            self._target.write_at(self._gathered_at, self._gathered)
            self._gathered = bytearray()

    def _pieces(self, inode: Inode, offset: int, length: int) -> Iterator[bytes]:
        self._flush_gathered()
        return super()._pieces(inode, offset, length)

    def _extent_tree(self, extents: Sequence[Extent]) -> tuple[bytes, int]:
        # The inode's 60 bytes, and how many blocks the tree takes.
        if len(extents) <= EXTENTS_INLINE:
            return extent_node(list(extents), 60), 0
        per_node = (self.block_size - 12) // 12
        level = []
        nodes = 0
        for at in range(0, len(extents), per_node):
            group = list(extents[at : at + per_node])
            level.append((group[0].logical, self._new_block(extent_node(group, self.block_size))))
        depth = 1
        nodes += len(level)
        while len(level) > EXTENTS_INLINE:
            parts = [level[at : at + per_node] for at in range(0, len(level), per_node)]
            level = [(part[0][0], self._new_block(index_node(part, depth, self.block_size))) for part in parts]
            depth += 1
            nodes += len(level)
        return index_node(level, depth, 60), nodes

    def _new_block(self, content: bytes) -> int:
        block = self._blocks.take(1)[0][0]
        self._replace(block, content)
        return block

    # -- freeing -----------------------------------------------------------------------------------------------------

    def _free(self, number: int, inode: Inode) -> None:
        if inode.is_directory:
            self._groups[(number - 1) // self.superblock.inodes_per_group].directories -= 1
            self._directories.pop(number, None)
        if inode.acl_block:
            self._free_xattr_block(inode.acl_block)
        if inode.flags & InodeFlag.EXTENTS:
            for extent in self.extents(inode):
                self._blocks.give_back(extent.physical, extent.length)
            self._free_tree(inode)
        block, offset = self._place(number)
        self._writable(block)[offset : offset + _INODE_SIZE] = bytes(_INODE_SIZE)
        self._inodes.give_back(number - 1, 1)

    def _free_tree(self, inode: Inode) -> None:
        pending: list[Buffer] = [inode.block]
        while pending:
            _, _, children = parse_node(pending.pop(), self.name)
            for _, block in children:
                pending.append(bytes(self._metadata(block)))
                self._free_block(block)

    def _free_block(self, block: int) -> None:
        self._blocks.give_back(block, 1)
        self._cache.pop(block, None)
        self._dirty.discard(block)

    def _free_xattr_block(self, block: int) -> None:
        # The kernel shares them; obdlab does not.
        self._check_block(block)
        users = struct.unpack_from("<I", self._metadata(block), 4)[0]
        if users > 1:
            struct.pack_into("<I", self._writable(block), 4, users - 1)
        else:
            self._free_block(block)

    # -- directories -------------------------------------------------------------------------------------------------

    def _directory_for(self, parent: int, name: bytes) -> _Directory:
        if len(name) > MAX_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        found = self._directory(parent)
        if name in found.entries or name in (b"", b".", b".."):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        return found

    def _directory(self, number: int) -> _Directory:
        found = self._directories.get(number)
        if found is None:
            inode = self.inode(number)
            raw = self._directory_blocks(number)
            found = _Directory(0, {}, self._block_numbers(inode), is_tree=bool(inode.flags & InodeFlag.INDEX))
            for place, block in enumerate(raw):
                for name, child, kind in directory.parse_block(block, self.name):
                    if name == b"..":
                        found.parent = child
                    elif name != b".":
                        found.entries[name] = (child, kind)
                        found.home[name] = place
            self._directories[number] = found
        return found

    def _write_directory(self, number: int, found: _Directory) -> None:
        inode = self.inode(number)
        if not found.blocks or not self._edit_in_place(found):
            for block in found.blocks:
                self._free_block(block)
            if found.blocks:
                self._free_tree(inode)
            inode = self._rebuild(number, found, inode)
        elif len(found.blocks) * self.block_size != inode.size:
            inode = self._resized(inode, found)
        self.set_inode(number, inode.changed(links=found.links))

    def _rebuild(self, number: int, found: _Directory, inode: Inode) -> Inode:
        entries = [(name, *entry) for name, entry in found.entries.items()]
        seed = self.superblock.hash_seed
        blocks, is_tree = directory.build(entries, number, found.parent, self.block_size, seed)
        runs = self._blocks.take(len(blocks))
        found.blocks = [block for first, length in runs for block in range(first, first + length)]
        for block, content in zip(found.blocks, blocks, strict=True):
            self._replace(block, content)
        flags = inode.flags & ~InodeFlag.INDEX | (InodeFlag.INDEX if is_tree else 0)
        return self._resized(inode.changed(flags=flags, block=extent_node([], 60)), found)

    def _resized(self, inode: Inode, found: _Directory) -> Inode:
        if inode.flags & InodeFlag.EXTENTS:
            self._free_tree(inode)
        extents: list[Extent] = []
        for logical, block in enumerate(found.blocks):
            _append(extents, Extent(logical, 1, block))
        tree, nodes = self._extent_tree(extents)
        blocks = len(found.blocks) + nodes + bool(inode.acl_block)
        return inode.changed(
            size=len(found.blocks) * self.block_size,
            block=tree,
            sectors=blocks * self.block_size // SECTOR,
            flags=inode.flags | InodeFlag.EXTENTS,
        )

    def _edit_in_place(self, found: _Directory) -> bool:
        # Change no block but those that names come to or go from. False if a tree has no room where one belongs.
        size = self.block_size
        blocks = [self._metadata(block) for block in found.blocks]
        edited: dict[int, list[directory.Entry]] = {}
        added = []

        def block_entries(place: int) -> list[directory.Entry]:
            if place not in edited:
                edited[place] = directory.parse_block(blocks[place], self.name)
            return edited[place]

        for name in sorted(found.changed, key=lambda name: found.home.get(name, -1)):
            now, place = found.entries.get(name), found.home.get(name)
            if place is None:
                continue
            listed = block_entries(place)
            at = next(at for at, entry in enumerate(listed) if entry[0] == name)
            listed[at : at + 1] = [(name, *now)] if now else []
        for name, now in found.entries.items():
            if name in found.changed and name not in found.home:
                added.append((name, *now))
        if found.is_tree:
            if not self._add_to_leaves(found, blocks, added, block_entries):
                return False
        else:
            self._add_anywhere(found, blocks, added, block_entries)
        for place, listed in edited.items():
            if not (found.is_tree and place == 0):
                self._replace(found.blocks[place], directory.pack_block(listed, size))
        return True

    def _add_to_leaves(
        self,
        found: _Directory,
        blocks: Sequence[bytes | bytearray],
        added: Sequence[directory.Entry],
        block_entries: Callable[[int], list[directory.Entry]],
    ) -> bool:
        if not added:
            return True
        hashes = directory.hash_names([entry[0] for entry in added], self.superblock.hash_seed)
        for entry, wanted in zip(added, hashes.tolist(), strict=True):
            listed = block_entries(directory.leaf_of(blocks, wanted, self.name))
            if directory.used_in(listed) + directory.need(len(entry[0])) > self.block_size:
                return False
            listed.append(entry)
        return True

    def _add_anywhere(
        self,
        found: _Directory,
        blocks: list[bytes | bytearray],
        added: Sequence[directory.Entry],
        block_entries: Callable[[int], list[directory.Entry]],
    ) -> None:
        place = 0
        for entry in added:
            while directory.used_in(block_entries(place)) + directory.need(len(entry[0])) > self.block_size:
                place += 1
                if place == len(blocks):
                    blocks.append(directory.pack_block([], self.block_size))
                    found.blocks.append(self._new_block(b""))
            block_entries(place).append(entry)

    # -- metadata ----------------------------------------------------------------------------------------------------

    def _metadata(self, block: int) -> bytes | bytearray:
        return self._cache.get(block) or super()._metadata(block)

    def _writable(self, block: int) -> bytearray:
        found = self._cache.get(block)
        if found is None:
            found = self._cache[block] = bytearray(self._disk.read_at(block * self.block_size, self.block_size))
        self._dirty.add(block)
        return found

    def _replace(self, block: int, content: bytes) -> None:
        self._cache[block] = bytearray(content.ljust(self.block_size, b"\0"))
        self._dirty.add(block)

    def _write_groups(self) -> None:
        per_block = self.block_size // self.superblock.desc_size
        for number, group in enumerate(self._groups):
            group.free_blocks, group.free_inodes = self._blocks.free[number], self._inodes.free[number]
            block, index = divmod(number, per_block)
            where = self.superblock.first_data_block + 1 + block
            offset, content = index * self.superblock.desc_size, group.to_bytes()
            if self._metadata(where)[offset : offset + 64] != content:
                self._writable(where)[offset : offset + 64] = content

    def _write_dirty(self) -> None:
        size = self.block_size
        for block in sorted(self._dirty):
            self._gather(block * size, self._cache[block])
        self._flush_gathered()

    def _check_writable(self) -> None:
        found = self.superblock
        unknown = (found.compat & ~COMPAT, found.incompat & ~INCOMPAT, found.ro_compat & ~RO_COMPAT)
        usual = found.block_size == 4096 and found.inode_size == _INODE_SIZE and found.desc_size == 64
        if any(unknown) or not usual or found.hash_version != directory.HALF_MD4:
            raise FormatError("ext4 that was not made here cannot be changed here", blob=self.name, got=unknown)
        if struct.unpack_from("<I", found.raw, _LAST_ORPHAN)[0]:
            raise FormatError("ext4 with orphaned inodes (mount it once)", blob=self.name)


def _extents_of(runs: Sequence[tuple[int, int]]) -> list[Extent]:
    extents = []
    logical = 0
    for first, length in runs:
        while length:
            count = min(length, MAX_EXTENT)
            extents.append(Extent(logical, count, first))
            logical, first, length = logical + count, first + count, length - count
    return extents


def _append(extents: list[Extent], new: Extent) -> None:
    if extents:
        last = extents[-1]
        follows = last.logical + last.length == new.logical and last.physical + last.length == new.physical
        if follows and last.length + new.length <= MAX_EXTENT:
            extents[-1] = Extent(last.logical, last.length + new.length, last.physical)
            return
    extents.append(new)
