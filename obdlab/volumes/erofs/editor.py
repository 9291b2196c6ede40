"""Changing an EROFS in place, as layers need it: new things are appended, old blocks change as little as possible.

The kernel only reads EROFS; here it grows. Files are written once, at the end of the disk. An existing directory
keeps its inode, so its parent and children need not change, and gets its new entries in new blocks. So a layer holds
its own files, the entries of directories it changed, and a few blocks of inodes.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.errors import FormatError
from obdlab.volumes.erofs import pack
from obdlab.volumes.erofs.files import FileWriter, Written, chunk_count
from obdlab.volumes.erofs.freespace import Space
from obdlab.volumes.erofs.pack import BLOCK, INODE_SIZE, SLOT
from obdlab.volumes.erofs.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from obdlab.blob import Buffer, WritableBlob
    from obdlab.layers.ordering import SectorRange
    from obdlab.volumes.erofs.volume import Inode

Pair = tuple[bytes, bytes]

# The root has a block of its own and never moves, since its number must fit into 16 bits.
_ROOT = BLOCK // SLOT
_FIRST_FREE = 2
# Largest last part of a file kept with its inode: longer ones would spread the inodes out.
_LARGEST_TAIL = 2048
_KINDS = {
    stat.S_IFREG: pack.REGULAR,
    stat.S_IFDIR: pack.DIRECTORY,
    stat.S_IFCHR: pack.CHARACTER,
    stat.S_IFBLK: pack.BLOCK_DEVICE,
    stat.S_IFIFO: pack.FIFO,
    stat.S_IFSOCK: pack.SOCKET,
    stat.S_IFLNK: pack.LINK,
}
_MAX_NAME = 255
_MAX_LINK = BLOCK - 1
_MOST_LINKS = 0xFFFFFFFF


@dataclass(slots=True)
class File:
    """A name other than a directory's: inode number, and type in a directory entry."""

    number: int
    kind: int


