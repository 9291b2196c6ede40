"""The tar of an overlay's upper directory, read back by tarfile and applied by the converter's own code."""

from __future__ import annotations

import io
import os
import socket
import stat
import tarfile
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.convert.apply import ApplyError
from obdlab.differ import uppertar
from obdlab.differ.uppertar import upper_tar

if TYPE_CHECKING:
    from collections.abc import Callable


def members(upper: Path) -> dict[str, tarfile.TarInfo]:
    data = io.BytesIO(b"".join(upper_tar(upper)))
    with tarfile.open(fileobj=data) as archive:
        return {member.name: member for member in archive}


def content(upper: Path, name: str) -> bytes:
    data = io.BytesIO(b"".join(upper_tar(upper)))
    with tarfile.open(fileobj=data) as archive:
        file = archive.extractfile(name)
        assert file is not None
        return file.read()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes device nodes and trusted attributes")


def test_files_keep_what_a_layer_can_hold(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir(mode=0o750)
    (tmp_path / "sub/file").write_bytes(b"data" * 1000)
    os.chmod(tmp_path / "sub/file", 0o4711)
    os.utime(tmp_path / "sub/file", ns=(0, 1_234_567_890_123_456_789))
    os.link(tmp_path / "sub/file", tmp_path / "zlink")
    (tmp_path / "soft").symlink_to("sub/" + "x" * 200)
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as made:
        before = os.getcwd()
        os.chdir(tmp_path)
        made.bind("socket")
        os.chdir(before)
    found = members(tmp_path)
    assert set(found) == {"sub", "sub/file", "zlink", "soft", "fifo"}
    file = found["sub/file"]
    assert (file.mode, file.size, file.uid) == (0o4711, 4000, os.getuid())
    assert file.pax_headers["mtime"] == "1234567890.123456789"
    assert content(tmp_path, "sub/file") == b"data" * 1000
    assert (found["zlink"].type, found["zlink"].linkname) == (tarfile.LNKTYPE, "sub/file")
    assert found["soft"].linkname == "sub/" + "x" * 200
    assert (found["sub"].mode, found["sub"].isdir()) == (0o750, True)
    assert found["fifo"].isfifo()


@needs_root
def test_marks_of_the_overlay_become_whiteouts(tmp_path: Path) -> None:
    os.mknod(tmp_path / "gone", stat.S_IFCHR, 0)
    os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (tmp_path / "hides").mkdir()
    os.setxattr(tmp_path / "hides", "trusted.overlay.opaque", b"y")
    (tmp_path / "hides/new").write_text("x")
    os.setxattr(tmp_path / "hides/new", "trusted.overlay.origin", b"anything")
    os.setxattr(tmp_path / "hides/new", "trusted.of-the-host", b"anything")
    os.setxattr(tmp_path / "hides/new", "user.kept", b"\xff\0\n=")
    found = members(tmp_path)
    assert set(found) == {".wh.gone", "null", "hides", "hides/.wh..wh..opq", "hides/new"}
    assert (found["null"].devmajor, found["null"].devminor) == (1, 3)
    attributes = {key for key in found["hides/new"].pax_headers if key.startswith("SCHILY")}
    assert attributes == {"SCHILY.xattr.user.kept"}


@needs_root
@pytest.mark.parametrize("mark", ["metacopy", "redirect", "whiteout"])
def test_files_that_need_the_layers_below_are_refused(tmp_path: Path, mark: str) -> None:
    (tmp_path / "file").write_text("x")
    os.setxattr(tmp_path / "file", f"trusted.overlay.{mark}", b"")
    with pytest.raises(ApplyError, match=mark):
        members(tmp_path)


def test_a_deep_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uppertar, "_MOST_DEPTH", 5)
    tmp_path.joinpath(*"abcde").mkdir(parents=True)
    assert len(members(tmp_path)) == 5
    tmp_path.joinpath(*"abcdef").mkdir(parents=True)
    with pytest.raises(ApplyError, match="5 directories deep"):
        members(tmp_path)


def swap_directory(upper: Path, outside: Path) -> None:
    (upper / "b").rename(upper / "moved")
    (upper / "b").symlink_to(outside)


def swap_file(upper: Path, outside: Path) -> None:
    (upper / "c").unlink()
    (upper / "c").symlink_to(outside / "secret")


def shorten(upper: Path, _outside: Path) -> None:
    os.truncate(upper / "a", 10)


@pytest.mark.parametrize("swap", [swap_directory, swap_file, shorten])
def test_a_container_that_changes_meanwhile_reaches_nothing_outside(
    tmp_path: Path, swap: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    upper, outside = tmp_path / "upper", tmp_path / "outside"
    (upper / "b").mkdir(parents=True)
    outside.mkdir()
    (upper / "a").write_bytes(bytes(3 << 20))
    (upper / "c").write_text("harmless")
    (outside / "secret").write_text("of the host")
    looked = os.stat
    swapped = False

    # Between the look at a name and its opening.
    def stat_and_swap(path, *arguments, **named):
        nonlocal swapped
        status = looked(path, *arguments, **named)
        if path == {"swap_directory": b"b", "swap_file": b"c", "shorten": b"a"}[swap.__name__] and not swapped:
            swapped = True
            if swap is not shorten:
                swap(upper, outside)
        return status

    monkeypatch.setattr(os, "stat", stat_and_swap)
    read: list[bytes] = []

    def read_all() -> None:
        for number, piece in enumerate(upper_tar(upper)):
            if number == 1 and swap is shorten:
                swap(upper, outside)
            read.append(piece)

    with pytest.raises((OSError, ApplyError)):
        read_all()
    assert swapped
    assert b"of the host" not in b"".join(read)


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(200 << 20)
    tracemalloc.start()
    try:
        assert sum(map(len, upper_tar(tmp_path))) > 200 << 20
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=300), st.binary(max_size=1200))
def test_records_state_their_own_length(key: bytes, value: bytes) -> None:
    record = uppertar._record(key, value)
    digits, _, rest = record.partition(b" ")
    assert int(digits) == len(record)
    assert rest == key + b"=" + value + b"\n"
