"""Layers applied to EROFS: the tree is right after each of them, for us and for the kernel, and they stay small."""

from __future__ import annotations

import io
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from obdlab.cli.main import main
from obdlab.convert.apply import ApplyError, apply_layer
from obdlab.convert.compare.listing import differences, list_tree, list_volume
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerOptions
from obdlab.convert.tree.erofstree import ErofsTree
from obdlab.convert.tree.memorytree import MemoryTree
from obdlab.convert.tree.target import Attributes
from obdlab.errors import FormatError
from obdlab.formats.oci import BLOB_FS_TYPE
from obdlab.layers.stack import Stack, WritableStack
from obdlab.layers.upper import SparseUpper
from obdlab.volumes.erofs.volume import Volume
from tests.convert.converting import convert
from tests.convert.images import RandomImage, whole_image
from tests.convert.layouts import directory, hardlink, make_layout, member, symlink, tar_bytes
from tests.volumes.ext4.disk import FileDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from obdlab.blob import Blob, WritableBlob
    from tests.convert.layouts import Member

EROFS = LayerOptions(filesystem="erofs")


def apply_all(disk: WritableBlob, layers: Sequence[Sequence[Member]]) -> MemoryTree:
    """Apply the layers one by one; after each, the disk must hold what a tree in memory does."""
    memory = MemoryTree()
    for number, members in enumerate(layers):
        tree = ErofsTree(disk, fresh=number == 0)
        apply_layer(io.BytesIO(tar_bytes(members)), f"layer {number}", tree)
        tree.finish()
        apply_layer(io.BytesIO(tar_bytes(members)), f"layer {number}", memory)
        assert differences(list_volume(Volume(disk)), memory.listing()) == []
    return memory


def check_with_kernel(disk: Blob, directory: Path) -> None:
    """The kernel must mount it and show what our reader reads; fsck.erofs must find nothing."""
    volume = Volume(disk)
    file, target = directory / "disk", directory / "mnt"
    target.mkdir()
    with file.open("wb") as out:
        for offset in range(0, volume.blocks * 4096, 1 << 20):
            out.write(disk.read_at(offset, min(1 << 20, volume.blocks * 4096 - offset)))
    checked = subprocess.run(["fsck.erofs", file], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    subprocess.run(["mount", "-t", "erofs", "-o", "loop,ro", file, target], check=True, timeout=60)
    try:
        assert differences(list_tree(target), list_volume(volume)) == []
    finally:
        subprocess.run(["umount", target], check=True, timeout=60)


@pytest.mark.kernel
def test_the_kernel_shows_every_depth(tmp_path: Path) -> None:
    layers = [
        *whole_image(),
        [member("deep/er/file", b"x" * 5000), directory("etc/", xattrs={"user.new": b"v" * 900})],
    ]
    with FileDisk(tmp_path / "root", 1 << 30) as disk:
        for depth in (1, len(layers)):
            (tmp_path / str(depth)).mkdir()
            apply_all(disk, layers[:depth])
            check_with_kernel(disk, tmp_path / str(depth))


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 3000), marks=pytest.mark.slow)])
def test_random_images(tmp_path: Path, seeds: range) -> None:
    compared = 0
    for seed in seeds:
        layers = RandomImage(seed).layers()
        with FileDisk(tmp_path / "root", 1 << 26) as disk:
            try:
                apply_all(disk, layers)
                compared += 1
            except (FormatError, ApplyError):
                pass  # refused on either tree alike: the applier's business
        os.unlink(tmp_path / "root")
    assert compared > len(seeds) // 2


def big_attributes() -> list[list[Member]]:
    """What makes inodes move, and tails leave them."""
    large = {f"user.{n}": bytes([65 + n]) * 1000 for n in range(3)}
    return [
        [
            directory("d/"),
            directory("d/inner/"),
            member("d/inner/f", b"1"),
            member("f", b"content" * 200),
            hardlink("d/g", "f"),
            member("large", b"2" * 6000, xattrs=large),
            member("larger", b"3" * 300_000, xattrs={**large, "user.x": b"x" * 5000}),
            symlink("link", "t" * 4000),
        ],
        # More attributes than there is room for, on directories and through one of several names.
        [directory("d/", xattrs=large), directory("d/inner/", xattrs={"user.small": b"1"})],
        [hardlink("h", "f", xattrs=large), hardlink("l", "large", xattrs={"user.0": b"other"})],
        [directory("d/", xattrs={"user.less": b"1"}), member("d/.wh.g")],
        [hardlink("m", "larger", xattrs={"user.more": b"1"}), directory("d/inner/", xattrs=large)],
    ]


