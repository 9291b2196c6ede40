from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from obdlab.convert.compare.listing import differences, list_tree
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from pathlib import Path


def make_tree(root: Path) -> None:
    root.mkdir()
    (root / "sub").mkdir(mode=0o750)
    (root / "sub" / "file").write_bytes(b"hello")
    (root / "link").symlink_to("/nowhere/at all")
    (root / "z").write_bytes(b"")
    os.link(root / "sub" / "file", root / "again")
    os.mkfifo(root / "pipe")
    os.setxattr(root / "z", "user.x", b"\x00\xff")
    (root / os.fsdecode(b"raw\xff")).touch()
    for path in [root, *root.rglob("*")]:
        os.utime(path, ns=(1, 1_000_000_007), follow_symlinks=False)


def test_a_link_whose_other_names_are_elsewhere_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "here").write_bytes(b"x")
    os.link(tmp_path / "tree" / "here", tmp_path / "elsewhere")
    assert list_tree(tmp_path / "tree")["here"].linked_to == ""
    os.link(tmp_path / "elsewhere", tmp_path / "tree" / "again")
    assert {entry.linked_to for path, entry in list_tree(tmp_path / "tree").items() if path != "."} == {"again"}


def test_lists_every_kind(tmp_path: Path) -> None:
    make_tree(tmp_path / "a")
    listing = list_tree(tmp_path / "a")
    assert set(listing) == {".", "again", "link", "pipe", "raw\udcff", "sub", "sub/file", "z"}
    assert listing["sub/file"].size == 5
    assert listing["sub/file"].linked_to == "again" == listing["again"].linked_to
    assert listing["sub/file"].sha256.startswith("2cf24dba5fb0a30e")
    assert listing["z"].xattrs == (("user.x", b"\x00\xff"),)
    assert listing["link"].target == "/nowhere/at all"
    assert stat.S_ISFIFO(listing["pipe"].mode)
    assert listing["sub"].mtime_ns == 1_000_000_007
    assert listing["sub"].size == 0


def test_equal_trees_have_no_differences(tmp_path: Path) -> None:
    make_tree(tmp_path / "a")
    make_tree(tmp_path / "b")
    assert differences(list_tree(tmp_path / "a"), list_tree(tmp_path / "b")) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda root: os.chmod(root / "z", 0o4755), "z: mode differs (got 0o104755, wanted 0o100644)"),
        (lambda root: (root / "z").unlink(), "z: missing"),
        (lambda root: (root / "new").touch(), "new: not wanted"),
        (lambda root: os.removexattr(root / "z", "user.x"), "z: xattrs differs (got (), wanted "),
        (lambda root: os.utime(root / "sub", ns=(0, 5)), "sub: mtime_ns differs (got 5, wanted 1000000007)"),
        (lambda root: (root / "sub" / "file").write_bytes(b"hellO"), "again: sha256 differs"),
    ],
)
def test_tells_each_difference(tmp_path: Path, change, line: str) -> None:
    make_tree(tmp_path / "a")
    make_tree(tmp_path / "b")
    change(tmp_path / "a")
    lines = differences(list_tree(tmp_path / "a"), list_tree(tmp_path / "b"))
    assert any(found.startswith(line) for found in lines), lines


def test_broken_link_group_is_a_difference(tmp_path: Path) -> None:
    make_tree(tmp_path / "a")
    make_tree(tmp_path / "b")
    (tmp_path / "a" / "again").unlink()
    (tmp_path / "a" / "again").write_bytes(b"hello")
    lines = differences(list_tree(tmp_path / "a"), list_tree(tmp_path / "b"), ignore=["mtime_ns"])
    assert [line.split(" ")[:2] for line in lines] == [["again:", "linked_to"], ["sub/file:", "linked_to"]]


def test_ignore_at_one_path(tmp_path: Path) -> None:
    make_tree(tmp_path / "a")
    make_tree(tmp_path / "b")
    os.utime(tmp_path / "a" / "sub", ns=(0, 5))
    a, b = list_tree(tmp_path / "a"), list_tree(tmp_path / "b")
    assert differences(a, b, ignore_at={"sub": ["mtime_ns"]}) == []
    assert differences(a, b, ignore_at={"z": ["mtime_ns"]}) != []


def test_absent_tree(tmp_path: Path) -> None:
    with pytest.raises(ObdlabError, match="nothing: cannot list the tree"):
        list_tree(tmp_path / "nothing")
