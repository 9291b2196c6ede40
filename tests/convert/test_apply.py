"""Rules of applying that containerd cannot be asked about (it refuses), and safety."""

from __future__ import annotations

import hashlib
import io
import os
import random
import tarfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.convert.apply import ApplyError, apply_layer
from obdlab.convert.compare.listing import TreeEntry, differences, list_tree, list_volume
from obdlab.convert.tree.target import Ext4Tree
from obdlab.errors import FormatError
from obdlab.volumes.ext4.mkfs import make_filesystem
from obdlab.volumes.ext4.volume import Volume
from tests.convert.images import CAPABILITY, RandomImage, base, middle, top, whole_image
from tests.convert.layouts import Member, directory, hardlink, member, symlink, tar_bytes
from tests.convert.ostree import OsTree
from tests.volumes.ext4.disk import FileDisk, fsck

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SIZE = 64 << 20


def apply_to(disk: FileDisk, *tars: bytes) -> None:
    for tar in tars:
        tree = Ext4Tree(disk)
        apply_layer(io.BytesIO(tar), "layer", tree)
        tree.finish()


def apply(image: Path, *layers: Iterable[Member]) -> None:
    """Apply layers to a new file system in the file ``image``; what comes out has to be clean."""
    with FileDisk(image, SIZE) as disk:
        make_filesystem(disk)
        apply_to(disk, *map(tar_bytes, layers))
    assert fsck(image) == ""


def listing(image: Path, *, content: bool = True) -> dict[str, TreeEntry]:
    with FileDisk(image) as disk:
        return list_volume(Volume(disk), content=content)


def names(image: Path) -> list[str]:
    return sorted(listing(image, content=False))


def test_hard_link_to_a_file_of_a_layer_below(tmp_path: Path) -> None:
    below = [directory("d/"), member("d/a", b"1"), symlink("l", "/d")]
    apply(tmp_path / "r", below, [hardlink("b", "l/a", mode=0o600, uid=5), hardlink("c", "/d/a")])
    found = listing(tmp_path / "r")
    assert {found[path].linked_to for path in ("b", "c", "d/a")} == {"b"}
    assert found["d/a"].mode & 0o7777 == 0o644  # of the last entry, as it is one file


def test_whiteout_spares_what_its_own_layer_brings(tmp_path: Path) -> None:
    below = [directory("d/"), member("d/old", b"1"), directory("d/e/"), member("d/e/old", b"1")]
    for number, order in enumerate((1, -1)):
        layer = [directory("d/"), member("d/e/new", b"2"), member(".wh.d")][::order]
        apply(tmp_path / f"r{number}", below, layer)
        assert names(tmp_path / f"r{number}") == [".", "d", "d/e", "d/e/new"]


def test_whiteout_then_implicit_parent(tmp_path: Path) -> None:
    apply(tmp_path / "r", [directory("d/"), member("d/old", b"1")], [member(".wh.d"), member("d/new", b"2")])
    assert names(tmp_path / "r") == [".", "d", "d/new"]


def test_hard_link_to_a_whited_out_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        apply(tmp_path / "r", [member("a", b"1")], [member(".wh.a"), hardlink("b", "a")])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (hardlink("a", "a"), "hard link to itself"),
        (hardlink("h", "."), "hard link to the root"),
        (hardlink("h", "d"), "hard link to a directory"),
        (hardlink("h", "a/b"), "does not exist"),
        (member(".wh."), "malformed whiteout"),
        (member("d/.wh..."), "malformed whiteout"),
    ],
)
def test_refused(bad: Member, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        apply(tmp_path / "r", [member("a", b"1"), directory("d/"), bad])
    assert repr(bad[0].name) in str(caught.value)


def test_link_circles(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="Too many levels"):
        apply(tmp_path / "r", [symlink("a", "b"), symlink("b", "a"), member("a/x")])
    apply(tmp_path / "s", [symlink("a", "b"), symlink("b", "a")], [member("a/x")])
    assert names(tmp_path / "s") == [".", "a", "a/x", "b"]


def test_replacing_a_directory_within_the_layer(tmp_path: Path) -> None:
    layer = [directory("d/"), member("d/x/y", b"1"), member("d", b"file"), hardlink("e", "d"), directory("d/")]
    apply(tmp_path / "r", layer)
    assert names(tmp_path / "r") == [".", "d", "e"]


def test_capability_survives_owner_and_mode(tmp_path: Path) -> None:
    xattrs = {"security.capability": CAPABILITY, "trusted.overlay.redirect": b"/etc", "nonsense.name": b"1"}
    apply(tmp_path / "r", [member("f", b"x", uid=3, mode=0o4755, xattrs=xattrs)])
    entry = listing(tmp_path / "r")["f"]
    assert entry.xattrs == (("security.capability", CAPABILITY),)
    assert entry.mode & 0o7777 == 0o4755


def test_attribute_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises((FormatError, ApplyError), match="file 'f': extended attributes do not fit"):
        apply(tmp_path / "r", [member("f", xattrs={"user.big": bytes(65537)})])


def test_sparse_files_stay_sparse(tmp_path: Path) -> None:
    pax = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "1048576,3"}
    apply(tmp_path / "r", [member("f", b"abc", pax={**pax, "GNU.sparse.size": str(8 << 20)})])
    with FileDisk(tmp_path / "r") as disk:
        volume = Volume(disk)
        inode = volume.inode(volume.lookup(b"f") or 0)
        assert inode.size == 8 << 20
        assert inode.sectors == 8
        assert b"".join(volume.content(inode)) == bytes(1 << 20) + b"abc" + bytes((7 << 20) - 3)


