"""EROFS structures as bytes, read back by the volume and held against the limits of the format."""

from __future__ import annotations

import errno
import os
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob
from obdlab.errors import FormatError
from obdlab.formats.checksum import raw_crc32c
from obdlab.volumes.erofs import pack
from obdlab.volumes.erofs.volume import Volume

numbers32 = st.integers(0, 0xFFFFFFFF)
names = st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name and b"\0" not in name)


def volume_with(inode: bytes, *, at: int = pack.BLOCK) -> Volume:
    """A volume of two blocks with these bytes at ``at``; the numbers of inodes count slots from the start."""
    disk = bytearray(2 * pack.BLOCK)
    raw = pack.superblock(root=128, inodes=1, blocks=2, chunks=True)
    disk[pack.SUPER_OFFSET : pack.SUPER_OFFSET + len(raw)] = raw
    disk[at : at + len(inode)] = inode
    return Volume(MemoryBlob(bytes(disk)))


@given(root=st.integers(0, 0xFFFF), inodes=st.integers(1, 1 << 63), blocks=numbers32, chunks=st.booleans())
def test_the_superblock_holds_what_it_was_given(root: int, inodes: int, blocks: int, chunks: bool) -> None:
    raw = pack.superblock(root=root, inodes=inodes, blocks=blocks, chunks=chunks)
    assert pack.SUPER_OFFSET + len(raw) == pack.BLOCK
    volume = Volume(MemoryBlob(bytes(pack.SUPER_OFFSET) + raw))
    assert (volume.root, volume.inodes, volume.blocks, volume.has_chunks) == (root, inodes, blocks, chunks)
    assert volume.block_size == pack.BLOCK


def test_all_other_fields_of_the_superblock_are_zero() -> None:
    # erofs_fs.h: magic, checksum, features, block size, slots, root, inodes, time (8 and 4), blocks, metadata's and
    # attributes' place, UUID, name, features, five numbers for compression and devices, directories, attributes.
    raw = pack.superblock(root=128, inodes=5, blocks=7, chunks=False)
    fields = struct.unpack_from("<IIIBBHQQIIII16s16sIHHHBBIQ", raw)
    assert fields[:1] + fields[2:12] == (0xE0F5E1E2, 3, 12, 0, 128, 5, 0, 0, 7, 0, 0)
    assert not any(fields[14:])
    assert not any(raw[64:])
    assert pack.superblock(root=128, inodes=5, blocks=7, chunks=True)[80:84] == b"\4\0\0\0"


@pytest.mark.parametrize(("layout", "start", "size", "good"), [
    (pack.PLAIN, 0, 1 << 60, True), (pack.PLAIN, 0, (1 << 60) + 1, False), (pack.INLINE, 0, (1 << 60) + 1, False),
    (pack.CHUNKED, 4, 1 << 40, True), (pack.CHUNKED, 4, (1 << 40) + 1, False), (pack.CHUNKED, 31, 1 << 60, True),
    (pack.CHUNKED, 31, (1 << 60) + 1, False), (1, 0, 0, False), (3, 0, 0, False),
])  # fmt: skip
def test_largest_files(layout: int, start: int, size: int, good: bool) -> None:
    raw = pack.inode(
        128,
        mode=stat.S_IFREG,
        uid=0,
        gid=0,
        size=size,
        mtime_ns=0,
        links=1,
        layout=layout,
        start=start,
        xattrs_size=0,
    )
    if good:
        assert volume_with(raw).inode(128).size == size
        return
    with pytest.raises(FormatError, match=r"impossible size|compressed"):
        volume_with(raw).inode(128)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"\xe3", "no EROFS.*got 0xe0f5e1e3, wanted 0xe0f5e1e2"),
        (12, b"\x08", "not known here: .*block size 2.8"),
        (12, b"\x11", "not known here: .*block size 2.17"),
        (80, b"\x02", "not known here: large compressed clusters"),
        (82, b"\x01", "not known here: features 0x10000"),
        (90, b"\x01", "not known here: .*directories 2.1"),
    ],
)
def test_other_superblocks(at: int, value: bytes, message: str) -> None:
    raw = bytearray(bytes(pack.SUPER_OFFSET) + pack.superblock(root=128, inodes=1, blocks=2, chunks=False))
    raw[pack.SUPER_OFFSET + at : pack.SUPER_OFFSET + at + len(value)] = value
    with pytest.raises(FormatError, match=message):
        Volume(MemoryBlob(bytes(raw)))


@pytest.mark.parametrize("bits", [9, 12, 16])
def test_block_sizes(bits: int) -> None:
    raw = bytearray(bytes(pack.SUPER_OFFSET) + pack.superblock(root=128, inodes=1, blocks=2, chunks=False))
    raw[pack.SUPER_OFFSET + 12] = bits
    assert Volume(MemoryBlob(bytes(raw))).block_size == 1 << bits


def test_the_checksum_covers_the_block_from_the_superblock_on() -> None:
    raw = bytearray(pack.superblock(root=128, inodes=5, blocks=7, chunks=False))
    (stored,) = struct.unpack_from("<I", raw, 4)
    struct.pack_into("<I", raw, 4, 0)  # it counts as zero in its own sum
    assert stored == raw_crc32c(bytes(raw), 0xFFFFFFFF)


