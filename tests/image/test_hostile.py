"""File systems made to harm a reader in user space: sizes that are absurd, trees without an end."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from obdlab.blob import Blob, check_range
from obdlab.call import Call
from obdlab.errors import FormatError
from obdlab.volumes import tree
from obdlab.volumes.detect import FileTree
from obdlab.volumes.erofs import pack
from obdlab.volumes.erofs import volume as erofs
from obdlab.volumes.ext4 import volume as ext4
from obdlab.volumes.extract import Extractor
from obdlab.volumes.places import FilePlaces, FileVolume
from tests.convert.layouts import directory, member, tar_bytes
from tests.volumes.erofs.samples import file_system_of
from tests.volumes.ext4.samples import MemoryDisk, small_file_system

BOUND = 64 << 20


class Vast(Blob):
    """A disk of any size: some bytes at its beginning, zeros behind them."""

    def __init__(self, head: bytes, size: int) -> None:
        self.name = "vast"
        self._head = head
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        check_range(self, offset, length)
        return self._head[offset : offset + length].ljust(length, b"\0")


@contextmanager
def bounded(most: int = BOUND) -> Iterator[None]:
    """Fail if the block holds more than ``most`` at once, or takes as long as work without an end would."""
    tracemalloc.start()
    begin = time.monotonic()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
        assert time.monotonic() - begin < 120
    finally:
        tracemalloc.stop()


def many_groups() -> Vast:
    """An ext4 whose superblock counts 16 million groups."""
    data = bytearray(small_file_system())
    at = ext4.SUPER_OFFSET
    per_group, inodes_per_group = struct.unpack_from("<I4xI", data, at + 32)
    groups = 1 << 24
    inodes_per_group = min(inodes_per_group, 0xFFFFFFFF // groups // 16 * 16)
    blocks = groups * per_group
    struct.pack_into("<II", data, at, groups * inodes_per_group, blocks & 0xFFFFFFFF)
    struct.pack_into("<I", data, at + 40, inodes_per_group)
    struct.pack_into("<I", data, at + 336, blocks >> 32)
    block_size = 1024 << data[at + 24]
    return Vast(bytes(data), blocks * block_size)


def test_sixteen_million_groups_are_not_read() -> None:
    with bounded():
        tree = FileTree(many_groups())
        assert tree.find(b"/folder/file")


def chunked(size: int, bits: int) -> Vast:
    """An EROFS whose only file claims a size in chunks of 2^bits blocks, each of which is the disk's first block."""
    data = bytearray(file_system_of(tar_bytes([member("file", b"x" * 5000)])))
    data[pack.SUPER_OFFSET + 80] |= 4  # files in chunks
    volume = erofs.Volume(Vast(bytes(data), len(data)))
    number = volume.lookup(b"file") or 0
    raw = pack.inode(
        number, mode=0o100644, uid=0, gid=0, size=size, mtime_ns=0, links=1, layout=pack.CHUNKED, start=bits,
        xattrs_size=0,
    )  # fmt: skip
    data[number * pack.SLOT : number * pack.SLOT + len(raw)] = raw
    return Vast(bytes(data), 1 << 50)


def test_a_file_of_a_pebibyte() -> None:
    disk = chunked(1 << 50, 0)
    with bounded(), pytest.raises(FormatError, match="impossible size"):
        FilePlaces(disk)
    with bounded(), pytest.raises(FormatError, match="impossible size"):
        FileVolume(disk).places_of(b"/file")


