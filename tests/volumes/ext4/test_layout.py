"""Structures of ext4 as bytes and back, and which superblocks and nodes are refused."""

from __future__ import annotations

import datetime as dt
import stat
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.errors import FormatError
from obdlab.volumes.ext4 import layout
from obdlab.volumes.ext4.editor import Editor
from obdlab.volumes.ext4.layout import ROOT_INO, SUPER_OFFSET, SUPER_SIZE, Extent, Group, Inode, Superblock
from obdlab.volumes.ext4.mkfs import make_filesystem
from tests.volumes.ext4.disk import FileDisk
from tests.volumes.ext4.samples import MemoryDisk

if TYPE_CHECKING:
    from pathlib import Path

numbers16, numbers32, numbers48 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF), st.integers(0, (1 << 48) - 1)
EARLIEST, LATEST = -(1 << 31), 3 * (1 << 32) + (1 << 31) - 1  # 1901 and 2446, in seconds
times = st.integers(EARLIEST * 10**9, LATEST * 10**9 + 999_999_999)
inodes = st.builds(
    Inode, mode=numbers16, uid=numbers32, gid=numbers32, size=st.integers(0, (1 << 63) - 1), atime_ns=times,
    ctime_ns=times, mtime_ns=times, links=numbers16, sectors=numbers48, flags=numbers32,
    block=st.binary(min_size=60, max_size=60), acl_block=numbers48, tail=st.binary(min_size=96, max_size=96),
)  # fmt: skip


@given(inodes, st.sampled_from([0, 256, 4096 - 256]))
def test_inodes_come_back(inode: Inode, offset: int) -> None:
    raw = bytearray(b"\xff" * 4096)
    inode.write_to(raw, offset)
    assert Inode.parse(raw, offset, 256) == inode
    assert raw[:offset] == b"\xff" * offset
    assert raw[offset + 256 :] == b"\xff" * (4096 - 256 - offset)


@given(inodes)
def test_inodes_of_128_bytes_have_no_fractions_and_no_attributes(inode: Inode) -> None:
    raw = bytearray(256)
    inode.write_to(raw, 0)
    got = Inode.parse(raw, 0, 128)
    assert got.tail == b""
    assert (got.uid, got.gid, got.size, got.block, got.links) == (
        inode.uid, inode.gid, inode.size, inode.block, inode.links,
    )  # fmt: skip
    assert all(time % 10**9 == 0 and EARLIEST * 10**9 <= time < 1 << 61 for time in (got.mtime_ns, got.atime_ns))


@pytest.mark.parametrize(
    ("wanted_ns", "stored_ns"),
    [
        (EARLIEST * 10**9, EARLIEST * 10**9),
        (EARLIEST * 10**9 - 1, EARLIEST * 10**9),
        (-(1 << 80), EARLIEST * 10**9),
        (LATEST * 10**9 + 999_999_999, LATEST * 10**9 + 999_999_999),
        ((LATEST + 1) * 10**9, LATEST * 10**9),
        (1 << 80, LATEST * 10**9),
        (-1, -1),
        (((1 << 31) - 1) * 10**9 + 1, ((1 << 31) - 1) * 10**9 + 1),
        ((1 << 31) * 10**9, (1 << 31) * 10**9),
        ((1 << 32) * 10**9 + 5, (1 << 32) * 10**9 + 5),
    ],
)
def test_times_out_of_range_are_clipped(wanted_ns: int, stored_ns: int) -> None:
    raw = bytearray(256)
    Inode(mode=stat.S_IFREG, mtime_ns=wanted_ns, atime_ns=wanted_ns, ctime_ns=wanted_ns).write_to(raw, 0)
    got = Inode.parse(raw, 0, 256)
    assert (got.mtime_ns, got.atime_ns, got.ctime_ns) == (stored_ns,) * 3


