"""Changing an ext4 file system that obdlab or the original's tools made, without a mount.

Metadata is kept in memory and written by :meth:`Editor.finish`, block by block and in order, so that only blocks that
really change are written; file content is written at once. An error before that leaves the disk useless, as a crash
of the kernel would: the disk is an unfinished layer, which is then thrown away.

The result depends only on the calls and their order, not on time or place: same calls, same bytes.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from obdlab.volumes.ext4 import directory, xattr
from obdlab.volumes.ext4.changes import INODE_SIZE, MOST_BLOCKS, Changes, extents_of
from obdlab.volumes.ext4.folders import Folder, FolderWriter, read_folder
from obdlab.volumes.ext4.layout import (
    EXTRA_ISIZE,
    GOOD_INODE,
    MAX_LINKS,
    MAX_NAME,
    ROOT_INO,
    SECTOR,
    Compat,
    Inode,
    InodeFlag,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from obdlab.blob import Buffer, WritableBlob

_INLINE_SPACE = INODE_SIZE - GOOD_INODE - EXTRA_ISIZE
_SHORT_LINK = 60
#: A plain number: or-ing flags of an enumeration takes longer than all other work for a small file.
EXTENTS = int(InodeFlag.EXTENTS)

_KINDS = {
    stat.S_IFREG: directory.FILE,
    stat.S_IFDIR: directory.DIRECTORY,
    stat.S_IFCHR: directory.CHARACTER,
    stat.S_IFBLK: directory.BLOCK,
    stat.S_IFIFO: directory.FIFO,
    stat.S_IFSOCK: directory.SOCKET,
    stat.S_IFLNK: directory.SYMLINK,
}


class Editor(Changes):
    """An ext4 file system being changed. Inodes are known by number.

    Raises FormatError for a file system that is damaged or differs from those of
    :func:`~obdlab.volumes.ext4.mkfs.make_filesystem` and the original's tools, and OSError, with the kernel's
    numbers, for operations that fail.
    """

    def __init__(self, disk: WritableBlob) -> None:
        super().__init__(disk)
        self._folders: dict[int, Folder] = {}

    # -- names -------------------------------------------------------------------------------------------------------

    def entries(self, number: int) -> dict[bytes, tuple[int, int]]:
        """Return a directory's current names. The caller must not change them."""
        return self._folder(number).entries

    def add(self, parent: int, name: bytes, inode: Inode) -> int:
        """Make a file of the type in the inode's mode, under an unused name. Returns its number."""
        kind = _KINDS[stat.S_IFMT(inode.mode)]
        home = self._folder_for(parent, name)
        number = self.inodes.take_one() + 1
        if kind == directory.DIRECTORY:
            self._folders[number] = Folder(parent, {})
            self._groups[(number - 1) // self.superblock.inodes_per_group].directories += 1
        self.set_inode(number, inode)
        home.entries[name] = (number, kind)
        home.changed.add(name)
        return number

    def link(self, parent: int, name: bytes, number: int) -> None:
        """Give a file other than a directory one more name."""
        inode = self.inode(number)
        if inode.is_directory:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if inode.links >= MAX_LINKS:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        home = self._folder_for(parent, name)
        self.set_inode(number, inode.changed(links=inode.links + 1))
        home.entries[name] = (number, _KINDS[stat.S_IFMT(inode.mode)])
        home.changed.add(name)

    def remove(self, parent: int, name: bytes) -> int:
        """Remove a name and all below it, and free inodes left without a name. Returns the count of names."""
        home = self._folder(parent)
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
        """Write an inode. :meth:`finish` counts the links of directories."""
        if len(inode.tail) > _INLINE_SPACE and any(inode.tail):
            # The inode had fewer fixed fields than are written here, so its attributes may now need a block.
            inode = self.with_xattrs(inode, self.xattrs(inode))
        block, offset = self._place(number)
        inode.write_to(self.writable(block), offset)

    def with_xattrs(self, inode: Inode, pairs: Sequence[xattr.Pair]) -> Inode:
        """Return the inode with these extended attributes and no others; ACLs in the form programs see.

        Left out are names that ext4 does not store, and user attributes of files other than regular files and
        directories, since the kernel would refuse them. The mode's bits win over those of an ACL.
        """
        if inode.acl_block:
            self.free_xattr_block(inode.acl_block)
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
        where = self.new_block(block)
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
        """Return the inode of a file of ``size`` bytes, and write its content.

        ``pieces`` are (offset, bytes), ascending. Without ``sparse`` they are contiguous from 0 to the end; with it,
        blocks that no piece touches become holes.
        """
        block, sectors = self.write_content(size, pieces, sparse=sparse)
        return inode.changed(size=size, block=block, flags=inode.flags | EXTENTS, sectors=sectors)

    def write_content(
        self, size: int, pieces: Iterable[tuple[int, Buffer]], *, sparse: bool = False
    ) -> tuple[bytes, int]:
        """Write a file's content as :meth:`with_content` does; return ``block`` and ``sectors`` of its inode."""
        if size > MOST_BLOCKS * self.block_size:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if sparse:
            extents = self.write_sparse(pieces)
        else:
            runs = self.blocks.take(-(-size // self.block_size))
            extents = extents_of(runs)
            self.write_pieces(runs, pieces)
        block, nodes = self.extent_tree(extents)
        return block, (sum([extent.length for extent in extents]) + nodes) * self.block_size // SECTOR

    def map_content(self, size: int, place: int, end: bytes) -> tuple[bytes, int]:
        """Store a file of ``size`` bytes that lie in the disk's target from ``place`` on, except for ``end``.

        ``end`` is empty, or the bytes of the file's last sector, which are then written; without it the target's
        sector must have zeros behind the file. Returns as :meth:`write_content`, and has its bounds.
        """
        if size > MOST_BLOCKS * self.block_size:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        runs = self.blocks.take(-(-size // self.block_size))
        mapped = size - len(end) if end else -(-size // SECTOR) * SECTOR
        self.map_runs(runs, mapped, place)
        extents = extents_of(runs)
        if end:
            last = extents[-1]
            block = (last.physical + last.length - 1) * self.block_size
            at = mapped % self.block_size
            self._gathered.write(block + at, end.ljust(self.block_size - at, b"\0"))
        block_field, nodes = self.extent_tree(extents)
        return block_field, (sum([extent.length for extent in extents]) + nodes) * self.block_size // SECTOR

    def finish(self) -> None:
        """Write all changes to the disk. No other method may be called after it."""
        self._drop_broken_tree()
        writer = FolderWriter(self)
        for number, folder in self._folders.items():
            if folder.changed or not folder.blocks:
                self.set_inode(number, writer.write(number, folder, self.inode(number)))
        self.write_out()

    def _drop_broken_tree(self) -> None:
        # The original's mkfs gives lost+found a tree over names that leaves out the last of its blocks, which e2fsck
        # reports as damage. Without the flag the same blocks are a plain directory; e2fsck repairs it in the same
        # way.
        if not self.superblock.compat & Compat.RESIZE_INODE:
            return
        number, kind = self.entries(ROOT_INO).get(b"lost+found", (0, 0))
        if kind != directory.DIRECTORY or not self.inode(number).flags & InodeFlag.INDEX:
            return
        inode = self.inode(number)
        self.set_inode(number, inode.changed(flags=inode.flags & ~int(InodeFlag.INDEX)))
        if number in self._folders:
            self._folders[number].is_tree = False

    def _free(self, number: int, inode: Inode) -> None:
        if inode.is_directory:
            self._groups[(number - 1) // self.superblock.inodes_per_group].directories -= 1
            self._folders.pop(number, None)
        if inode.acl_block:
            self.free_xattr_block(inode.acl_block)
        if inode.flags & InodeFlag.EXTENTS or self.has_block_map(inode):
            for extent in self.extents(inode):
                self.blocks.give_back(extent.physical, extent.length)
            self.free_tree(inode)
        block, offset = self._place(number)
        self.writable(block)[offset : offset + INODE_SIZE] = bytes(INODE_SIZE)
        self.inodes.give_back(number - 1, 1)

    # -- directories -------------------------------------------------------------------------------------------------

    def _folder_for(self, parent: int, name: bytes) -> Folder:
        if len(name) > MAX_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        found = self._folder(parent)
        if name in found.entries or name in (b"", b".", b".."):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        return found

    def _folder(self, number: int) -> Folder:
        found = self._folders.get(number)
        if found is None:
            inode = self.inode(number)
            raw = list(self._directory_blocks(number))
            is_tree = bool(inode.flags & InodeFlag.INDEX)
            found = read_folder(raw, self._block_numbers(inode), is_tree=is_tree, name=self.name)
            self._folders[number] = found
        return found
