"""Changing file systems that the original's tools made, or that were made with its options."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import obdlab
from obdlab.convert.compare.listing import differences, list_tree, list_volume
from obdlab.errors import FormatError
from obdlab.volumes.ext4.editor import Editor
from obdlab.volumes.ext4.layout import ROOT_INO, SUPER_OFFSET
from obdlab.volumes.ext4.mkfs import make_filesystem
from obdlab.volumes.ext4.volume import Volume
from tests.volumes.ext4.disk import FileDisk, fsck
from tests.volumes.ext4.model import FILE, FOLDER, change, file_of, model_of
from tests.volumes.ext4.samples import MemoryDisk

if TYPE_CHECKING:
    from collections.abc import Iterator

GOLDEN = Path(__file__).parents[2] / "golden" / "ext4"
#: The features that the original's built-in mkfs sets.
FEATURES = (
    "none,ext_attr,resize_inode,dir_index,sparse_super,sparse_super2,filetype,extent,64bit,flex_bg,large_file,"
    "huge_file,dir_nlink,extra_isize"
)


def mke2fs(path: Path, size: int, features: str = FEATURES, *more: str) -> None:
    """Make a file system with the original's options."""
    options = ("-b", "4096", "-I", "256", "-i", "16384", "-m", "5", "-O", features)
    if ",flex_bg" in features and "^flex_bg" not in features:
        options += ("-G", "1")
    path.touch()
    os.truncate(path, size)
    subprocess.run(["mke2fs", "-q", "-F", *options, *more, str(path)], check=True, timeout=60)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """File systems on sparse files: an empty one, then those of the one and the two layers that the original made."""
    found = [tmp_path_factory.mktemp("original") / f"{depth}.disk" for depth in range(3)]
    mke2fs(found[0], 512 << 20)
    for depth, path in enumerate(found[1:], 1):
        layers = [str(GOLDEN / f"layer{number}.obd") for number in range(1, depth + 1)]
        with obdlab.open_stack(layers) as stack, FileDisk(path, stack.size) as disk:
            for owned in stack.owners():
                if owned.layer is not None and not owned.zeroed:
                    disk.write_at(owned.begin, stack.read_at(owned.begin, owned.end - owned.begin))
    return found


@contextmanager
def copied(original: Path, path: Path) -> Iterator[FileDisk]:
    """A copy of a file system, as a disk."""
    subprocess.run(["cp", "--sparse=always", str(original), str(path)], check=True, timeout=60)
    with FileDisk(path) as disk:
        yield disk


@pytest.mark.parametrize("depth", [1, 2])
def test_what_the_original_made_takes_changes(tmp_path: Path, originals: list[Path], depth: int) -> None:
    path = tmp_path / "disk"
    with copied(originals[depth], path) as disk:
        before = list_volume(Volume(disk))
        editor = Editor(disk)
        editor.add(ROOT_INO, b"added", file_of(editor, b"x" * 5000))
        editor.finish()
        after = list_volume(Volume(disk))
        assert differences(after, before, ignore_at={".": ["mtime_ns"]}) == ["added: not wanted"]
    # The original's own superblock has wrong free counts, and lost+found a tree that misses a block.
    assert fsck(path) == ""


def test_every_path_can_be_removed(tmp_path: Path, originals: list[Path]) -> None:
    path = tmp_path / "disk"
    with copied(originals[2], path) as disk:
        editor = Editor(disk)
        for name in list(editor.entries(ROOT_INO)):
            editor.remove(ROOT_INO, name)
        editor.finish()
        assert model_of(disk) == {}
    assert fsck(path) == ""