def test_deep_trees(tmp_path: Path) -> None:
    deep = "/".join("d" * 1500)
    apply(tmp_path / "r", [member(f"{deep}/f", b"1")], [member("d/.wh.d"), member("d/x", b"2")])
    assert names(tmp_path / "r") == [".", "d", "d/x"]


def test_times_of_changed_directories_stay(tmp_path: Path) -> None:
    apply(tmp_path / "r", [directory("d/", mtime=1000), member("d/x")], [member("d/y"), member("d/.wh.x")])
    assert listing(tmp_path / "r")["d"].mtime_ns == 1000 * 10**9


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o711)
    (outside / "secret").write_bytes(b"s")
    target, climb = str(outside), "../" * 30 + str(outside)[1:]
    below = [symlink("abs", target), symlink("up", climb)]
    above = [member("abs/a"), member("up/b"), symlink("own", climb), member("own/c"), member("own/.wh..wh..opq")]
    apply(tmp_path / "r", below, above)
    for link in ("abs/secret", "up/secret"):
        with pytest.raises(FormatError, match="does not exist"):
            apply(tmp_path / "s", below, [hardlink("stolen", link)])
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert os.stat(outside / "secret").st_nlink == 1


SAMPLES = [tar_bytes(layer()) for layer in (base, middle, top)]
# Where names, links, types and modes are; a checksum is made right again after each change.
_FIELDS = [*range(8), *range(100, 108), 124, 156, *range(157, 165)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_hostile_headers_are_refused_or_stay_inside(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    image = tmp_path / f"r{seed}"
    canary = tmp_path / "canary"
    canary.mkdir(exist_ok=True)
    before = canary.stat()
    for sample in SAMPLES:
        data = bytearray(sample)
        for _ in range(draw.randint(1, 6)):
            header = draw.choice([at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"])
            where = header + draw.choice(_FIELDS)
            change = draw.choice([b"/", b"..", b"../canary", b"\0", b".wh.", b"1", b"2", b"5", b"x", b"\xff"])
            data[where : where + len(change)] = change
            data[header + 148 : header + 156] = b" " * 8
            data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
        try:
            with FileDisk(image, SIZE) as disk:
                make_filesystem(disk)
                apply_to(disk, bytes(data))
            assert fsck(image) == ""
        except (FormatError, ApplyError):
            break
        finally:
            image.unlink()
    assert canary.stat() == before
    assert list(canary.iterdir()) == []


def test_unknown_types_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="'odd' has an unknown type"):
        apply(tmp_path / "r", [member("odd", kind=b"D")])


def test_contiguous_files_are_files(tmp_path: Path) -> None:
    apply(tmp_path / "r", [member("f", b"x", kind=tarfile.CONTTYPE)])
    assert listing(tmp_path / "r")["f"].sha256 == hashlib.sha256(b"x").hexdigest()


@pytest.mark.parametrize("repeat", [3000, 500_000])
def test_endless_paths(tmp_path: Path, repeat: int) -> None:
    with pytest.raises(FormatError, match="name too long"):
        apply(tmp_path / "r", [member("a/" * repeat + "b")])


@pytest.mark.root
@pytest.mark.parametrize("seed", [None, *range(25)])
def test_same_tree_as_in_the_kernel(tmp_path: Path, seed: int | None) -> None:
    layers = whole_image() if seed is None else RandomImage(seed).layers()
    (tmp_path / "kernel").mkdir()
    os.utime(tmp_path / "kernel", ns=(0, 0))
    refused = [False, False]
    try:
        for members in layers:
            apply_layer(io.BytesIO(tar_bytes(members)), "layer", OsTree(tmp_path / "kernel"))
    except (FormatError, ApplyError):
        refused[0] = True
    try:
        apply(tmp_path / "image", *layers)
    except (FormatError, ApplyError):
        refused[1] = True
    assert refused[0] == refused[1]
    if not refused[0]:
        assert differences(listing(tmp_path / "image"), list_tree(tmp_path / "kernel")) == []
