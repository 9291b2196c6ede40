"""Empty file systems are sound, the same everywhere, and the kernel takes them."""

from __future__ import annotations

import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from obdlab.convert.compare.listing import list_volume
from obdlab.errors import FormatError
from obdlab.volumes.ext4 import mkfs
from obdlab.volumes.ext4.layout import Group, Superblock
from obdlab.volumes.ext4.mkfs import MIN_SIZE, make_filesystem
from obdlab.volumes.ext4.volume import Volume
from tests.volumes.ext4.disk import FileDisk, fsck
from tests.volumes.ext4.samples import MemoryDisk

if TYPE_CHECKING:
    from pathlib import Path

SIZES = [MIN_SIZE, 5_000_000, 128 << 20, (128 << 20) + 4096, 1 << 30, (7 << 30) + 12 * 4096, 64 << 30]


@pytest.mark.parametrize("size", SIZES)
def test_is_clean_at_every_size(tmp_path: Path, size: int) -> None:
    with FileDisk(tmp_path / "disk", size) as disk:
        make_filesystem(disk)
        assert list(list_volume(Volume(disk))) == ["."]
        assert disk.written <= 65536 + size // 8192
    assert fsck(tmp_path / "disk") == ""


def test_bytes_do_not_depend_on_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = []
    for zone in ("UTC", "Asia/Kolkata"):
        monkeypatch.setenv("TZ", zone)
        disk = MemoryDisk(2 << 20)
        make_filesystem(disk)
        images.append(bytes(disk.data))
    assert images[0] == images[1]


@pytest.mark.parametrize("blocks", [(1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32])
def test_block_numbers_beyond_32_bits(blocks: int) -> None:
    shape = mkfs._Shape(blocks, 1 << 30)
    superblock = Superblock.parse(mkfs._superblock(shape), blocks * 4096)
    assert superblock.blocks == blocks
    assert struct.unpack_from("<II", superblock.raw, 12) == (
        (blocks - shape.used_blocks) & 0xFFFFFFFF,
        shape.inodes - 10,
    )
    assert struct.unpack_from("<I", superblock.raw, 344) == ((blocks - shape.used_blocks) >> 32,)
    packed = shape.descriptors()
    groups = [Group.parse(packed, at, wide=True) for at in range(0, len(packed), 64)]
    assert len(groups) == superblock.groups
    assert sum(group.free_blocks for group in groups) == blocks - shape.used_blocks
    assert sum(group.free_inodes for group in groups) == superblock.inodes - 10
    assert groups[-1].inode_table + shape.table_blocks == shape.metadata_end < shape.used_blocks


@pytest.mark.parametrize("size", [0, 4096, MIN_SIZE - 4096])
def test_too_small(size: int) -> None:
    with pytest.raises(FormatError, match="no size for ext4"):
        make_filesystem(MemoryDisk(size))


def test_what_others_say_of_it(tmp_path: Path) -> None:
    with FileDisk(tmp_path / "disk", 256 << 20) as disk:
        make_filesystem(disk)
    told = subprocess.run(
        ["dumpe2fs", "-h", str(tmp_path / "disk")], capture_output=True, text=True, check=True
    ).stdout
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in told.splitlines())}
    assert "has_journal" not in facts["Filesystem features"]
    assert facts["Filesystem state"] == "clean"
    assert facts["Inode size"] == "256"
    assert facts["Reserved block count"] == "0"
    assert facts["Default directory hash"] == "half_md4"