@dataclass(slots=True, eq=False)
class Directory:
    """A directory in memory, which overrides the disk until :meth:`Editor.finish` writes it."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    parent: Directory | None
    #: Its inode's number; None before it is placed.
    number: int | None = None
    #: None until read; so for ``entries``.
    xattrs: list[Pair] | None = None
    entries: dict[bytes, File | Directory] | None = None
    #: ``entries``, attributes or ``xattrs`` differ from the disk.
    listed: bool = False
    touched: bool = False
    retagged: bool = False


class Editor:
    """Changes an EROFS on ``disk``: a new one, or one that an editor has made. :meth:`finish` ends it.

    Raises OSError with the kernel's numbers for operations that fail, FormatError for a damaged file system.
    """

    def __init__(self, disk: WritableBlob, *, fresh: bool) -> None:
        self._disk = disk
        if fresh:
            self._space = Space(disk, _FIRST_FREE)
            self._files = FileWriter(self._space)
            self._inodes = 1
            self._first_new = 0
            self.root = Directory(stat.S_IFDIR | 0o755, 0, 0, 0, None, _ROOT, [], {}, listed=True)
            self._write_superblock()
        volume = Volume(disk)
        if not fresh:
            if volume.root != _ROOT or volume.block_size != BLOCK:
                raise FormatError("EROFS was not made here: it cannot be changed", blob=disk.name, got=volume.root)
            self._space = Space(disk, volume.blocks)
            # Only informative, so it is clipped, as a base may hold any number.
            self._inodes = min(volume.inodes, 1 << 62)
            self._files = FileWriter(self._space, chunks=volume.has_chunks)
            self._first_new = volume.blocks * (BLOCK // SLOT)
            self.root = self._from_disk(_ROOT, None)
        # Sees changes that are not on the disk yet.
        self._volume = Volume(self._space)

    # -- looking -----------------------------------------------------------------------------------------------------

    def entries(self, directory: Directory) -> dict[bytes, File | Directory]:
        """Return the entries of a directory. The caller must not change them."""
        found = directory.entries
        if found is None:
            assert directory.number is not None
            found = directory.entries = {
                name: self._from_disk(number, directory) if kind == pack.DIRECTORY else File(number, kind)
                for name, (number, kind) in self._volume.entries(directory.number).items()
            }
        return found

    def inode(self, file: File) -> Inode:
        """Return a file's inode."""
        return self._volume.inode(file.number)

    def readlink(self, file: File) -> bytes:
        """Return a symbolic link's text."""
        return self._volume.readlink(self.inode(file))

    def xattrs(self, node: File | Directory) -> list[Pair]:
        """Return extended attributes."""
        if isinstance(node, File):
            return self._volume.xattrs(self.inode(node))
        if node.xattrs is None:
            assert node.number is not None
            node.xattrs = self._volume.xattrs(self._volume.inode(node.number))
        return node.xattrs

    # -- adding and removing -----------------------------------------------------------------------------------------

    def add_directory(
        self, parent: Directory, name: bytes, *, mode: int, uid: int, gid: int, mtime_ns: int, xattrs: Sequence[Pair]
    ) -> Directory:
        """Make an empty directory."""
        pack.xattrs(xattrs)  # raises now if they are invalid
        made = Directory(mode, uid, gid, mtime_ns, parent, None, list(xattrs), {}, listed=True)
        self._enter(parent, name, made)
        self._inodes += 1
        return made

    def add_file(
        self,
        parent: Directory,
        name: bytes,
        *,
        mode: int,
        uid: int,
        gid: int,
        mtime_ns: int,
        xattrs: Sequence[Pair],
        size: int = 0,
        pieces: Iterable[tuple[int, Buffer]] = (),
        sparse: bool = False,
        rdev: tuple[int, int] = (0, 0),
        target: bytes = b"",
        mapped: tuple[int, bytes] | None = None,
    ) -> File:
        """Make a file other than a directory: ``size`` and ``pieces`` for a regular file, ``target`` for a link.

        ``mapped`` stands for the pieces of a file in the disk's target: ``place`` and ``end`` of
        :meth:`~obdlab.volumes.erofs.files.FileWriter.map`.
        """
        body = pack.xattrs(xattrs)
        kind = stat.S_IFMT(mode)
        if mapped is not None:
            written = self._files.map(size, *mapped)
        elif kind == stat.S_IFREG:
            room = min(_LARGEST_TAIL, BLOCK - INODE_SIZE - len(body))
            written = self._files.write(size, pieces, room, sparse=sparse)
        elif kind == stat.S_IFLNK:
            if not 0 < len(target) <= _MAX_LINK:
                raise OSError(errno.ENAMETOOLONG if target else errno.EINVAL, os.strerror(errno.EINVAL))
            size, written = len(target), Written(pack.INLINE, 0, target)
        else:
            written = Written(pack.PLAIN, pack.device(*rdev) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0)
        number = self._files.write_inode(
            written, body, mode=mode, uid=uid, gid=gid, size=size, mtime_ns=mtime_ns, links=1
        )
        made = File(number, _KINDS[kind])
        self._enter(parent, name, made)
        self._inodes += 1
        return made

    def link(self, parent: Directory, name: bytes, file: File) -> None:
        """Give a file one more name."""
        links = self.inode(file).links + 1
        if links > _MOST_LINKS:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        self._enter(parent, name, file)
        self._patch(file.number, links=links)

    def remove(self, parent: Directory, name: bytes) -> None:
        """Remove a name, with everything below it."""
        pending = [self.entries(parent).pop(name)]
        parent.listed = True
        seen: set[int | None] = set()
        while pending:
            node = pending.pop()
            if isinstance(node, Directory):
                self._check_once(node, seen)
                pending += self.entries(node).values()
                self._inodes -= 1
                continue
            inode = self.inode(node)
            if inode.links > 1:
                self._patch(node.number, links=inode.links - 1)
                continue
            self._inodes -= 1
            if node.number >= self._first_new:
                self._files.forget(inode)

    def _enter(self, parent: Directory, name: bytes, node: File | Directory) -> None:
        if len(name) > _MAX_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        entries = self.entries(parent)
        if name in entries:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        entries[name] = node
        parent.listed = True

    # -- changing ----------------------------------------------------------------------------------------------------

    def set_directory(
        self, directory: Directory, *, mode: int, uid: int, gid: int, mtime_ns: int, xattrs: Sequence[Pair]
    ) -> None:
        """Set all attributes of a directory."""
        wanted = (mode, uid, gid, mtime_ns)
        if (directory.mode, directory.uid, directory.gid, directory.mtime_ns) != wanted:
            directory.mode, directory.uid, directory.gid, directory.mtime_ns = wanted
            directory.touched = True
        if sorted(self.xattrs(directory)) != sorted(xattrs):
            pack.xattrs(xattrs)
            directory.xattrs = list(xattrs)
            directory.retagged = True

    def set_file(
        self, parent: Directory, file: File, *, mode: int, uid: int, gid: int, mtime_ns: int, xattrs: Sequence[Pair]
    ) -> None:
        """Set all attributes of a file in ``parent``."""
        body = pack.xattrs(xattrs)
        if body == pack.xattrs(self.xattrs(file)):
            self._patch(file.number, mode=mode, uid=uid, gid=gid, mtime_ns=mtime_ns)
            return
        inode = self.inode(file)
        written = Written(inode.layout, inode.start)
        if inode.layout == pack.INLINE:
            written.tail = self._volume.read(inode, inode.size // BLOCK * BLOCK, BLOCK)
        elif inode.layout == pack.CHUNKED:
            table = self._space.read_at(-(-inode.body // 4) * 4, 4 * chunk_count(inode))
            written.chunks = [int.from_bytes(table[at : at + 4], "little") for at in range(0, len(table), 4)]
        number = self._files.write_inode(
            written, body, mode=mode, uid=uid, gid=gid, size=inode.size, mtime_ns=mtime_ns, links=inode.links
        )
        self._rename(parent, file, number, links=inode.links)

    def _rename(self, parent: Directory, file: File, number: int, links: int) -> None:
        # Its inode has moved: every entry with its number must change. If it has several, they may be anywhere, and
        # those made since the directories were read share one object: it is still recognised once it is changed.
        old, found, pending = file.number, 0, [self.root, parent]
        seen: set[int | None] = set()
        moved: set[int] = set()
        while found < links and pending:
            directory = pending.pop()
            if directory is parent and found:
                continue  # searched before, as the first
            self._check_once(directory, seen)
            for node in self.entries(directory).values():
                if isinstance(node, Directory):
                    pending.append(node)
                elif id(node) in moved or node.number == old:
                    moved.add(id(node))
                    node.number = number
                    directory.listed = True
                    found += 1

    def _check_once(self, directory: Directory, seen: set[int | None]) -> None:
        # On a damaged disk a directory may be below itself.
        if directory.number is not None and directory.number in seen:
            raise FormatError("a directory is in the tree twice", blob=self._disk.name, got=directory.number)
        seen.add(directory.number)

    def _patch(self, number: int, **changes: int) -> None:
        inode = self._volume.inode(number)
        values = {
            "mode": inode.mode,
            "uid": inode.uid,
            "gid": inode.gid,
            "size": inode.size,
            "mtime_ns": inode.mtime_ns,
            "links": inode.links,
            "layout": inode.layout,
            "start": inode.start,
            "xattrs_size": inode.xattrs_size,
        }
        if not changes.items() <= values.items():
            self._space.change(number * SLOT, pack.inode(number, **{**values, **changes}))

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write everything to the disk; the editor cannot be used after that."""
        loaded = self._loaded()
        for directory in loaded:
            if directory.retagged and directory.number is not None:
                self._make_room(directory)
        # The children of a moved directory hold its number.
        loaded = self._loaded()
        placed = {id(directory): self._give_place(directory) for directory in loaded if directory.number is None}
        for directory in loaded:
            if id(directory) in placed:
                self._write_new(directory, *placed[id(directory)])
            elif directory.listed or directory.retagged:
                self._write_again(directory)
            elif directory.touched:
                assert directory.number is not None
                self._patch(directory.number, **_attributes(directory))
        self._write_superblock()
        self._space.flush()

    def metadata(self) -> list[SectorRange]:
        """Return the sectors of inodes, directories and small ends of files that were written, in disk order."""
        return self._space.metadata()

    def _loaded(self) -> list[Directory]:
        # Returns the directories in memory, each before its children.
        found, pending = [], [self.root]
        while pending:
            directory = pending.pop()
            found.append(directory)
            children = (directory.entries or {}).values()
            pending += [node for node in children if isinstance(node, Directory)]
        return found

    def _make_room(self, directory: Directory) -> None:
        # Extended attributes that do not fit at the inode's place move it, and every entry with its number changes.
        assert directory.number is not None
        body = pack.xattrs(self.xattrs(directory))
        if directory.parent is None:
            if len(body) > BLOCK - INODE_SIZE:
                raise OSError(errno.ENOSPC, "the root directory's attributes take too much room")
            return
        inode = self._volume.inode(directory.number)
        tail = inode.size % BLOCK if inode.layout == pack.INLINE else 0
        if len(body) <= inode.xattrs_size + tail:
            return
        for node in self.entries(directory).values():
            if isinstance(node, Directory):
                node.listed = True
        directory.number = None
        directory.parent.listed = True

    def _give_place(self, directory: Directory) -> tuple[bytes, int, bool]:
        # The size of a directory is known before the inode numbers in it are.
        body = pack.xattrs(self.xattrs(directory))
        size = pack.directory_size(self._sorted_names(directory))
        head, tail = INODE_SIZE + len(body), size % BLOCK
        inline = tail > 0 and head + tail <= BLOCK
        directory.number = self._space.place(head + (tail if inline else 0)) // SLOT
        return body, size, inline

    def _write_new(self, directory: Directory, body: bytes, size: int, inline: bool) -> None:
        content = self._content(directory)
        assert len(content) == size
        whole = size // BLOCK * BLOCK if inline else size
        start = self._write_blocks(content[:whole])
        self._write_directory(
            directory,
            body,
            size=size,
            layout=pack.INLINE if inline else pack.PLAIN,
            start=start,
            tail=content[whole:],
        )

    def _write_again(self, directory: Directory) -> None:
        content = self._content(directory)
        self._write_directory(
            directory,
            pack.xattrs(self.xattrs(directory)),
            size=len(content),
            layout=pack.PLAIN,
            start=self._write_blocks(content),
            tail=b"",
        )

    def _write_directory(
        self, directory: Directory, body: bytes, *, size: int, layout: int, start: int, tail: bytes
    ) -> None:
        assert directory.number is not None
        raw = pack.inode(
            directory.number,
            size=size,
            layout=layout,
            start=start,
            xattrs_size=len(body),
            **_attributes(directory),
            links=2 + sum(isinstance(node, Directory) for node in self.entries(directory).values()),
        )
        self._space.change(directory.number * SLOT, raw + body + tail)

    def _write_blocks(self, content: bytes) -> int:
        if not content:
            return 0
        first = self._space.metadata_blocks(-(-len(content) // BLOCK))
        self._space.change(first * BLOCK, content + bytes(-len(content) % BLOCK))
        return first

    def _sorted_names(self, directory: Directory) -> list[bytes]:
        return sorted([b".", b"..", *self.entries(directory)])

    def _content(self, directory: Directory) -> bytes:
        above = directory.parent or directory
        dots = {b".": directory, b"..": above}
        entries = {**self.entries(directory), **dots}
        return pack.directory([(name, *_reference(entries[name])) for name in sorted(entries)])

    def _write_superblock(self) -> None:
        inodes, blocks = max(self._inodes, 1), self._space.end
        raw = pack.superblock(root=_ROOT, inodes=inodes, blocks=blocks, chunks=self._files.chunks)
        self._disk.write_at(pack.SUPER_OFFSET, raw)

    def _from_disk(self, number: int, parent: Directory | None) -> Directory:
        inode = Volume(self._disk).inode(number) if parent is None else self._volume.inode(number)
        return Directory(inode.mode, inode.uid, inode.gid, inode.mtime_ns, parent, number)


def _attributes(directory: Directory) -> dict[str, int]:
    return {"mode": directory.mode, "uid": directory.uid, "gid": directory.gid, "mtime_ns": directory.mtime_ns}


def _reference(node: File | Directory) -> tuple[int, int]:
    if isinstance(node, File):
        return node.number, node.kind
    assert node.number is not None
    return node.number, pack.DIRECTORY
