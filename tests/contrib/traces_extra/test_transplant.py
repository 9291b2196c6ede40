"""What was read of one image, found again in another that has the same files elsewhere."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from obdlab.blob import MemoryBlob
from obdlab.contrib.traces_extra.transplant import transplant
from obdlab.convert.tree.target import Attributes, Ext4Tree
from obdlab.errors import FormatError
from obdlab.volumes.ext4.mkfs import make_filesystem
from obdlab.volumes.ext4.volume import Volume
from obdlab.volumes.places import FilePlaces, FileVolume, files_of
from tests.volumes.ext4.samples import MemoryDisk

ROOT = Attributes(0o755, 0, 0, 0, 0)
FILES = {f"/lib/module{n}".encode(): random.Random(n).randbytes(5000 * n + 1) for n in range(20)}


def disk_of(files: dict[bytes, bytes], seed: int) -> MemoryDisk:
    """A disk with these files, written in an order of its own."""
    disk = MemoryDisk(16 << 20)
    make_filesystem(disk)
    tree = Ext4Tree(disk)
    for name in (b"/lib", b"/etc"):
        tree.make_directory(name, ROOT)
    names = list(files)
    random.Random(seed).shuffle(names)
    for name in names:
        tree.make_file(name, ROOT, len(files[name]), [(0, files[name])], sparse=False)
    tree.finish()
    return disk


def sectors_of(disk: MemoryDisk, path: bytes, begin: int, end: int) -> list[tuple[int, int]]:
    volume = Volume(disk)
    number = volume.lookup(path)
    assert number is not None
    blocks = [
        extent.physical + block
        for extent in volume.extents(volume.inode(number))
        for block in range(extent.length)
        if begin <= (extent.logical + block) * 4096 < end
    ]
    return [(block * 8, block * 8 + 8) for block in blocks]


def covered(sectors: list[tuple[int, int]]) -> set[int]:
    return {sector for begin, end in sectors for sector in range(begin, end)}


def test_what_was_read_is_found_at_its_new_place() -> None:
    old = disk_of(FILES, 1)
    new = disk_of({**FILES, b"/etc/more": b"x" * 100_000}, 2)
    wanted = [(b"/lib/module7", 0, 8192), (b"/lib/module3", 4096, 12288), (b"/lib/module19", 0, 100_000)]
    reads = [sectors for each in wanted for sectors in sectors_of(old, *each)]
    found = transplant(reads, old, new)
    assert found.lost == 0
    assert found.missing == ()
    assert found.kept == len(reads) * 4096
    for each in wanted:
        assert covered(sectors_of(new, *each)) <= covered(found.sectors)
    # What opening the files needs comes with them, and little else.
    assert {2, 3} <= covered(found.sectors)
    assert len(covered(found.sectors)) * 512 < found.kept + 20 * 4096


def test_files_that_are_gone_or_shorter_are_told() -> None:
    old = disk_of(FILES, 1)
    new = disk_of({**FILES, b"/lib/module9": b"short"} | {b"/etc/x": b""}, 3)
    gone = dict(FILES)
    del gone[b"/lib/module8"]
    without = disk_of(gone, 3)
    reads = [*sectors_of(old, b"/lib/module8", 0, 40_000), *sectors_of(old, b"/lib/module9", 0, 40_000)]
    found = transplant(reads, old, without)
    assert found.missing == (b"/lib/module8",)
    assert found.lost == 10 * 4096
    assert found.kept == 10 * 4096
    shorter = transplant(reads, old, new)
    assert shorter.missing == ()
    assert shorter.kept == 11 * 4096
    assert shorter.lost == 9 * 4096


def test_every_byte_of_a_read_belongs_somewhere() -> None:
    disk = disk_of(FILES, 4)
    used = files_of([(0, disk.size // 512)], disk)
    assert set(used.files) - {b"", b"/lib", b"/etc"} == set(FILES)
    for path, data in FILES.items():
        assert used.files[path] == (-(-len(data) // 4096) * 4096, len(data))
    pieces = list(FilePlaces(disk).pieces([(0, disk.size // 512)]))
    assert sum(length for _, length, _ in pieces) == disk.size
    at = 0
    for offset, length, _ in pieces:
        assert offset == at
        at += length


def test_another_file_system_is_refused() -> None:
    old = disk_of(FILES, 1)
    with pytest.raises(FormatError):
        transplant([(0, 8)], old, MemoryDisk(1 << 20))


def erofs_of(files: dict[bytes, bytes], directory: Path, name: str) -> MemoryBlob:
    for path, content in files.items():
        file = directory / name / path.decode().lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    image = directory / f"{name}.erofs"
    subprocess.run(["mkfs.erofs", "--quiet", image, directory / name], check=True, capture_output=True, timeout=60)
    return MemoryBlob(image.read_bytes())


def placed(disk: MemoryBlob | MemoryDisk, path: bytes) -> list[tuple[int, int]]:
    """Sectors that hold a file's data."""
    places = FileVolume(disk).places_of(path)
    assert places is not None
    return [(place // 512, -(-(place + length) // 512)) for _, length, place in places]


@pytest.mark.tools("mkfs.erofs")
def test_between_file_systems(tmp_path: Path) -> None:
    old = erofs_of(FILES | {b"/lib/small": b"inline"}, tmp_path, "old")
    grown = FILES | {b"/etc/aaa": b"x" * 100_000, b"/lib/small": b"inline"}
    for new in (erofs_of(grown, tmp_path, "new"), disk_of(grown, 5)):
        wanted = (b"/lib/module7", b"/lib/module19", b"/lib/small")
        found = transplant([each for path in wanted for each in placed(old, path)], old, new)
        assert not found.missing
        for path in wanted[:2]:
            assert covered(placed(new, path)) <= covered(found.sectors)
        # Beside the file system's own first block, where its last bytes may be inline.
        assert not covered(placed(new, b"/etc/aaa")) & covered(found.sectors) - set(range(8))
    # What is inline comes with the inode.
    small = transplant(placed(old, b"/lib/small"), old, old)
    assert covered(placed(old, b"/lib/small")) <= covered(small.sectors)


@pytest.mark.tools("mkfs.erofs")
def test_places_hold_the_files_content(tmp_path: Path) -> None:
    disk = erofs_of(FILES | {b"/lib/small": b"inline"}, tmp_path, "tree")
    for path, content in (FILES | {b"/lib/small": b"inline"}).items():
        rest = bytearray(len(content))
        for at, length, place in FileVolume(disk).places_of(path) or ():
            rest[at : at + length] = disk.read_at(place, length)[: len(content) - at]
        assert rest == content
    assert FileVolume(disk).places_of(b"/no/such") is None
    assert FileVolume(disk).places_of(b"/lib/small/below") is None
    used = files_of([(0, disk.size // 512)], disk)
    large = {path for path, content in FILES.items() if len(content) > 4096}
    assert large <= set(used.files)
    assert b"/lib/small" not in used.files  # within a block of the file system's own
    assert sum(size for size, _ in used.files.values()) + used.elsewhere == disk.size // 512 * 512
