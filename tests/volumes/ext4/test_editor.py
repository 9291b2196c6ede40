"""Changing file systems, beside a model; e2fsck and the kernel have the last word."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.convert.compare.listing import differences, list_tree, list_volume
from obdlab.volumes.ext4 import changes, directory
from obdlab.volumes.ext4.editor import Editor
from obdlab.volumes.ext4.layout import ROOT_INO, Inode, device_block
from obdlab.volumes.ext4.mkfs import make_filesystem
from obdlab.volumes.ext4.volume import Volume
from tests.volumes.ext4.disk import FileDisk, fsck
from tests.volumes.ext4.model import FILE, FOLDER, change, file_of, model_of
from tests.volumes.ext4.samples import ACL, MemoryDisk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 32))
def test_against_a_model(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    draw = random.Random(seed)
    path = tmp_path_factory.mktemp("model") / "disk"
    model: dict[bytes, str] = {}
    with FileDisk(path, 96 << 20) as disk:
        make_filesystem(disk, inode_ratio=draw.choice([4096, 8192]))
        for _ in range(draw.randint(1, 4)):
            editor = Editor(disk)
            for _ in range(draw.randint(1, 40)):
                change(draw, editor, model)
            editor.finish()
            assert model_of(disk) == model
    assert fsck(path) == ""


def test_a_small_change_writes_little(tmp_path: Path) -> None:
    with FileDisk(tmp_path / "disk", 64 << 30) as disk:
        make_filesystem(disk)
        editor = Editor(disk)
        for number in range(3000):
            editor.add(ROOT_INO, b"file %d" % number, file_of(editor, b"x" * 100))
        editor.finish()
        before = disk.written
        editor = Editor(disk)
        editor.remove(ROOT_INO, b"file 7")
        editor.add(ROOT_INO, b"file 7", file_of(editor, os.urandom(8192)))
        editor.finish()
        assert disk.written - before <= 65536
    assert fsck(tmp_path / "disk") == ""


def test_same_calls_same_bytes() -> None:
    images = []
    for _ in range(2):
        disk = MemoryDisk(8 << 20)
        make_filesystem(disk)
        for layer in range(3):
            editor = Editor(disk)
            for number in range(50):
                editor.add(ROOT_INO, b"%d.%d" % (layer, number), file_of(editor, b"y" * 500 * number))
            editor.finish()
        images.append(bytes(disk.data))
    assert images[0] == images[1]


def test_metadata_that_is_written_early_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = []
    for number, held in enumerate((1 << 20, 5)):
        monkeypatch.setattr(changes, "_MOST_HELD", held)
        with FileDisk(tmp_path / f"disk{number}", 96 << 20) as disk:
            make_filesystem(disk)
            for layer in range(3):
                editor = Editor(disk)
                folder = editor.add(ROOT_INO, b"folder %d" % layer, FOLDER)
                for file in range(300):
                    editor.add(folder, b"file %d" % file, file_of(editor, b"%d %d" % (layer, file)))
                if layer:
                    editor.remove(ROOT_INO, b"folder %d" % (layer - 1))
                holes = [(at * 8192, b"x") for at in range(2000)]
                editor.add(ROOT_INO, b"holes %d" % layer, editor.with_content(FILE, 1 << 24, holes, sparse=True))
                editor.finish()
            contents.append(list_volume(Volume(disk)))
        assert fsck(tmp_path / f"disk{number}") == ""
    assert contents[0] == contents[1]


@pytest.mark.parametrize("sparse", [False, True])
def test_a_file_that_one_extent_cannot_map(tmp_path: Path, sparse: bool) -> None:
    # An extent maps 32,768 blocks (128 MiB) at most; a longer one would be read as unwritten.
    pieces = [(number << 20, bytes([number]) * (1 << 20)) for number in range(130)]
    size = len(pieces) << 20
    with FileDisk(tmp_path / "disk", 1 << 30) as disk:
        make_filesystem(disk)
        editor = Editor(disk)
        number = editor.add(ROOT_INO, b"file", editor.with_content(FILE, size, pieces, sparse=sparse))
        editor.finish()
        volume = Volume(disk)
        extents = volume.extents(volume.inode(number))
        assert max(extent.length for extent in extents) == 32768
        assert sum(extent.length for extent in extents) == size // 4096
        content = volume.content(volume.inode(number))
        assert all(piece == next(content) for _, piece in pieces)
    assert fsck(tmp_path / "disk") == ""


def test_a_block_of_attributes_is_freed_with_its_last_use(tmp_path: Path) -> None:
    # Attributes that do not fit into the inode take a block: one that nothing frees is lost to the file system.
    with FileDisk(tmp_path / "disk", 4 << 20) as disk:
        make_filesystem(disk)
        large, larger = [(b"user.a", b"1" * 2000)], [(b"user.a", b"2" * 3000)]
        editor = Editor(disk)
        unused = editor.blocks.left
        editor.add(ROOT_INO, b"removed", editor.with_xattrs(FILE, large))
        changed = editor.add(ROOT_INO, b"changed", editor.with_xattrs(FILE, large))
        cleared = editor.add(ROOT_INO, b"cleared", editor.with_xattrs(FILE, large))
        assert editor.blocks.left == unused - 3
        editor.finish()
        editor = Editor(disk)
        editor.remove(ROOT_INO, b"removed")
        editor.set_inode(changed, editor.with_xattrs(editor.inode(changed), larger))
        editor.set_inode(cleared, editor.with_xattrs(editor.inode(cleared), []))
        assert editor.blocks.left == unused - 1
        editor.finish()
        volume = Volume(disk)
        assert volume.xattrs(volume.inode(changed)) == larger
        assert (volume.inode(changed).sectors, volume.inode(cleared).sectors) == (8, 0)
        assert volume.xattrs(volume.inode(cleared)) == []
    assert fsck(tmp_path / "disk") == ""


def test_a_shared_block_of_attributes_stays_for_the_others(tmp_path: Path) -> None:
    # The kernel lets files of the same attributes share a block, and counts its users there.
    pairs = [(b"user.a", b"1" * 2000)]
    with FileDisk(tmp_path / "disk", 4 << 20) as disk:
        make_filesystem(disk)
        editor = Editor(disk)
        inode = editor.with_xattrs(FILE, pairs)
        names = [b"one", b"two", b"three"]
        for name in names:
            editor.add(ROOT_INO, name, inode)
        struct.pack_into("<I", editor.writable(inode.acl_block), 4, len(names))
        editor.finish()
        assert fsck(tmp_path / "disk") == ""
        for name in names:
            editor = Editor(disk)
            unused = editor.blocks.left
            editor.remove(ROOT_INO, name)
            assert editor.blocks.left == unused + (name == names[-1])
            editor.finish()
            assert fsck(tmp_path / "disk") == ""
            volume = Volume(disk)
            for number, _ in volume.entries(ROOT_INO).values():
                assert volume.xattrs(volume.inode(number)) == pairs


@pytest.mark.kernel
def test_the_kernel_sees_the_same(tmp_path: Path) -> None:
    image, mounted = tmp_path / "disk", tmp_path / "mounted"
    mounted.mkdir()
    with FileDisk(image, 1 << 30) as disk:
        make_filesystem(disk)
        editor = Editor(disk)
        folder = editor.add(ROOT_INO, b"large", FOLDER)
        for number in range(30_000):
            editor.add(folder, b"name %d" % number, FILE)
        pieces = [(number * 8192, b"%d" % number) for number in range(3000)]
        editor.add(ROOT_INO, b"fragments", editor.with_content(FILE, 3000 * 8192, pieces, sparse=True))
        attributes = [(b"user.a", b"1"), (b"user.big", b"2" * 3000), (b"system.posix_acl_access", ACL)]
        editor.add(ROOT_INO, b"attributes", editor.with_xattrs(FILE.changed(mode=0o100674), attributes))
        editor.finish()
        editor = Editor(disk)
        for number in range(0, 30_000, 7):
            editor.remove(folder, b"name %d" % number)
        for number in range(500):
            editor.add(folder, b"added %d" % number, FILE)
        editor.finish()
        got = list_volume(Volume(disk))
    assert fsck(image) == ""
    subprocess.run(["mount", "-o", "loop", str(image), str(mounted)], check=True)
    try:
        assert differences(got, list_tree(mounted)) == []
        assert (mounted / "large" / "name 29999").exists()
        assert not (mounted / "large" / "name 21").exists()
        for number in range(300):  # the kernel goes on from there
            (mounted / "large" / f"by the kernel {number}").touch()
        (mounted / "large" / "name 1").unlink()
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
    assert fsck(image) == ""


def test_what_a_file_system_cannot_do() -> None:
    disk = MemoryDisk(1 << 20)
    make_filesystem(disk)
    editor = Editor(disk)
    number = editor.add(ROOT_INO, b"file", FILE)
    wrong: list[tuple[int, Callable[[], object]]] = [
        (errno.EEXIST, lambda: editor.add(ROOT_INO, b"file", FILE)),
        (errno.ENAMETOOLONG, lambda: editor.add(ROOT_INO, b"n" * 256, FILE)),
        (errno.EPERM, lambda: editor.link(ROOT_INO, b"again", ROOT_INO)),
        (errno.ENOSPC, lambda: editor.with_content(FILE, 1 << 20, [])),
        (errno.EFBIG, lambda: editor.with_content(FILE, 1 << 60, [], sparse=True)),
        (errno.ENAMETOOLONG, lambda: editor.with_link(Inode(mode=0o120777), b"t" * 4096)),
        (errno.E2BIG, lambda: editor.with_xattrs(FILE, [(b"user.a", bytes(5000))])),
        (errno.EINVAL, lambda: editor.with_xattrs(FILE, [(b"system.posix_acl_access", b"nonsense")])),
    ]
    for code, call in wrong:
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == code
    editor.set_inode(number, editor.inode(number).changed(links=65000))
    with pytest.raises(OSError, match="Too many links"):
        editor.link(ROOT_INO, b"one more", number)
    while editor.inodes.left:
        editor.add(ROOT_INO, b"inode %d" % editor.inodes.left, FILE)
    with pytest.raises(OSError, match="No space left"):
        editor.add(ROOT_INO, b"one more", FILE)


@pytest.mark.parametrize("pieces", [0, 1, 4, 5, 340, 341, 4 * 340, 4 * 340 + 1])
def test_a_files_extents_are_freed_with_it(tmp_path: Path, pieces: int) -> None:
    # Four extents lie in the inode, 340 in a block, and four blocks below the inode.
    with FileDisk(tmp_path / "disk", 32 << 20) as disk:
        make_filesystem(disk)
        editor = Editor(disk)
        unused = editor.blocks.left
        content = [(number * 8192, b"%d" % number) for number in range(pieces)]
        inode = editor.with_content(FILE, pieces * 8192, content, sparse=True)
        nodes = 0 if pieces <= 4 else -(-pieces // 340) + (pieces > 4 * 340)
        assert unused - editor.blocks.left == pieces + nodes
        assert inode.sectors == (pieces + nodes) * 8
        number = editor.add(ROOT_INO, b"file", inode)
        editor.finish()
        assert fsck(tmp_path / "disk") == ""
        volume = Volume(disk)
        assert len(volume.extents(volume.inode(number))) == pieces
        wanted = bytearray(pieces * 8192)
        for at, piece in content:
            wanted[at : at + len(piece)] = piece
        assert b"".join(volume.content(volume.inode(number))) == wanted
        editor = Editor(disk)
        assert editor.remove(ROOT_INO, b"file") == 1
        editor.finish()
        editor = Editor(disk)
        assert editor.blocks.left == unused
    assert fsck(tmp_path / "disk") == ""


def test_directories_are_counted_in_their_groups(tmp_path: Path) -> None:
    with FileDisk(tmp_path / "disk", 260 << 20) as disk:
        make_filesystem(disk, inode_ratio=1 << 20)
        per_group = Volume(disk).superblock.inodes_per_group
        editor = Editor(disk)
        numbers = [editor.add(ROOT_INO, b"%d" % number, FOLDER) for number in range(per_group + 20)]
        assert per_group in numbers
        editor.finish()
        assert fsck(tmp_path / "disk") == ""
        editor = Editor(disk)
        for name, number in enumerate(numbers):
            if number in (per_group - 1, per_group, per_group + 1):
                editor.remove(ROOT_INO, b"%d" % name)
        editor.finish()
        counts = [Volume(disk)._group(group).directories for group in (0, 1)]
        assert sum(counts) == per_group + 20 - 3 + 1
    assert fsck(tmp_path / "disk") == ""


def test_every_type_of_file(tmp_path: Path) -> None:
    with FileDisk(tmp_path / "disk", 4 << 20) as disk:
        make_filesystem(disk)
        editor = Editor(disk)
        kinds = {
            stat.S_IFREG: 1,
            stat.S_IFCHR: 3,
            stat.S_IFBLK: 4,
            stat.S_IFIFO: 5,
            stat.S_IFSOCK: 6,
            stat.S_IFLNK: 7,
        }
        for kind in kinds:
            inode = Inode(mode=kind | 0o644)
            if kind in (stat.S_IFCHR, stat.S_IFBLK):
                inode = inode.changed(block=device_block(1, 3))
            elif kind == stat.S_IFLNK:
                inode = editor.with_link(inode, b"target")
            elif kind == stat.S_IFREG:
                inode = editor.with_content(inode, 0, [])
            editor.add(ROOT_INO, b"%o" % kind, inode)
        editor.add(ROOT_INO, b"folder", FOLDER)
        editor.finish()
        found = {name: kind for name, (_, kind) in Volume(disk).entries(ROOT_INO).items()}
        assert found == {b"folder": 2, **{b"%o" % kind: number for kind, number in kinds.items()}}
    assert fsck(tmp_path / "disk") == ""


def test_free_blocks_of_empty_full_and_mixed_groups(tmp_path: Path) -> None:
    with FileDisk(tmp_path / "disk", 512 << 20) as disk:
        make_filesystem(disk)
        editor = Editor(disk)
        unused = editor.blocks.left
        first = editor.blocks.free[0]
        inode = Inode(mode=0o100644, size=(first + 32768) * 4096)
        runs = editor.blocks.take(first + 32768)  # groups 0 and 1, of four
        block, nodes = editor.extent_tree(changes.extents_of(runs))
        sectors = (first + 32768 + nodes) * 8
        editor.add(ROOT_INO, b"file", inode.changed(block=block, flags=0x80000, sectors=sectors))
        editor.finish()
        free = list(Volume(disk).free_blocks())
        assert sum(count for _, count in free) == unused - first - 32768 - nodes
        assert [count for _, count in free][-1] == 32768
        assert all(begin >= 2 * 32768 for begin, _ in free)
    assert fsck(tmp_path / "disk") == ""


def test_a_removal_returns_the_count_of_names() -> None:
    disk = MemoryDisk(1 << 20)
    make_filesystem(disk)
    editor = Editor(disk)
    folder = editor.add(ROOT_INO, b"folder", FOLDER)
    inner = editor.add(folder, b"inner", FOLDER)
    file = editor.add(inner, b"file", FILE)
    editor.link(inner, b"again", file)
    assert editor.remove(inner, b"again") == 1
    assert editor.inode(file).links == 1
    assert editor.remove(ROOT_INO, b"folder") == 3
    assert editor.entries(ROOT_INO) == {}


def test_the_largest_file() -> None:
    disk = MemoryDisk(1 << 20)
    make_filesystem(disk)
    editor = Editor(disk)
    largest = ((1 << 32) - 1) * 4096
    number = editor.add(ROOT_INO, b"file", editor.with_content(FILE, largest, [(largest - 1, b"x")], sparse=True))
    with pytest.raises(OSError, match="File too large"):
        editor.with_content(FILE, largest + 1, [], sparse=True)
    editor.finish()
    volume = Volume(disk)
    assert volume.read(volume.inode(number), largest - 2, 10) == b"\0x"


def test_a_leaf_of_a_directory_is_filled_to_the_last_byte(tmp_path: Path) -> None:
    # A name goes into the leaf of its hash as long as it fits, and only then is the whole directory written again.
    with FileDisk(tmp_path / "disk", 16 << 20) as disk:
        make_filesystem(disk)
        editor = Editor(disk)
        folder = editor.add(ROOT_INO, b"folder", FOLDER)
        for number in range(200):
            editor.add(folder, b"%03d" % number + b"n" * 53, FILE)
        editor.finish()
        blocks = Volume(disk)._block_numbers(Volume(disk).inode(folder))
        seed = Volume(disk).superblock.hash_seed
        leaf = [disk.read_at(block * 4096, 4096) for block in blocks]
        room = {place: 4096 - directory.used_in(directory.parse_block(raw)) for place, raw in enumerate(leaf[1:], 1)}
        place, free = next((place, free) for place, free in room.items() if free >= 144)
        sizes = [128] * ((free - 16) // 128)
        chosen: list[bytes] = []
        for size in (*sizes, free - sum(sizes)):
            names = [(b"%06d" % number).ljust(size - 8, b"f") for number in range(2000)]
            hashes = dict(zip(names, directory.hash_names(names, seed).tolist(), strict=True))
            chosen.append(next(n for n in names if n not in chosen and directory.leaf_of(leaf, hashes[n]) == place))
        editor = Editor(disk)
        for name in chosen:
            editor.add(folder, name, FILE)
        editor.finish()
        volume = Volume(disk)
        assert volume._block_numbers(volume.inode(folder)) == blocks
        assert directory.used_in(directory.parse_block(disk.read_at(blocks[place] * 4096, 4096))) == 4096
        assert set(chosen) <= set(volume.entries(folder))
    assert fsck(tmp_path / "disk") == ""


def test_attributes_come_back() -> None:
    disk = MemoryDisk(1 << 20)
    make_filesystem(disk)
    editor = Editor(disk)
    pairs = [
        (b"user.a", b"1"),
        (b"security.capability", b"\1\0\0\2" + bytes(16)),
        (b"user.b", b"v" * 2000),
        (b"user.e", b""),
    ]
    number = editor.add(ROOT_INO, b"file", editor.with_xattrs(FILE, [*pairs, (b"odd.name", b"left out")]))
    link = editor.with_xattrs(Inode(mode=0o120777), [(b"user.refused", b"1"), (b"security.kept", b"2")])
    editor.add(ROOT_INO, b"link", editor.with_link(link, b"target"))
    editor.finish()
    volume = Volume(disk)
    assert sorted(volume.xattrs(volume.inode(number))) == sorted(pairs)
    assert volume.xattrs(volume.inode(volume.lookup(b"link") or 0)) == [(b"security.kept", b"2")]