@pytest.mark.kernel
def test_attributes_that_need_room(tmp_path: Path) -> None:
    with FileDisk(tmp_path / "root", 1 << 30) as disk:
        apply_all(disk, big_attributes())
        check_with_kernel(disk, tmp_path)


def test_every_name_of_a_file_follows_its_inode(tmp_path: Path) -> None:
    # Names made in one layer share what the others do not: each name read from the disk has its own.
    layers = [
        [member("a/f", b"content" * 900), hardlink("c/g", "a/f")],
        [hardlink("b/h", "a/f"), hardlink("b/i", "c/g", xattrs={"user.x": b"x" * 500})],
        [hardlink("a/k", "c/g"), hardlink("b/l", "a/k"), hardlink("a/m", "b/h", xattrs={"user.y": b"y" * 900})],
    ]
    with FileDisk(tmp_path / "root", 1 << 26) as disk:
        apply_all(disk, layers)
        assert {entry.linked_to for path, entry in list_volume(Volume(disk)).items() if "/" in path} == {"a/f"}


@pytest.mark.kernel
def test_sizes_around_blocks_and_many_names(tmp_path: Path) -> None:
    sizes = [0, 1, 2047, 2048, 2049, 4032, 4095, 4096, 4097, 6144, 6145, 8191, 8192, 1 << 20, (1 << 20) + 1]
    first = [member(f"s{size}", os.urandom(size)) for size in sizes]
    first += [member(f"many/{'n' * (n % 200)}{n}", b"%d" % n) for n in range(3000)]
    first += [directory(f"many/d{n}/") for n in range(50)]
    second = [member(f"many/more{n}", b"") for n in range(500)] + [member("many/.wh.d7"), member("many/.wh.nn2")]
    with FileDisk(tmp_path / "root", 1 << 30) as disk:
        apply_all(disk, [first, second])
        check_with_kernel(disk, tmp_path)


@pytest.mark.kernel
def test_sparse_files(tmp_path: Path) -> None:
    def pieces(*at: int) -> list[tuple[int, bytes]]:
        return [(offset, b"%d" % offset * 1000) for offset in at]

    attributes = Attributes(0o644, 0, 0, 0, 0)
    with FileDisk(tmp_path / "root", 1 << 30) as disk:
        tree, memory = ErofsTree(disk, fresh=True), MemoryTree()
        for each in (tree, memory):
            each.make_file(b"/huge", attributes, 1 << 26, pieces(0, 5 << 20, (1 << 26) - 11000), sparse=True)
            each.make_file(b"/small", attributes, 100_000, pieces(50_000), sparse=True)
            each.make_file(b"/holes", attributes, (3 << 20) + 5, [], sparse=True)
        tree.finish()
        assert differences(list_volume(Volume(disk)), memory.listing()) == []
        assert Volume(disk).blocks < 20_000
        # A change of its attributes moves the inode and its table.
        again = ErofsTree(disk, fresh=False)
        changed = Attributes(0o600, 1, 2, 0, -5 * 10**9, [(b"user.x", b"y" * 100)])
        for each in (again, memory):
            each.set_attributes(b"/huge", changed, keep_xattrs=False)
        again.finish()
        assert differences(list_volume(Volume(disk)), memory.listing()) == []
        check_with_kernel(disk, tmp_path)


