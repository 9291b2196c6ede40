"""Images compared without mounting them: the converted with its original, and what differs is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.cli.main import main
from obdlab.convert.image import ConvertOptions
from tests.convert.converting import convert
from tests.convert.images import whole_image
from tests.convert.layouts import hardlink, make_layout, member, symlink

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_a_converted_image_is_its_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_layout(tmp_path / "source", whole_image(), how=["gzip", "zstd", "plain", "gzip"])
    convert(str(tmp_path / "source"), f"oci:{tmp_path / 'out'}", ConvertOptions(work_dir=tmp_path))
    arguments = ["--work-dir", str(tmp_path), f"oci:{tmp_path / 'source'}", f"oci:{tmp_path / 'out'}"]
    assert main(["compare", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith(" paths, no differences\n")
    assert not list(tmp_path.glob("obdlab-*"))


def test_each_difference_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = [member("a", b"1"), member("b", b"2"), symlink("l", "x"), member("only", b"")]
    two = [member("a", b"2"), hardlink("b", "a"), symlink("l", "y"), member("ö\udcff", b"")]
    make_layout(tmp_path / "one", [one])
    make_layout(tmp_path / "two", [two])
    convert(str(tmp_path / "two"), f"oci:{tmp_path / 'out'}", ConvertOptions(work_dir=tmp_path))
    assert main(["compare", "-q", f"oci:{tmp_path / 'one'}", f"oci:{tmp_path / 'out'}"]) == 1
    assert capsys.readouterr().out == ""
    assert main(["compare", f"oci:{tmp_path / 'one'}", f"oci:{tmp_path / 'out'}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["only: missing", "ö\\udcff: not wanted"]
    assert [line.split(" differs")[0] for line in lines[2:]] == [
        "a: sha256", "a: linked_to", "b: linked_to", "l: target",
    ]  # fmt: skip
    assert main(["compare", "--limit", "1", f"oci:{tmp_path / 'one'}", f"oci:{tmp_path / 'out'}"]) == 1
    assert capsys.readouterr().out == "only: missing\n... and 5 more\n"


def test_an_image_compared_with_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_layout(tmp_path / "source", [[member("a", b"1")]])
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_bytes(b"1")
    arguments = [f"oci:{tmp_path / 'source'}", f"dir:{tmp_path / 'tree'}", "--ignore", "mtime_ns"]
    owners = ["--ignore", "uid", "--ignore", "gid"]
    assert main(["compare", *arguments, *owners]) == 0
    (tmp_path / "tree" / "a").write_bytes(b"2")
    assert main(["compare", *arguments, *owners]) == 1
    assert main(["compare", *arguments, *owners, "--no-content"]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "source"), f"dir:{tmp_path / 'none'}"]) == 1
    assert "cannot list the tree" in capsys.readouterr().err
