"""An EROFS that was changed to harm the writer of the next layer: OSError or FormatError, nothing else."""

from __future__ import annotations

import io
import struct

import pytest

from obdlab.convert.apply import apply_layer
from obdlab.convert.tree.erofstree import ErofsTree
from obdlab.errors import FormatError
from obdlab.volumes.erofs import pack
from obdlab.volumes.erofs.volume import Volume
from tests.convert.layouts import hardlink, member, tar_bytes
from tests.volumes.erofs.samples import file_system_of
from tests.volumes.ext4.samples import MemoryDisk

BASE = tar_bytes([member("a", b"a"), member("b", b"b" * 5000)])


def base(*changes: tuple[int, bytes]) -> MemoryDisk:
    disk = MemoryDisk(4 << 20)
    data = file_system_of(BASE)
    disk.data[: len(data)] = data
    for at, value in changes:
        disk.data[at : at + len(value)] = value
    return disk


def apply(disk: MemoryDisk, *members: object) -> Volume:
    tree = ErofsTree(disk, fresh=False)
    apply_layer(io.BytesIO(tar_bytes(members)), "layer", tree)  # type: ignore[arg-type]
    tree.finish()
    return Volume(disk)


def inode_at(name: bytes) -> int:
    return (Volume(base()).lookup(name) or 0) * pack.SLOT


@pytest.mark.parametrize("count", [0, (1 << 64) - 1])
def test_a_count_of_inodes_may_be_anything(count: int) -> None:
    disk = base((pack.SUPER_OFFSET + 16, struct.pack("<Q", count)))
    volume = apply(disk, member("c", b"c"), member(".wh.a"), member(".wh.b"))
    assert set(volume.entries(volume.root)) == {b"c"}


@pytest.mark.parametrize("when", [(0, 10**9), (0, (1 << 32) - 1)])
def test_an_impossible_time(when: tuple[int, int]) -> None:
    disk = base((inode_at(b"a") + 32, struct.pack("<qI", *when)))
    with pytest.raises(FormatError, match="impossible time"):
        apply(disk, hardlink("again", "a"))


def test_no_more_links_than_can_be_counted() -> None:
    disk = base((inode_at(b"a") + 44, struct.pack("<I", 0xFFFFFFFF)))
    with pytest.raises(Exception, match="Too many links"):
        apply(disk, hardlink("again", "a"))
