from __future__ import annotations

import gzip
import hashlib
import io
import os
import socket
import stat
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

from obdlab.lab.images.layertar import BUILD_EPOCH_S, settle_times, write_layer, write_tar

if TYPE_CHECKING:
    from pathlib import Path

LATER = 1_600_000_000  # "building began": what is dated after it was made by the build


def entries(upper: Path) -> dict[str, tarfile.TarInfo]:
    sink = io.BytesIO()
    write_tar(upper, sink, LATER)
    sink.seek(0)
    with tarfile.open(fileobj=sink) as tar:
        found = tar.getmembers()
    names = [entry.name for entry in found]
    assert len(set(names)) == len(names)
    # A directory comes before what is in it.
    for position, name in enumerate(names):
        assert os.path.dirname(name) in ("", *names[:position])
    return {entry.name: entry for entry in found}


def test_every_kind_of_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir(mode=0o750)
    (tmp_path / "dir/file").write_bytes(b"content")
    (tmp_path / "dir/file").chmod(0o4751)
    os.utime(tmp_path / "dir/file", (1_500_000_000, 1_500_000_000.9))
    os.link(tmp_path / "dir/file", tmp_path / "dir/twin")
    (tmp_path / "link").symlink_to("../away/" + "x" * 300)
    os.mkfifo(tmp_path / "pipe")
    long = tmp_path / ("é" * 100)
    long.mkdir()
    (long / ("n" * 200)).write_text("")
    found = entries(tmp_path)
    assert found["dir"].isdir()
    assert found["dir"].mode == 0o750
    assert (found["dir/file"].size, found["dir/file"].mode) == (7, 0o4751)
    assert found["dir/file"].mtime == 1_500_000_000
    assert (found["dir/twin"].islnk(), found["dir/twin"].linkname) == (True, "dir/file")
    assert (found["link"].issym(), found["link"].linkname) == (True, "../away/" + "x" * 300)
    assert found["pipe"].isfifo()
    assert f"{'é' * 100}/{'n' * 200}" in found


def test_names_that_are_no_text_are_kept(tmp_path: Path) -> None:
    name = b"caf\xe9"
    with open(os.path.join(os.fsencode(tmp_path), name), "wb"):
        pass
    assert os.fsdecode(name) in entries(tmp_path)


def test_sockets_are_left_out(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert list(entries(tmp_path)) == ["."]


def test_what_the_build_made_is_dated_alike(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("")
    assert entries(tmp_path)["new"].mtime == BUILD_EPOCH_S


def test_a_tree_s_times_are_settled_in_place(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/link").symlink_to("/etc/passwd")
    (tmp_path / "old").write_text("")
    os.utime(tmp_path / "old", (LATER - 5, LATER - 5))
    before = os.stat("/etc/passwd").st_mtime
    settle_times(tmp_path, LATER)
    times = [(tmp_path / name).lstat().st_mtime for name in ("", "dir", "dir/link", "old")]
    assert times == [BUILD_EPOCH_S, BUILD_EPOCH_S, BUILD_EPOCH_S, LATER - 5]
    assert os.stat("/etc/passwd").st_mtime == before


def test_digests_and_size_are_those_of_the_file(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    upper.mkdir()
    (upper / "file").write_bytes(os.urandom(300_000))
    first = write_layer(upper, tmp_path / "one", LATER)
    packed = (tmp_path / "one").read_bytes()
    assert first.size == len(packed)
    assert first.digest == f"sha256:{hashlib.sha256(packed).hexdigest()}"
    assert first.diff_id == f"sha256:{hashlib.sha256(gzip.decompress(packed)).hexdigest()}"
    assert write_layer(upper, tmp_path / "two", LATER) == first


@pytest.mark.kernel
def test_a_real_upper_directory_becomes_whiteouts(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower/gone").write_text("")
    (tmp_path / "lower/dir").mkdir()
    (tmp_path / "lower/dir/hidden").write_text("")
    (tmp_path / "lower/attributes").write_text("")
    script = """
    mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
    rm merged/gone; rm -r merged/dir; mkdir merged/dir; echo new > merged/dir/new
    mknod merged/device b 7 200
    """
    isolated = ("unshare", "--mount", "--propagation", "private", "sh", "-euc", script)
    subprocess.run(isolated, cwd=tmp_path, check=True, timeout=60)
    value = b"\x01\x00\x00\x02" + bytes([0xFF, 0x00, 0x0A]) * 4
    os.setxattr(tmp_path / "upper/device", "trusted.note", value)
    found = entries(tmp_path / "upper")
    assert sorted(found) == [".", ".wh.gone", "device", "dir", "dir/.wh..wh..opq", "dir/new"]
    assert all(found[name].isreg() and found[name].size == 0 for name in (".wh.gone", "dir/.wh..wh..opq"))
    assert found["device"].isblk()
    assert (found["device"].devmajor, found["device"].devminor) == (7, 200)
    assert os.fsencode(found["device"].pax_headers["SCHILY.xattr.trusted.note"]) == value
    assert not any("overlay" in key for entry in found.values() for key in entry.pax_headers)
    assert stat.S_ISCHR((tmp_path / "upper/gone").lstat().st_mode)