def test_lost_and_found_takes_names(tmp_path: Path, originals: list[Path]) -> None:
    path = tmp_path / "disk"
    with copied(originals[1], path) as disk:
        editor = Editor(disk)
        folder = editor.lookup(b"lost+found") or 0
        for number in range(400):
            editor.add(folder, b"a name that takes room in the directory %d" % number, FILE)
        editor.finish()
        assert len(model_of(disk)) == 400 + 207
    assert fsck(path) == ""


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1 << 32))
def test_against_a_model(tmp_path_factory: pytest.TempPathFactory, originals: list[Path], seed: int) -> None:
    draw = random.Random(seed)
    path = tmp_path_factory.mktemp("model") / "disk"
    with copied(draw.choice(originals), path) as disk:
        model = model_of(disk)
        for _ in range(draw.randint(1, 4)):
            editor = Editor(disk)
            for _ in range(draw.randint(1, 40)):
                change(draw, editor, model)
            editor.finish()
            assert model_of(disk) == model
    assert fsck(path) == ""


@pytest.mark.kernel
@pytest.mark.parametrize("depth", [0, 2])
def test_the_kernel_sees_the_same(tmp_path: Path, originals: list[Path], depth: int) -> None:
    path, mounted = tmp_path / "disk", tmp_path / "mounted"
    mounted.mkdir()
    with copied(originals[depth], path) as disk:
        for layer in range(2):
            editor = Editor(disk)
            folder = editor.add(ROOT_INO, b"folder %d" % layer, FOLDER)
            for number in range(3000):
                editor.add(folder, b"name %d" % number, file_of(editor, b"%d" % number))
            editor.add(ROOT_INO, b"large %d" % layer, file_of(editor, os.urandom(140 << 20)))  # more than a group
            if layer:
                editor.remove(ROOT_INO, b"large 0")
            editor.finish()
        got = list_volume(Volume(disk))
    assert fsck(path) == ""
    subprocess.run(["mount", "-o", "loop", str(path), str(mounted)], check=True, timeout=60)
    try:
        assert differences(list_tree(mounted), got) == []
        (mounted / "folder 1" / "by the kernel").write_bytes(b"x" * 100_000)
        (mounted / "lost+found").rmdir()
    finally:
        subprocess.run(["umount", str(mounted)], check=True, timeout=60)
    assert fsck(path) == ""
    with FileDisk(path) as disk:  # and from there on again
        editor = Editor(disk)
        editor.remove(editor.lookup(b"folder 1") or 0, b"by the kernel")
        editor.finish()
    assert fsck(path) == ""


@pytest.mark.parametrize(
    ("features", "more", "message"),
    [
        (f"{FEATURES},has_journal", (), "features that cannot be changed here.*got compat 0x4[)]$"),
        (f"{FEATURES},metadata_csum", (), "features that cannot be changed here.*got ro_compat 0x400[)]$"),
        (f"{FEATURES},inline_data,metadata_csum_seed,metadata_csum", (), "features that"),
        (f"{FEATURES},quota", (), "features that cannot be changed here.*got ro_compat 0x100[)]$"),
        (f"{FEATURES},^extent,^64bit", (), "lacks features.*wanted incompat 0xc0"),
        (f"{FEATURES},^filetype", (), "lacks features.*wanted incompat 0x2"),
        (f"{FEATURES},^dir_index", (), "lacks features.*wanted compat 0x20"),
        (f"{FEATURES},^huge_file,^dir_nlink", (), "lacks features.*wanted ro_compat 0x28"),
        (FEATURES, ("-I", "512"), "these sizes.*512"),
        (FEATURES, ("-b", "1024"), "these sizes.*1024"),
    ],
)
def test_what_is_not_covered_is_refused(tmp_path: Path, features: str, more: tuple[str, ...], message: str) -> None:
    path = tmp_path / "disk"
    mke2fs(path, 64 << 20, features, *more)
    with FileDisk(path) as disk, pytest.raises(FormatError, match=message):
        Editor(disk)


