"""EROFS as mkfs.erofs makes it, read in user space: the same tree, and errors for what is damaged."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.blob import MemoryBlob
from obdlab.convert.compare.listing import differences, list_tree, list_volume
from obdlab.errors import FormatError, OutOfRangeError
from obdlab.volumes.erofs.volume import SUPER_OFFSET, Volume

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.tools("mkfs.erofs")

_ROOT_FIELD = SUPER_OFFSET + 14


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    source = random.Random(3)
    (root / "a/b/c").mkdir(parents=True)
    (root / "a/big").write_bytes(source.randbytes(300_001))
    (root / "a/small").write_text("hi")
    (root / "a/empty").touch()
    with (root / "a/sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    for number in range(200):  # several blocks
        (root / "a/b" / f"file-{number:04d}-{'x' * 40}").write_text(str(number))
    (root / "link").symlink_to("a/small")
    (root / "long").symlink_to("y" * 1500)
    os.link(root / "a/small", root / "hard")
    try:
        os.setxattr(root / "a/small", "user.key", b"value" * 20)
    except OSError:  # a file system without
        pass
    if os.geteuid() == 0:
        os.chown(root / "a/small", 1234, 70_000)
        os.mknod(root / "device", 0o20666, os.makedev(259, 70_001))
    return root


def make(tree: Path, directory: Path, *options: str) -> bytes:
    image = directory / "image"
    subprocess.run(["mkfs.erofs", "--quiet", *options, image, tree], check=True, capture_output=True, timeout=60)
    return image.read_bytes()


@pytest.mark.parametrize("option", ["", "-Eforce-inode-extended", "-Eforce-inode-compact", "--chunksize=65536"])
def test_the_tree_is_as_it_was(tree: Path, tmp_path: Path, option: str) -> None:
    data = make(tree, tmp_path, *option.split(), *(["--force-gid=1", "--force-uid=1"] if "compact" in option else []))
    ignore = ["mtime_ns", "uid", "gid"] if "compact" in option else []  # one time for all, and short ids
    got = list_volume(Volume(MemoryBlob(data)))  # type: ignore[arg-type]
    assert len(got) > 200
    assert differences(got, list_tree(tree), ignore=ignore) == []


def test_attributes_that_files_share(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for number in range(40):
        (root / f"{number}").touch()
        for name in ("user.first", "user.second", "user.third"):
            os.setxattr(root / f"{number}", name, name.encode() * 9)
        os.setxattr(root / f"{number}", "user.own", b"%d" % number)
    data = make(root, tmp_path, "-x1")
    volume = Volume(MemoryBlob(data))
    shared = [data[inode.xattrs_at + 4] for _, _, inode in volume.walk() if not inode.is_directory]
    assert shared == [3] * 40
    assert differences(list_volume(volume), list_tree(root)) == []  # type: ignore[arg-type]


def test_ranges_of_files(tree: Path, tmp_path: Path) -> None:
    volume = Volume(MemoryBlob(make(tree, tmp_path)))
    wanted = (tree / "a/big").read_bytes()
    inode = next(inode for path, _, inode in volume.walk() if path == b"/a/big")
    for offset, length in ((0, 1), (4095, 2), (299_000, 5000), (300_001, 1), (400_000, 10)):
        assert volume.read(inode, offset, length) == wanted[offset : offset + length]


def test_compressed_files_are_refused(tree: Path, tmp_path: Path) -> None:
    volume = Volume(MemoryBlob(make(tree, tmp_path, "-zlz4")))
    with pytest.raises(FormatError, match="compressed"):
        list_volume(volume)  # type: ignore[arg-type]


def test_what_is_none_is_refused() -> None:
    for data in (b"", bytes(4096)):
        with pytest.raises(FormatError, match="EROFS"):
            Volume(MemoryBlob(data))


@pytest.mark.parametrize("left", [4, 8, 31])
def test_an_inode_that_the_disk_cuts_off(tree: Path, tmp_path: Path, left: int) -> None:
    data = bytearray(make(tree, tmp_path, "-Eforce-inode-compact", "--force-uid=1", "--force-gid=1"))
    number = 1000
    meta = int.from_bytes(data[SUPER_OFFSET + 40 : SUPER_OFFSET + 44], "little") * 4096
    data[_ROOT_FIELD : _ROOT_FIELD + 2] = number.to_bytes(2, "little")
    del data[meta + 32 * number + left :]
    data[meta + 32 * number :] = bytes(left)  # a compact one, as far as it goes
    with pytest.raises(FormatError, match="inode past the end"):
        list(Volume(MemoryBlob(bytes(data))).walk())


def test_a_directory_of_zeros(tree: Path, tmp_path: Path) -> None:
    data = make(tree, tmp_path)
    volume = Volume(MemoryBlob(data))
    number, inode = next((number, inode) for path, number, inode in volume.walk() if path == b"/a/b")
    broken = bytearray(data)
    for _, length, place in volume.places(inode):
        broken[place : place + length] = bytes(length)
    with pytest.raises(FormatError, match="damaged directory block"):
        Volume(MemoryBlob(bytes(broken))).entries(number)


def test_damage_is_an_error_and_ends(tree: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    shutil.copytree(tree, small, symlinks=True, ignore=lambda *_: ["device", "big", "sparse"])
    data = make(small, tmp_path)
    source = random.Random(11)
    outcomes: dict[str, int] = {}
    for _ in range(120):
        broken = bytearray(data)
        for _ in range(source.choice((1, 10, 100))):
            at = source.randrange(1024, len(broken))
            broken[at] = source.getrandbits(8)
        outcome = outcome_of(lambda broken=broken: list_volume(Volume(MemoryBlob(bytes(broken))), content=False))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes.keys() <= {"read", "refused"}
    assert outcomes["refused"] > 10


def outcome_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (FormatError, OutOfRangeError):
        return "refused"
    return "read"
