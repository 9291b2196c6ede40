"""Directories in memory while they change, and writing them back to their blocks.

Only blocks in which a name is added or removed are written, so that a layer stays small. A directory that outgrows
its tree is rebuilt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from obdlab.volumes.ext4 import directory
from obdlab.volumes.ext4.changes import append_extent
from obdlab.volumes.ext4.layout import MAX_LINKS, SECTOR, Extent, Inode, InodeFlag, extent_node

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from obdlab.volumes.ext4.changes import Changes


@dataclass(slots=True)
class Folder:
    """One directory: its names, and their places on the disk."""

    parent: int
    #: Inode number and type by name, without "." and "..".
    entries: dict[bytes, tuple[int, int]]
    #: Its blocks on disk when it was read; empty for a new directory.
    blocks: list[int] = field(default_factory=list)
    #: For names read from the disk, the index into ``blocks``.
    home: dict[bytes, int] = field(default_factory=dict)
    is_tree: bool = False
    changed: set[bytes] = field(default_factory=set)

    @property
    def links(self) -> int:
        """The link count of its inode."""
        found = 2 + sum(kind == directory.DIRECTORY for _, kind in self.entries.values())
        return found if found < MAX_LINKS else 1  # 1: too many to count


def read_folder(raw: Sequence[bytes | bytearray], numbers: list[int], *, is_tree: bool, name: str) -> Folder:
    """Read a directory from its blocks, whose numbers are ``numbers``. Raises FormatError."""
    found = Folder(0, {}, numbers, is_tree=is_tree)
    for place, block in enumerate(raw):
        for entry, child, kind in directory.parse_block(block, name):
            if entry == b"..":
                found.parent = child
            elif entry != b".":
                found.entries[entry] = (child, kind)
                found.home[entry] = place
    return found


class FolderWriter:
    """Writes changed directories."""

    def __init__(self, volume: Changes) -> None:
        self._volume = volume
        self._size = volume.block_size

    def write(self, number: int, folder: Folder, inode: Inode) -> Inode:
        """Update the directory's blocks; return its changed inode."""
        if not folder.blocks or not self._edit_in_place(folder):
            for block in folder.blocks:
                self._volume.free_block(block)
            if folder.blocks:
                self._volume.free_tree(inode)
            inode = self._rebuild(number, folder, inode)
        elif len(folder.blocks) * self._size != inode.size:
            inode = self._resized(inode, folder)
        return inode.changed(links=folder.links)

    def _rebuild(self, number: int, folder: Folder, inode: Inode) -> Inode:
        entries = [(name, *entry) for name, entry in folder.entries.items()]
        seed = self._volume.superblock.hash_seed
        blocks, is_tree = directory.build(entries, number, folder.parent, self._size, seed)
        runs = self._volume.blocks.take(len(blocks))
        folder.blocks = [block for first, length in runs for block in range(first, first + length)]
        for block, content in zip(folder.blocks, blocks, strict=True):
            self._volume.replace(block, content)
        flags = inode.flags & ~int(InodeFlag.INDEX) | InodeFlag.EXTENTS | (InodeFlag.INDEX if is_tree else 0)
        return self._resized(inode.changed(flags=flags, block=extent_node([], 60)), folder)

    def _resized(self, inode: Inode, folder: Folder) -> Inode:
        self._volume.free_tree(inode)
        extents: list[Extent] = []
        for logical, block in enumerate(folder.blocks):
            append_extent(extents, Extent(logical, 1, block))
        tree, nodes = self._volume.extent_tree(extents)
        blocks = len(folder.blocks) + nodes + bool(inode.acl_block)
        return inode.changed(
            size=len(folder.blocks) * self._size,
            block=tree,
            sectors=blocks * self._size // SECTOR,
        )

    def _edit_in_place(self, folder: Folder) -> bool:
        # Changes only blocks in which names are added or removed. Returns False if the leaf of a name is full.
        blocks = [self._volume.block(block) for block in folder.blocks]
        edited: dict[int, list[directory.Entry]] = {}
        added = []

        def block_entries(place: int) -> list[directory.Entry]:
            if place not in edited:
                edited[place] = directory.parse_block(blocks[place], self._volume.name)
            return edited[place]

        for name in sorted(folder.changed, key=lambda name: folder.home.get(name, -1)):
            now, place = folder.entries.get(name), folder.home.get(name)
            if place is None:
                continue
            listed = block_entries(place)
            at = next(at for at, entry in enumerate(listed) if entry[0] == name)
            listed[at : at + 1] = [(name, *now)] if now else []
        for name, now in folder.entries.items():
            if name in folder.changed and name not in folder.home:
                added.append((name, *now))
        if folder.is_tree:
            if not self._add_to_leaves(blocks, added, block_entries):
                return False
        else:
            self._add_anywhere(folder, blocks, added, block_entries)
        for place, listed in edited.items():
            if not (folder.is_tree and place == 0):
                self._volume.replace(folder.blocks[place], directory.pack_block(listed, self._size))
        return True

    def _add_to_leaves(
        self,
        blocks: Sequence[bytes | bytearray],
        added: Sequence[directory.Entry],
        block_entries: Callable[[int], list[directory.Entry]],
    ) -> bool:
        if not added:
            return True
        hashes = directory.hash_names([entry[0] for entry in added], self._volume.superblock.hash_seed)
        for entry, wanted in zip(added, hashes.tolist(), strict=True):
            listed = block_entries(directory.leaf_of(blocks, wanted, self._volume.name))
            if directory.used_in(listed) + directory.need(len(entry[0])) > self._size:
                return False
            listed.append(entry)
        return True

    def _add_anywhere(
        self,
        folder: Folder,
        blocks: list[bytes | bytearray],
        added: Sequence[directory.Entry],
        block_entries: Callable[[int], list[directory.Entry]],
    ) -> None:
        place = 0
        for entry in added:
            while directory.used_in(block_entries(place)) + directory.need(len(entry[0])) > self._size:
                place += 1
                if place == len(blocks):
                    blocks.append(directory.pack_block([], self._size))
                    folder.blocks.append(self._volume.new_block(b""))
            block_entries(place).append(entry)