def test_a_sparse_file_larger_than_the_disk(tmp_path: Path) -> None:
    size = 1 << 40
    with FileDisk(tmp_path / "root", 1 << 30) as disk:
        tree = ErofsTree(disk, fresh=True)
        tree.make_file(b"/f", Attributes(0o644, 0, 0, 0, 0), size, [(3, b"low"), (size - 4, b"high")], sparse=True)
        tree.finish()
        volume = Volume(disk)
        inode = volume.inode(volume.entries(volume.root)[b"f"][0])
        assert volume.read(inode, 0, 10) == b"\0\0\0low\0\0\0\0"
        assert volume.read(inode, size - 8, 8) == b"\0\0\0\0high"
        assert volume.read(inode, size // 2, 4) == bytes(4)


def upper_size(tmp_path: Path, base: Sequence[Member], change: Callable[[ErofsTree], None]) -> int:
    """Bytes that a layer with the change holds, on one with ``base``."""
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    for path in (lower, upper):
        SparseUpper.create(path, 1 << 30).close()
    with SparseUpper.open(lower) as layer:
        tree = ErofsTree(WritableStack(None, layer), fresh=True)
        apply_layer(io.BytesIO(tar_bytes(base)), "base", tree)
        tree.finish()
    with SparseUpper.open(lower, read_only=True) as below, SparseUpper.open(upper) as layer:
        tree = ErofsTree(WritableStack(Stack([below]), layer), fresh=False)
        change(tree)
        tree.finish()
        return layer.data.allocated_size


def test_a_small_change_makes_a_small_layer(tmp_path: Path) -> None:
    base = [member(f"d{n // 100}/file{n}", b"%d" % n * 400) for n in range(5000)]
    changed = tar_bytes([member("d17/file1742", b"c" * 8192)])

    def change(tree: ErofsTree) -> None:
        apply_layer(io.BytesIO(changed), "change", tree)

    assert upper_size(tmp_path, base, change) <= 64 << 10


def test_what_is_replaced_in_the_same_layer_takes_no_room(tmp_path: Path) -> None:
    def change(tree: ErofsTree) -> None:
        for _ in range(3):
            apply_layer(io.BytesIO(tar_bytes([member("big", os.urandom(4 << 20))])), "change", tree)

    assert upper_size(tmp_path, [member("a", b"1")], change) < (4 << 20) + (64 << 10)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    with FileDisk(tmp_path / "root", 1 << 20) as disk:
        tree = ErofsTree(disk, fresh=True)
        with pytest.raises(ApplyError, match="file system is full"):
            apply_layer(io.BytesIO(tar_bytes([member("big", bytes(2 << 20))])), "layer", tree)


def test_a_directory_below_itself_ends_in_an_error(tmp_path: Path) -> None:
    with FileDisk(tmp_path / "root", 1 << 20) as disk:
        apply_all(disk, [[member("a/f"), hardlink("g", "a/f"), directory("z/"), directory("z/e/")]])
        number = Volume(disk).entries(Volume(disk).root)[b"z"][0]
        # The third entry, behind "." and "..", in what follows the inode.
        disk.write_at(number * 32 + 64 + 2 * 12, number.to_bytes(8, "little"))
        for change in (member(".wh.z"), hardlink("h", "a/f", xattrs={"user.x": b"y"})):
            tree = ErofsTree(disk, fresh=False)
            with pytest.raises(FormatError, match="in the tree twice"):
                apply_layer(io.BytesIO(tar_bytes([change])), "layer", tree)


def test_an_erofs_made_elsewhere_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    subprocess.run(["mkfs.erofs", "--quiet", tmp_path / "image", tmp_path / "tree"], check=True, timeout=60)
    os.truncate(tmp_path / "image", 1 << 20)
    with FileDisk(tmp_path / "image", 1 << 20) as disk, pytest.raises(FormatError, match="not made here"):
        ErofsTree(disk, fresh=False)


def test_converted_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_layout(tmp_path / "source", whole_image(), how=["gzip", "zstd", "plain", "gzip"])
    names = [f"oci:{tmp_path / 'source'}", f"oci:{tmp_path / 'out'}"]
    assert main(["image", "convert", "-q", "--fs", "erofs", "--work-dir", str(tmp_path), *names]) == 0
    assert main(["image", "verify", "--work-dir", str(tmp_path), *names]) == 0
    assert capsys.readouterr().err.endswith(" paths, no differences\n")
    (entry,) = ImageLayout(tmp_path / "out").select(None)
    image = convert(names[0], f"oci:{tmp_path / 'again'}", ConvertOptions(layer=EROFS, work_dir=tmp_path))
    assert image.digest == entry.digest
    assert [layer.annotations[BLOB_FS_TYPE] for layer in image.manifest.layers] == ["erofs"] * 4
