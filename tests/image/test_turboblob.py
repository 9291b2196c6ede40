"""Unpacking the blobs of turboOCI layers."""

from __future__ import annotations

import gzip
import io
import os
import random
import signal
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    (tmp_path / "there").touch()
    with pytest.raises(SourceError, match="cannot unpack"):
        unpack(io.BytesIO(WHOLE), tmp_path / "there", blob="blob")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


# It does not compress, so that unpacking it takes several reads.
LONG = [("ext4.fs.meta", b"e" * 5000), ("gzip.meta", random.Random(4).randbytes(300_000))]


class Stream(io.BytesIO):
    """A blob that does something before its second read, and after its last."""

    def __init__(self, data: bytes, *, second: Callable[[], object] = int, last: Callable[[], object] = int) -> None:
        super().__init__(data)
        self.reads = 0
        self.second, self.last = second, last

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads == 2:
            self.second()
        data = super().read(size)
        if not data:
            self.last()
        return data


def test_a_killed_process_leaves_no_place(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            killed = Stream(blob(LONG), second=lambda: os.kill(os.getpid(), signal.SIGKILL))
            unpack(killed, tmp_path / "a", blob="blob")
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert not (tmp_path / "a").exists()
    unpack(io.BytesIO(blob(LONG)), tmp_path / "a", blob="blob")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == dict(LONG)


def test_two_threads_with_the_same_blob_both_find_it_whole(tmp_path: Path) -> None:
    meeting = threading.Barrier(2)

    def unpacked() -> dict[str, bytes]:
        unpack(Stream(blob(LONG), last=lambda: meeting.wait(60)), tmp_path / "a", blob="blob")
        return {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(unpacked) for _ in range(2)]:
            assert done.result(60) == dict(LONG)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


def test_many_empty_members_are_refused(tmp_path: Path) -> None:
    header = gzip.decompress(blob([("ignored", b"")]))[:512]
    stream = io.BytesIO(gzip.compress(header * 100_000, 1))
    with pytest.raises(FormatError, match=r"has too many members \(wanted at most 1000\)$"):
        unpack(stream, tmp_path / "a", blob="blob")
    assert not list(tmp_path.iterdir())


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
