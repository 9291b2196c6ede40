"""Unpacking the blobs of turboOCI layers."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from obdlab.errors import FormatError, SourceError
from obdlab.formats.oci import OCI_LAYER_GZIP, TURBO_TARGET_DIGEST, Descriptor
from obdlab.image import turboblob
from obdlab.image.config import LowerConfig
from obdlab.image.turboblob import file_system_of, lower_of, unpack

TARGET = "sha256:" + "a" * 64
Files = list[tuple[str, bytes]]
DAMAGE = r"^blob: (not a ustar header|gzip data ends early|damaged gzip data|blob of a turboOCI layer ends early)"


def blob(files: Files, *, kind: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_known_files_are_unpacked_and_no_others(tmp_path: Path) -> None:
    files = [("ext4.fs.meta", b"e" * 5000), ("../x", b"x"), ("/y", b"y"), ("d/gzip.meta", b"d"), ("gzip.meta", b"g")]
    stream = io.BytesIO(blob([*files, (".turbo.ociv1", b"")]) + b"behind")
    unpack(stream, tmp_path / "a" / "b", blob="blob")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a" / "b").iterdir()} == {
        "ext4.fs.meta": b"e" * 5000,
        "gzip.meta": b"g",
    }
    assert stream.read() == b""
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()].count("x") == 0


def test_links_are_ignored(tmp_path: Path) -> None:
    unpack(io.BytesIO(blob([("ext4.fs.meta", b"")], kind=tarfile.SYMTYPE)), tmp_path / "a", blob="blob")
    assert list((tmp_path / "a").iterdir()) == []


WHOLE = blob([("ext4.fs.meta", bytes(range(256)) * 300)])


@pytest.mark.parametrize(
    "data",
    [b"", b"no blob", WHOLE[:-100], WHOLE[:200], gzip.compress(b"x" * 2000), WHOLE[:60] + b"\xff" * 40 + WHOLE[100:]],
    ids=["empty", "text", "cut", "cut early", "no tar", "damaged"],
)
def test_damage_leaves_no_directory(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(
        FormatError,
        match=DAMAGE,
    ):
        unpack(io.BytesIO(data), tmp_path / "a", blob="blob")
    assert not (tmp_path / "a").exists()


def test_a_file_twice(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="twice"):
        unpack(io.BytesIO(blob([("gzip.meta", b"1"), ("gzip.meta", b"2")])), tmp_path / "a", blob="blob")


def test_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turboblob, "_MOST_UNPACKED", 1000)
    with pytest.raises(FormatError, match="too large"):
        unpack(io.BytesIO(WHOLE), tmp_path / "a", blob="blob")
    assert not (tmp_path / "a").exists()


def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="cannot unpack"):
        unpack(io.BytesIO(WHOLE), tmp_path / "file" / "a", blob="blob")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    with pytest.raises(SourceError, match="File exists"):
        unpack(io.BytesIO(WHOLE), tmp_path / "there", blob="blob")
    assert (tmp_path / "there" / "mine").exists()


def test_the_file_system_that_all_have(tmp_path: Path) -> None:
    places = [tmp_path / name for name in "ab"]
    for place in places:
        place.mkdir()
        (place / "erofs.fs.meta").touch()
    (places[0] / "ext4.fs.meta").touch()
    (places[1] / "gzip.meta").touch()
    assert file_system_of(places, "image") == "erofs"
    assert file_system_of(places[:1], "image") == "ext4"
    layer = Descriptor(OCI_LAYER_GZIP, TARGET, 1, {TURBO_TARGET_DIGEST: TARGET})
    assert lower_of(layer, places[0], "erofs") == LowerConfig(
        file=str(places[0] / "erofs.fs.meta"), target_digest=TARGET
    )
    (places[0] / ".turbo.target").write_text(f"{TARGET},77\n")
    assert lower_of(layer, places[0], "erofs").target_size == 77
    (places[0] / ".turbo.target").write_text(f"{TARGET[:-1]}f,77\n")
    with pytest.raises(FormatError, match="names another target than its blob"):
        lower_of(layer, places[0], "erofs")
    assert lower_of(layer, places[1], "erofs").gzip_index == str(places[1] / "gzip.meta")
    (places[0] / "erofs.fs.meta").unlink()
    with pytest.raises(FormatError, match=r"^image: turboOCI layers have no file system in common"):
        file_system_of(places, "image")