@given(
    mode=st.integers(0, 0xFFFF), uid=numbers32, gid=numbers32, size=st.integers(0, 1 << 60), links=numbers32,
    mtime_ns=st.integers(-(1 << 60), 1 << 60), start=numbers32, entries=st.integers(0, 0xFFFF),
    layout=st.sampled_from([pack.PLAIN, pack.INLINE]),
)  # fmt: skip
def test_an_inode_holds_what_it_was_given(
    mode: int, uid: int, gid: int, size: int, links: int, mtime_ns: int, start: int, entries: int, layout: int
) -> None:
    xattrs_size = 12 + 4 * (entries - 1) if entries else 0
    raw = pack.inode(
        128, mode=mode, uid=uid, gid=gid, size=size, mtime_ns=mtime_ns, links=links, layout=layout, start=start,
        xattrs_size=xattrs_size,
    )  # fmt: skip
    assert len(raw) == pack.INODE_SIZE
    got = volume_with(raw).inode(128)
    assert (got.mode, got.uid, got.gid, got.size, got.links) == (mode, uid, gid, size, links)
    assert (got.mtime_ns, got.start, got.layout, got.xattrs_size) == (mtime_ns, start, layout, xattrs_size)
    assert got.body == pack.BLOCK + pack.INODE_SIZE + xattrs_size


@given(major=st.integers(0, 0xFFF), minor=st.integers(0, 0xFFFFF))
def test_devices_come_back(major: int, minor: int) -> None:
    raw = pack.inode(
        128, mode=stat.S_IFBLK, uid=0, gid=0, size=0, mtime_ns=0, links=1, layout=pack.PLAIN,
        start=pack.device(major, minor), xattrs_size=0,
    )  # fmt: skip
    assert volume_with(raw).inode(128).rdev == (major, minor)


@pytest.mark.parametrize(("major", "minor", "stored"), [(1, 3, 0x103), (259, 70_001, 0x11110371), (8, 256, 0x100800)])
def test_device_numbers_are_the_kernels(major: int, minor: int, stored: int) -> None:
    # include/linux/kdev_t.h, new_encode_dev()
    assert pack.device(major, minor) == stored


kinds = st.sampled_from([b"user.", b"trusted.", b"security."])
pairs = st.dictionaries(
    st.builds(lambda prefix, name: prefix + name, kinds, names) | st.just(b"system.posix_acl_access"),
    st.binary(max_size=300),
    max_size=4,
)


@given(pairs)
def test_attributes_come_back(wanted: dict[bytes, bytes]) -> None:
    body = pack.xattrs(wanted.items())
    assert len(body) % 4 == 0
    assert body == pack.xattrs(reversed(wanted.items()))
    raw = pack.inode(
        128, mode=stat.S_IFREG, uid=0, gid=0, size=0, mtime_ns=0, links=1, layout=pack.PLAIN, start=0,
        xattrs_size=len(body),
    )  # fmt: skip
    volume = volume_with(raw + body)
    found = volume.xattrs(volume.inode(128))
    assert len(found) == len(wanted)
    assert dict(found) == wanted


@pytest.mark.parametrize(
    ("pairs", "code"),
    [
        ([(b"user." + b"n" * 255, b"v" * 0xFFFF)], 0),
        ([(b"user." + b"n" * 256, b"")], errno.ERANGE),
        ([(b"user.n", b"v" * 0x10000)], errno.E2BIG),
        ([(b"system.other", b"v")], errno.EOPNOTSUPP),
        # 12 bytes, then three times 65536, then 4, the name's and the value's: at most 4 * 65535.
        ([(b"user.%d" % n, b"v" * 65531) for n in range(3)] + [(b"user.3", b"v" * 65515)], 0),
        ([(b"user.%d" % n, b"v" * 65531) for n in range(3)] + [(b"user.3", b"v" * 65516)], errno.E2BIG),
    ],
)
def test_limits_of_attributes(pairs: list[tuple[bytes, bytes]], code: int) -> None:
    if not code:
        assert len(pack.xattrs(pairs)) <= 12 + 4 * 0xFFFE
        return
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        pack.xattrs(pairs)
    assert caught.value.errno == code


@given(st.sets(names, max_size=60))
def test_a_directorys_size_is_known_before_its_content(found: set[bytes]) -> None:
    entries = [(name, number, pack.REGULAR) for number, name in enumerate(sorted({b".", b"..", *found}))]
    content = pack.directory(entries)
    assert pack.directory_size([name for name, _, _ in entries]) == len(content)
    volume = volume_with(b"")
    got = []
    for at in range(0, len(content), pack.BLOCK):
        got += list(volume._block_entries(content[at : at + pack.BLOCK]))
    assert got == entries


def test_a_block_of_a_directory_may_be_full_to_the_last_byte() -> None:
    # 12 bytes and the name for each: 15 of 255 bytes, and one of 79, are 4096 less the dots.
    names = [b"%03d" % n + b"n" * 252 for n in range(15)] + [b"~" * (4096 - 15 * 267 - 13 - 14 - 12)]
    listed = sorted([b".", b"..", *names])
    assert pack.directory_size(listed) == 4096
    assert pack.directory_size([*listed[:-1], listed[-1] + b"~"]) == 4096 + 12 + len(listed[-1]) + 1