def test_a_file_in_millions_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    share = 32  # of the pieces and of the memory for them: a million takes half a minute under tracemalloc
    monkeypatch.setattr(erofs, "MAX_PIECES", tree.MAX_PIECES // share)
    disk = chunked(tree.MAX_PIECES // share * 2 * pack.BLOCK, 0)
    files = FileTree(disk)
    inode = files.volume.inode(files.find(b"/file"))
    with bounded(BOUND // share), pytest.raises(FormatError, match="too many pieces"):
        for _ in files.volume.places(inode):  # type: ignore[arg-type]
            pass


def test_files_in_too_many_pieces_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obdlab.volumes.places._MAX_ROWS", 100)
    with pytest.raises(FormatError, match="too many pieces"):
        FilePlaces(chunked(200 * pack.BLOCK, 0))
    assert FilePlaces(chunked(50 * pack.BLOCK, 0)).sizes[b"/file"] == 50 * pack.BLOCK


def test_holes_are_copied_in_no_time(tmp_path: Path) -> None:
    data = bytearray(file_system_of(tar_bytes([member("file", b"x" * 5000)])))
    data[pack.SUPER_OFFSET + 80] |= 4
    number = erofs.Volume(Vast(bytes(data), len(data))).lookup(b"file") or 0
    size = 1 << 42  # as much as the file systems that tests run on can hold in one sparse file
    raw = pack.inode(
        number, mode=0o100644, uid=0, gid=0, size=size, mtime_ns=0, links=1, layout=pack.CHUNKED, start=20,
        xattrs_size=0,
    )  # fmt: skip
    at = number * pack.SLOT
    data[at : at + len(raw)] = raw
    chunks = -(-size // (pack.BLOCK << 20))
    data[at + len(raw) : at + len(raw) + 4 * chunks] = b"\xff" * 4 * chunks
    tree = FileTree(Vast(bytes(data), len(data)))
    with bounded():
        Extractor(tree).copy(number, bytes(tmp_path / "file"))
    assert (tmp_path / "file").stat().st_size == size
    assert (tmp_path / "file").stat().st_blocks == 0


def diamonds(depth: int) -> MemoryDisk:
    """Directories of which each has the next one twice, as "a" and "b": 2^depth paths."""
    paths = ["top" + "/a" * level for level in range(depth)]
    tar = tar_bytes([directory(name) for path in paths for name in (path, f"{path}/b")])
    disk = MemoryDisk(2 << 20)
    data = file_system_of(tar)
    disk.data[: len(data)] = data
    volume = erofs.Volume(disk)
    for path in paths[:-1]:
        number = volume.lookup(path.encode()) or 0
        (_, _, place), *_ = volume.places(volume.inode(number))
        entries = {name: child for name, (child, _) in volume.entries(number).items()}
        # ".", "..", "a", "b": twelve bytes each, the inode's number first.
        struct.pack_into("<Q", disk.data, place + 3 * 12, entries[b"a"])
    return disk


def test_a_directory_with_two_names_is_entered_once(tmp_path: Path) -> None:
    disk = diamonds(60)
    tree = FileTree(disk)
    with bounded(), pytest.raises(FormatError, match="twice"):
        list(tree.volume.walk())
    with bounded(), pytest.raises(FormatError, match="twice"):
        Extractor(tree).copy(tree.root, bytes(tmp_path / "copy"))


@pytest.mark.parametrize("kind", ["ext4", "erofs"])
def test_names_have_an_end(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if kind == "ext4":
        disk: Blob = Vast(small_file_system(), 1 << 20)
    else:
        disk = Vast(file_system_of(tar_bytes([member("one", b"1"), member("two", b"2")])), 2 << 20)
    tree = FileTree(disk)
    assert list(tree.volume.walk())
    monkeypatch.setattr(f"obdlab.volumes.{kind}.volume.MAX_NAMES", 1)
    with pytest.raises(FormatError, match="too many names"):
        tree.entries(tree.root)
    monkeypatch.undo()
    monkeypatch.setattr("obdlab.volumes.tree._MAX_PATHS", 100)
    with pytest.raises(FormatError, match="more names than an image has"):
        list(tree.volume.walk())
    with pytest.raises(FormatError, match="more names than an image has"):
        Extractor(tree).copy(tree.root, bytes(tmp_path / "copy"))


def test_too_deep(tmp_path: Path) -> None:
    names = ["/".join(["d"] * depth) for depth in range(1, 500)]
    disk = MemoryDisk(4 << 20)
    disk.data[: 2 << 20] = file_system_of(tar_bytes([directory(name) for name in names])).ljust(2 << 20, b"\0")
    tree = FileTree(disk)
    assert len(list(tree.volume.walk())) == 500
    with pytest.raises(FormatError, match="too deep"):
        Extractor(tree).copy(tree.root, bytes(tmp_path / "copy"))
