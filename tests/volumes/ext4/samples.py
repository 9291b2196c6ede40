"""Small file systems with one of everything."""

from __future__ import annotations

import struct

from obdlab.blob import Buffer, WritableBlob, check_range
from obdlab.call import Call
from obdlab.volumes.ext4.editor import Editor
from obdlab.volumes.ext4.layout import ROOT_INO, Inode, device_block
from obdlab.volumes.ext4.mkfs import make_filesystem

ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, number)
    for tag, permissions, number in (
        (1, 6, 0xFFFFFFFF),
        (2, 7, 1000),
        (4, 4, 0xFFFFFFFF),
        (16, 7, 0xFFFFFFFF),
        (32, 4, 0xFFFFFFFF),
    )
)


class MemoryDisk(WritableBlob):
    """A disk in memory."""

    def __init__(self, size: int) -> None:
        self.name = "memory"
        self.data = bytearray(size)

    @property
    def size(self) -> int:
        return len(self.data)

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        check_range(self, offset, length)
        return bytes(self.data[offset : offset + length])

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        check_range(self, offset, len(data))
        self.data[offset : offset + len(data)] = data

    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        self.write_at(offset, bytes(length))

    def flush(self) -> None:
        pass


def small_file_system() -> bytes:
    """Files, links, nodes, attributes, a file of many extents."""
    disk = MemoryDisk(1 << 20)
    make_filesystem(disk)
    editor = Editor(disk)
    folder = editor.add(ROOT_INO, b"folder", Inode(mode=0o41777, links=2))
    file = editor.with_content(Inode(mode=0o100644, uid=70000, gid=5), 5000, [(0, b"text" * 1250)])
    file = editor.with_xattrs(
        file, [(b"user.a", b"1"), (b"user.long", b"2" * 500), (b"system.posix_acl_access", ACL)]
    )
    editor.link(ROOT_INO, b"again", editor.add(folder, b"file", file))
    holes = [(number * 8192, b"x") for number in range(20)]
    editor.add(folder, b"holes", editor.with_content(Inode(mode=0o100600), 200_000, holes, sparse=True))
    for length in (10, 59, 60, 600):
        editor.add(folder, b"link%d" % length, editor.with_link(Inode(mode=0o120777), b"t" * length))
    editor.add(folder, b"node", Inode(mode=0o20600, block=device_block(300, 70000)))
    editor.add(folder, b"pipe", Inode(mode=0o10600))
    editor.finish()
    return bytes(disk.data)


def large_directory() -> bytes:
    """A directory that is a tree over hashes."""
    disk = MemoryDisk(4 << 20)
    make_filesystem(disk, inode_ratio=4096)
    editor = Editor(disk)
    folder = editor.add(ROOT_INO, b"large", Inode(mode=0o40755, links=2))
    number = editor.add(folder, b"first", Inode(mode=0o100644))
    for count in range(400):
        editor.link(folder, b"a rather long name for a link to a file, number %d" % count, number)
    editor.finish()
    return bytes(disk.data)