def test_debugfs_shows_the_same_inode(tmp_path: Path) -> None:
    times = {"ctime": 5_000_000_000, "atime": 1_000_000_000, "mtime": 10_000_000_000}
    with FileDisk(tmp_path / "disk", 4 << 20) as disk:
        make_filesystem(disk)
        editor = Editor(disk)
        inode = Inode(mode=0o100640, uid=70_001, gid=1 << 30, links=1, flags=0x40)
        fields = {f"{name}_ns": value * 10**9 + 123_456_789 for name, value in times.items()}
        editor.add(ROOT_INO, b"file", inode.changed(**fields))
        editor.finish()
    shown = subprocess.run(
        ["debugfs", "-R", "stat file", str(tmp_path / "disk")], capture_output=True, text=True, check=True,
        env={"TZ": "UTC", "PATH": "/usr/bin:/usr/sbin:/bin:/sbin"},
    ).stdout  # fmt: skip
    words = " ".join(shown.split())
    assert "Mode: 0640" in words
    assert "User: 70001 Group: 1073741824" in words
    assert "Flags: 0x40" in words
    assert "Generation: 0 " in words
    for name, value in times.items():
        date = dt.datetime.fromtimestamp(value, dt.UTC).strftime("%a %b %e %H:%M:%S %Y")
        assert f"{name}: 0x{value & 0xFFFFFFFF:08x}:" in words
        assert " ".join(date.split()) in words


@given(st.integers(0, 0xFFF), st.integers(0, 0xFFFFF))
def test_device_numbers_come_back(major: int, minor: int) -> None:
    block = layout.device_block(major, minor)
    assert len(block) == 60
    assert Inode(mode=stat.S_IFCHR, block=block).rdev == (major, minor)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ((1, 3), (0x103, 0)), ((255, 255), (0xFFFF, 0)),
        ((256, 0), (0, 0x10000)), ((8, 256), (0, 0x100800)), ((259, 70_001), (0, 0x11110371)),
    ],
)  # fmt: skip
def test_device_numbers_are_the_kernels(device: tuple[int, int], words: tuple[int, int]) -> None:
    # fs/ext4/inode.c: in the old form if both fit into a byte, else in the new one, in the second word.
    assert struct.unpack_from("<II", layout.device_block(*device)) == words


extents = st.builds(Extent, numbers32, st.integers(1, layout.MAX_EXTENT), numbers48)