@pytest.mark.parametrize(
    "less", ["^sparse_super,^resize_inode", "^sparse_super2", "^flex_bg", "^resize_inode", "none,ext_attr,dir_index"]
)
def test_features_that_change_nothing_here_may_be_missing(tmp_path: Path, less: str) -> None:
    path = tmp_path / "disk"
    needed = "filetype,extent,64bit,large_file,huge_file,dir_nlink,extra_isize"
    mke2fs(path, 300 << 20, f"{less},{needed}" if "none" in less else f"{FEATURES},{less}")
    with FileDisk(path) as disk:
        editor = Editor(disk)
        folder = editor.add(ROOT_INO, b"folder", FOLDER)
        for number in range(50):
            editor.add(folder, b"%d" % number, file_of(editor, b"%d" % number * 5000))
        editor.finish()
        assert len(model_of(disk)) == 52
    assert fsck(path) == ""


@pytest.mark.parametrize("bit", [0x400, 0x1000, 0x8000, 0x10000, 0x20000, 1 << 31])
def test_features_that_this_code_has_no_name_for_cannot_be_read(bit: int) -> None:
    disk = MemoryDisk(1 << 20)
    make_filesystem(disk)
    found = struct.unpack_from("<I", disk.data, SUPER_OFFSET + 96)[0]
    struct.pack_into("<I", disk.data, SUPER_OFFSET + 96, found | bit)
    with pytest.raises(FormatError, match=f"not known here.*{bit:#x}"):
        Volume(disk)


def test_flags_of_a_directory_that_is_written_whole_are_kept() -> None:
    disk = MemoryDisk(4 << 20)
    make_filesystem(disk)
    editor = Editor(disk)
    folder = editor.add(ROOT_INO, b"folder", FOLDER.changed(flags=0x40))  # nodump
    editor.finish()
    assert Volume(disk).inode(folder).flags == 0x80040


@pytest.mark.parametrize(
    ("offset", "value", "got"), [(352, 2, "version 1, unsigned"), (252, 2, "version 2"), (252, 0, "version 0")]
)
def test_another_hash_of_names_is_refused(offset: int, value: int, got: str) -> None:
    disk = MemoryDisk(1 << 20)
    make_filesystem(disk)
    disk.data[SUPER_OFFSET + offset] = value
    with pytest.raises(FormatError, match="hash of names") as caught:
        Editor(disk)
    assert caught.value.got == got


def test_a_block_map_is_refused_before_anything_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    mke2fs(path, 64 << 20, f"{FEATURES},^extent,^64bit")  # its lost+found has a block map
    subprocess.run(["tune2fs", "-O", "extent", str(path)], check=True, capture_output=True, timeout=60)
    subprocess.run(["resize2fs", "-b", str(path)], check=True, capture_output=True, timeout=60)
    with FileDisk(path) as disk:
        editor = Editor(disk)
        with pytest.raises(FormatError, match="block map"):
            editor.remove(ROOT_INO, b"lost+found")


def test_attributes_beside_fewer_fields_are_kept(tmp_path: Path) -> None:
    # Kernels before 4.5 left 28 bytes for the fixed fields: four bytes more for attributes than there are here.
    disk = MemoryDisk(4 << 20)
    make_filesystem(disk)
    editor = Editor(disk)
    pairs = [(b"user.a", b"v" * 62)]
    number = editor.add(ROOT_INO, b"file", editor.with_xattrs(FILE, pairs))
    editor.finish()
    block, offset = Volume(disk)._place(number)
    at = block * 4096 + offset + 128
    tail = disk.data[at + 32 : at + 128]
    disk.data[at : at + 128] = struct.pack("<H", 28).ljust(28, b"\0") + tail[:-64] + bytes(4) + tail[-64:]
    entry_offset = struct.unpack_from("<H", disk.data, at + 28 + 4 + 2)[0]
    struct.pack_into("<H", disk.data, at + 28 + 4 + 2, entry_offset + 4)
    volume = Volume(disk)
    assert volume.xattrs(volume.inode(number)) == pairs
    editor = Editor(disk)
    editor.link(ROOT_INO, b"again", number)
    editor.finish()
    volume = Volume(disk)
    assert volume.xattrs(volume.inode(number)) == pairs
    (tmp_path / "disk").write_bytes(disk.data)
    assert fsck(tmp_path / "disk") == ""
