"""File systems made by the kernel and its tools are read as the kernel reads them."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from obdlab.blob import MemoryBlob
from obdlab.convert.compare.listing import differences, list_tree, list_volume
from obdlab.errors import FormatError
from obdlab.volumes.ext4 import volume as volume_module
from obdlab.volumes.ext4.editor import Editor
from obdlab.volumes.ext4.volume import Volume
from tests.volumes.ext4.disk import FileDisk
from tests.volumes.ext4.samples import MemoryDisk, large_directory, small_file_system

if TYPE_CHECKING:
    from pathlib import Path

KINDS = {
    "ext4 as mkfs makes it": ["mkfs.ext4"],
    "ext4 in blocks of 1 KiB": ["mkfs.ext4", "-b", "1024"],
    "ext2": ["mkfs.ext2", "-b", "1024"],
    "ext4 with meta_bg": ["mkfs.ext4", "-O", "meta_bg,^resize_inode", "-b", "1024", "-g", "1024"],
    "small inodes": ["mkfs.ext4", "-I", "128"],
}


@pytest.mark.kernel
@pytest.mark.parametrize("kind", KINDS)
def test_lists_as_the_kernel_does(kind: str, tmp_path: Path) -> None:
    image, mounted = tmp_path / "disk", tmp_path / "mounted"
    FileDisk(image, 48 << 20).close()
    mounted.mkdir()
    subprocess.run([*KINDS[kind], "-q", "-F", str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mounted)], check=True)
    try:
        fill(mounted, big=kind != "small inodes")
        os.sync()
        wanted = list_tree(mounted)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
    with FileDisk(image) as disk:
        assert differences(list_volume(Volume(disk)), wanted) == []


@pytest.mark.parametrize("kind", KINDS)
def test_lists_what_mkfs_was_given(kind: str, tmp_path: Path) -> None:
    image, root = tmp_path / "disk", tmp_path / "root"
    root.mkdir()
    fill(root, big=kind != "small inodes")
    subprocess.run([*KINDS[kind], "-q", "-F", "-d", root, image, "48M"], check=True, capture_output=True, timeout=60)
    with FileDisk(image) as disk:
        got, wanted = list_volume(Volume(disk)), list_tree(root)
        free = list(Volume(disk).free_blocks())
    del got["lost+found"]
    # mkfs.ext4 -d of e2fsprogs 1.47.2 keeps whole seconds alone.
    assert differences(got, wanted, ignore=["mtime_ns"], ignore_at={".": ["mtime_ns"]}) == []
    shown = subprocess.run(["dumpe2fs", image], capture_output=True, text=True, check=True, timeout=60).stdout
    lines = [line.partition(":")[2] for line in shown.splitlines() if line.startswith("  Free blocks:")]
    numbers = [[int(end) for end in each.split("-")] for line in lines for each in line.split(",") if each.strip()]
    assert free == [(each[0], each[-1] - each[0] + 1) for each in numbers]


def test_impossible_directories() -> None:
    data = bytearray(large_directory())
    volume = Volume(MemoryBlob(bytes(data)))
    folder = volume.lookup(b"large") or 0
    block, offset = volume._place(folder)
    size = volume.inode(folder).size
    for wrong, message in [
        ((256 << 20) + 4096, "impossible size"), (size + 1, "impossible size"), (size + 4096, "hole"),
        (size - 4096, "blocks past its end"), (0, "blocks past its end"),
    ]:  # fmt: skip
        data[block * 4096 + offset + 4 : block * 4096 + offset + 8] = wrong.to_bytes(4, "little")
        with pytest.raises(FormatError, match=message):
            Volume(MemoryBlob(bytes(data))).entries(folder)
    with pytest.raises(FormatError, match="no directory"):
        volume.entries(volume.lookup(b"first") or volume.lookup(b"large/first") or 0)
    for number in (0, -1, volume.superblock.inodes + 1):
        with pytest.raises(FormatError, match="no such inode"):
            volume.inode(number)
    volume.inode(volume.superblock.inodes)


def test_a_block_map_that_is_its_own_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file").write_bytes(b"x" * 5000)
    command = ["mkfs.ext2", "-q", "-F", "-b", "1024", "-d", str(tmp_path / "root"), str(tmp_path / "disk"), "8M"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with FileDisk(tmp_path / "disk") as disk:
        volume = Volume(disk)
        number = volume.lookup(b"file") or 0
        assert volume.has_block_map(volume.inode(number))
        block, offset = volume._place(number)
        free = next(volume.free_blocks())[0]
        disk.write_at(free * 1024, free.to_bytes(4, "little") * 256)
        disk.write_at(block * 1024 + offset + 4, (1 << 31).to_bytes(4, "little"))  # its size
        disk.write_at(block * 1024 + offset + 40 + 14 * 4, free.to_bytes(4, "little"))  # its triple indirect block
        monkeypatch.setattr(volume_module, "_MAX_MAP_NUMBERS", 1 << 14)
        volume = Volume(disk)
        with pytest.raises(FormatError, match="block map with too many nodes"):
            volume.extents(volume.inode(number))


def fill(root: Path, *, big: bool) -> None:
    (root / "folder").mkdir()
    for number in range(600):
        (root / "folder" / f"a file with a long name {number}").write_bytes(b"x" * number)
    with (root / "large").open("wb") as file:
        file.write(os.urandom(3 << 20))
        file.seek(20 << 20)
        file.write(b"end")
    os.link(root / "large", root / "folder" / "linked")
    for length in (5, 59, 60, 900):
        os.symlink("t" * length, root / f"link{length}")
    os.setxattr(root / "large", "user.note", b"v" * (800 if big else 20))
    os.mknod(root / "node", 0o20600, os.makedev(300, 70000))
    os.utime(root / "folder", ns=(5, 1_700_000_000_123_456_789 if big else 1_700_000_000_000_000_000))


@pytest.mark.parametrize("sample", [small_file_system, large_directory])
def test_reading_needs_no_mount(sample: object) -> None:
    data = small_file_system() if sample is small_file_system else large_directory()
    volume = Volume(MemoryBlob(data))
    assert all(volume.lookup(path) == number for path, number, _ in volume.walk() if volume.inode(number).links < 3)


def test_what_is_no_file_system() -> None:
    for size in (0, 1024, 1 << 20):
        with pytest.raises(FormatError, match="ext4"):
            Volume(MemoryBlob(bytes(size)))


def test_others_are_read_but_not_changed(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    FileDisk(image, 8 << 20).close()
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
    with FileDisk(image) as disk:
        assert list(list_volume(Volume(disk))) == [".", "lost+found"]
        with pytest.raises(FormatError, match="cannot be changed here"):
            Editor(disk)


def test_the_text_of_a_short_link_is_no_place_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for length in (3, 59, 60):
        os.symlink(("/usr" * 16)[:length], tmp_path / "root" / f"link{length}")
    command = ["mkfs.ext4", "-q", "-d", str(tmp_path / "root"), str(tmp_path / "disk"), "8M"]
    subprocess.run(command, check=True, capture_output=True)
    with FileDisk(tmp_path / "disk") as disk:
        volume = Volume(disk)
        places = {path: list(volume.places(inode)) for path, _, inode in volume.walk()}
    assert places[b"/link3"] == places[b"/link59"] == []
    assert len(places[b"/link60"]) == 1


def test_a_loop_of_directories_ends() -> None:
    disk = MemoryDisk(1 << 20)
    disk.data[:] = small_file_system()
    editor = Editor(disk)
    folder = editor.lookup(b"folder") or 0
    home = editor._folder(folder)
    home.entries[b"loop"] = (folder, 2)
    home.changed.add(b"loop")
    editor.finish()
    with pytest.raises(FormatError, match="twice"):
        list(Volume(disk).walk())