@given(st.lists(extents, max_size=340), st.sampled_from([60, 4096]))
def test_leaves_come_back(wanted: list[Extent], size: int) -> None:
    wanted = wanted[: (size - 12) // 12]
    raw = layout.extent_node(wanted, size)
    assert len(raw) == size
    assert layout.parse_node(raw) == (0, wanted, [])
    assert struct.unpack_from("<H", raw, 4)[0] == (size - 12) // 12  # as many as fit


@given(st.lists(st.tuples(numbers32, numbers48), min_size=1, max_size=340), st.integers(1, 5))
def test_inner_nodes_come_back(wanted: list[tuple[int, int]], depth: int) -> None:
    raw = layout.index_node(wanted, depth, 4096)
    assert len(raw) == 4096
    assert layout.parse_node(raw) == (depth, [], wanted)
    assert struct.unpack_from("<H", raw, 4)[0] == 340


@pytest.mark.parametrize(("offset", "value", "good"), [
    (0, 0xF30B, False), (2, 4, True), (2, 5, False), (6, 5, True), (6, 6, False),
])  # fmt: skip
def test_damaged_nodes(offset: int, value: int, good: bool) -> None:
    raw = bytearray(layout.extent_node([Extent(0, 1, 5)] * 4, 60))
    struct.pack_into("<H", raw, offset, value)
    if good:
        layout.parse_node(raw)
        return
    with pytest.raises(FormatError, match="damaged extent tree"):
        layout.parse_node(raw)


def test_an_extent_is_unwritten_above_its_longest_length() -> None:
    raw = bytearray(layout.extent_node([Extent(0, layout.MAX_EXTENT, 5)] * 3, 60))
    struct.pack_into("<H", raw, 12 + 12 + 4, layout.MAX_EXTENT + 1)
    struct.pack_into("<H", raw, 12 + 24 + 4, 2 * layout.MAX_EXTENT - 1)
    longest = layout.MAX_EXTENT
    assert [(e.length, e.unwritten) for e in layout.parse_node(raw)[1]] == [
        (longest, False), (1, True), (longest - 1, True),
    ]  # fmt: skip


@given(numbers48, numbers48, numbers48, numbers32, numbers32, numbers32)
def test_group_descriptors_come_back(
    blocks: int, inodes: int, table: int, free: int, unused: int, folders: int
) -> None:
    group = Group(blocks, inodes, table, free, unused, folders)
    raw = bytes(64) + group.to_bytes()
    assert len(raw) == 128
    assert Group.parse(raw, 64, wide=True) == group
    narrow = Group.parse(raw, 64, wide=False)
    assert narrow == Group(
        blocks & 0xFFFFFFFF, inodes & 0xFFFFFFFF, table & 0xFFFFFFFF, free & 0xFFFF, unused & 0xFFFF, folders & 0xFFFF
    )


def superblock() -> bytearray:
    disk = MemoryDisk(4 << 20)
    make_filesystem(disk)
    return bytearray(disk.data[SUPER_OFFSET : SUPER_OFFSET + SUPER_SIZE])


def test_free_counts_are_stored_in_64_and_32_bits() -> None:
    before = Superblock.parse(bytes(superblock()), 4 << 20)
    raw = before.with_free((5 << 32) | 7, 9)
    assert len(raw) == SUPER_SIZE
    assert struct.unpack_from("<II", raw, 12) == (7, 9)
    assert struct.unpack_from("<I", raw, 344) == (5,)
    changed = [at for at in range(SUPER_SIZE) if raw[at] != before.raw[at]]
    assert set(changed) <= {*range(12, 20), *range(344, 348)}


@pytest.mark.parametrize(
    ("offset", "form", "value", "message"),
    [
        (56, "<H", 0xEF52, "no ext4 superblock"),
        (96, "<I", 0x2C6, "journal has not been replayed"),
        (24, "<I", 7, "block size"),
        (24, "<I", 0xFFFFFFFF, "block size"),
        (4, "<I", 0, "size"),
        (4, "<I", 1025, "size.*1025 blocks.*at most 1024"),
        (336, "<I", 1, "size"),
        (32, "<I", 248, "blocks per group"),
        (32, "<I", 8 * 4096 + 8, "blocks per group"),
        (32, "<I", 1004, "blocks per group"),
        (20, "<I", 1, "first data block"),
        (88, "<H", 64, "inode size"),
        (88, "<H", 192, "inode size"),
        (88, "<H", 8192, "inode size"),
        (40, "<I", 0, "inodes per group"),
        (40, "<I", 8 * 4096 + 1, "inodes per group"),
        (0, "<I", 257, "inodes.*257.*256"),
        (254, "<H", 48, "descriptor size"),
        (254, "<H", 2048, "descriptor size"),
    ],
)
def test_impossible_superblocks(offset: int, form: str, value: int, message: str) -> None:
    raw = superblock()
    Superblock.parse(bytes(raw), 4 << 20)
    struct.pack_into(form, raw, offset, value)
    with pytest.raises(FormatError, match=message):
        Superblock.parse(bytes(raw), 4 << 20, "disk")


@pytest.mark.parametrize(("offset", "form", "value"), [
    (88, "<H", 128), (88, "<H", 4096), (254, "<H", 32), (254, "<H", 1024), (32, "<I", 8 * 4096),
])  # fmt: skip
def test_possible_superblocks(offset: int, form: str, value: int) -> None:
    raw = superblock()
    struct.pack_into(form, raw, offset, value)
    Superblock.parse(bytes(raw), 4 << 20)


@pytest.mark.parametrize("length", [0, 58, 1000, 1025])
def test_a_superblock_cut_short(length: int) -> None:
    with pytest.raises(FormatError, match="no ext4 superblock"):
        Superblock.parse(bytes(superblock() + bytes(1))[:length], 4 << 20)


def test_an_old_revision_has_inodes_of_128_bytes() -> None:
    raw = superblock()
    struct.pack_into("<I", raw, 76, 0)
    assert Superblock.parse(bytes(raw), 4 << 20).inode_size == 128


@pytest.mark.parametrize(("block_size", "first", "blocks", "groups"), [
    (1024, 1, 8193, 1), (1024, 1, 8194, 2), (4096, 0, 8192, 1), (4096, 0, 8193, 2),
])  # fmt: skip
def test_the_last_group_may_be_short(block_size: int, first: int, blocks: int, groups: int) -> None:
    raw = superblock()
    for offset, value in (
        (0, 256 * groups),
        (4, blocks),
        (20, first),
        (24, block_size // 2048),
        (32, 8192),
        (40, 256),
    ):
        struct.pack_into("<I", raw, offset, value)
    assert Superblock.parse(bytes(raw), 1 << 30).groups == groups
