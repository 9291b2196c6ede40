"""Unpacked disks in the cache directory: whole or not there, within the limits, and never taken from their users."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from obdlab.blob import MemoryBlob
from obdlab.cache import unpacked
from obdlab.cache.admin import clear, collect, unpacked_disks
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.eviction import FRESH_S, EvictingSpace, by_last_use, evict
from obdlab.cache.space import disk_usage
from obdlab.cache.unpacked import PIECE, FlatFileError, FlatFiles, remove_unused
from obdlab.errors import CorruptBlobError, SourceError
from obdlab.formats.oci import digest_of
from tests.cache.origin import locked

SIZE = 5 * PIECE + 4096
#: A disk with zeros of every kind: told as such, stored, and in the middle of a piece.
CONTENT = (
    random.Random(1).randbytes(PIECE) + bytes(2 * PIECE) + bytes(PIECE // 2) + b"x" * (PIECE // 2) + bytes(PIECE)
).ljust(SIZE, b"y")


def read(offset: int, length: int) -> bytes | None:
    return None if offset == PIECE else CONTENT[offset : offset + length]


@pytest.fixture
def space(tmp_path: Path) -> EvictingSpace:
    return EvictingSpace(tmp_path / "cache", quota=64 * PIECE)


def content_of(fd: int) -> bytes:
    return os.pread(fd, SIZE + 1, 0)


def test_is_what_was_read_and_takes_no_space_for_zeros(space: EvictingSpace) -> None:
    files = FlatFiles(space)
    assert files.open("one") is None
    files.store("one", SIZE, 2 * PIECE, read)
    fd = files.open("one")
    assert fd is not None
    assert content_of(fd) == CONTENT
    files.check("one", fd)
    assert os.fstat(fd).st_blocks * 512 < 2 * PIECE
    assert space.count() == disk_usage(space.directory)
    files.store("one", SIZE, 2 * PIECE, lambda *_: pytest.fail("stored twice"))
    os.close(fd)


def test_the_ledger_knows_what_it_takes(space: EvictingSpace) -> None:
    FlatFiles(space).store("one", SIZE, 2 * PIECE, read)
    counted = 64 * PIECE + space.excess() - 2 * 64 * PIECE // 16
    assert abs(counted - disk_usage(space.directory)) <= 64 << 10


@pytest.mark.parametrize("at", [0, PIECE + 5, SIZE - 1])
def test_a_changed_byte_is_found(space: EvictingSpace, at: int) -> None:
    files = FlatFiles(space)
    files.store("one", SIZE, 2 * PIECE, read)
    with files.path("one").open("r+b") as file:
        file.seek(at)
        file.write(bytes([CONTENT[at] ^ 1]))
    fd = files.open("one")
    assert fd is not None
    with pytest.raises(CorruptBlobError, match="wrong checksum"):
        files.check("one", fd)
    os.close(fd)


def test_a_large_disk_is_checked_by_all_of_its_sums(space: EvictingSpace) -> None:
    files = FlatFiles(space)
    files.store("large", 100 * PIECE + 5, 5, lambda offset, length: b"12345" if length == 5 else None)
    fd = files.open("large")
    assert fd is not None
    files.check("large", fd)
    with files.path("large").open("r+b") as file:
        file.seek(100 * PIECE)
        file.write(b"x")
    with pytest.raises(CorruptBlobError, match=f"offset {100 * PIECE}"):
        files.check("large", fd)
    os.close(fd)


def test_sums_that_are_cut_off_or_gone(space: EvictingSpace) -> None:
    files = FlatFiles(space)
    files.store("one", SIZE, 2 * PIECE, read)
    fd, sums = files.open("one"), files.path("one").with_name("sums")
    assert fd is not None
    os.truncate(sums, sums.stat().st_size - 1)
    with pytest.raises(CorruptBlobError, match="not those of a disk of this size"):
        files.check("one", fd)
    sums.unlink()
    with pytest.raises(CorruptBlobError, match="cannot be read"):
        files.check("one", fd)
    os.close(fd)


def test_nothing_is_left_if_reading_fails(space: EvictingSpace) -> None:
    def fail(offset: int, length: int) -> bytes | None:
        if offset == 3 * PIECE:
            raise SourceError("gone")
        return read(offset, length)

    files = FlatFiles(space)
    with pytest.raises(SourceError, match="gone"):
        files.store("one", SIZE, 2 * PIECE, fail)
    assert files.open("one") is None
    assert os.listdir(files.path("one").parent) == []
    files.store("one", SIZE, 2 * PIECE, read)


def test_what_a_killed_process_left_is_made_anew(space: EvictingSpace) -> None:
    files = FlatFiles(space)
    directory = files.path("one").parent
    directory.mkdir(parents=True)
    (directory / "disk.new").write_bytes(b"half" * PIECE * 2)
    assert files.open("one") is None
    files.store("one", SIZE, 2 * PIECE, read)
    fd = files.open("one")
    assert fd is not None
    assert content_of(fd) == CONTENT
    os.close(fd)


def test_what_a_killed_process_left_takes_no_room(space: EvictingSpace) -> None:
    files = FlatFiles(space)
    directory = files.path("one").parent
    directory.mkdir(parents=True)
    (directory / "disk.new").write_bytes(b"half" * 10 * PIECE)
    space.count()
    dense(files, "one", 30)
    assert files.path("one").exists()
    counted = space.excess()
    space.count()
    assert abs(counted - space.excess()) <= 64 << 10


def test_an_open_that_the_process_cannot_make_leaves_the_disk(
    space: EvictingSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FlatFiles(space)
    files.store("one", SIZE, 2 * PIECE, read)

    def refuse(_: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(FlatFileError, match="Too many open files"):
        files.take_into_use("one")
    assert files.path("one").exists()


def test_a_disk_that_cannot_be_read_goes(space: EvictingSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FlatFiles(space)
    files.store("one", SIZE, 2 * PIECE, read)

    pread = os.pread

    def fail(fd: int, length: int, at: int) -> bytes:
        if length == PIECE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, length, at)

    monkeypatch.setattr("obdlab.cache.unpacked.os.pread", fail)
    assert files.take_into_use("one") is None
    assert not files.path("one").exists()


def test_a_store_that_fails_reports_why_if_its_file_was_removed_meanwhile(space: EvictingSpace) -> None:
    files = FlatFiles(space)
    new = files.path("one").with_name("disk.new")
    with ExitStack() as lock:

        def remove() -> None:
            new.unlink()
            lock.close()

        release = threading.Timer(0.3, remove)

        def fail(offset: int, length: int) -> bytes | None:
            lock.enter_context(locked(space.directory))  # the store waits for it before it removes the file
            release.start()
            raise SourceError("gone")

        with pytest.raises(SourceError, match="gone"):
            files.store("one", SIZE, 2 * PIECE, fail)
        release.join()
    assert not new.exists()


def test_half_of_a_disk_is_removed_and_standard_input_stays_open(space: EvictingSpace) -> None:
    directory = FlatFiles(space).path("one").parent
    directory.mkdir(parents=True)
    (directory / "disk.new").write_bytes(b"half" * PIECE)
    before = os.fstat(0).st_ino
    assert remove_unused(space) >= 4 * PIECE
    assert not directory.exists()
    assert os.fstat(0).st_ino == before


def test_no_room_is_said_before_anything_is_read(space: EvictingSpace) -> None:
    with pytest.raises(FlatFileError, match=r"no room for an unpacked image .wanted up to 60 MiB, got 5[0-9] MiB"):
        FlatFiles(space).store("one", 60 * PIECE, 60 * PIECE, lambda *_: pytest.fail("read"))


def test_disks_in_use_stay(space: EvictingSpace) -> None:
    files = FlatFiles(space)
    for name in ("used", "unused"):
        files.store(name, SIZE, 2 * PIECE, read)
    fd = files.open("used")
    before = disk_usage(space.directory)
    freed = remove_unused(space)
    # Its directory is not counted.
    assert before - disk_usage(space.directory) - 4096 <= freed <= before - disk_usage(space.directory)
    assert freed % 512 == 0
    assert files.open("unused") is None
    assert not files.path("unused").parent.exists()
    assert files.path("used").exists()
    assert fd is not None
    os.close(fd)
    remove_unused(space)
    assert not files.path("used").exists()


def test_one_being_made_stays(space: EvictingSpace) -> None:
    files, directory = FlatFiles(space), FlatFiles(space).path("one").parent

    def look(offset: int, length: int) -> bytes | None:
        assert remove_unused(space) == 0
        return read(offset, length)

    files.store("one", SIZE, 2 * PIECE, look)
    assert files.path("one").exists()
    lock = os.open(directory, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it any more
    os.close(lock)


def test_the_eviction_takes_unused_ones_when_there_is_no_room(tmp_path: Path) -> None:
    files = FlatFiles(EvictingSpace(tmp_path / "cache", quota=64 * PIECE))
    files.store("one", SIZE, 2 * PIECE, read)
    small = EvictingSpace(tmp_path / "cache", quota=PIECE)
    assert evict(small) > PIECE
    assert files.open("one") is None


def dense(files: FlatFiles, name: str, mib: int = 4, *, age_s: float = 0.0) -> None:
    """A disk without zeros, taken into use that long ago."""
    content = random.Random(name).randbytes(PIECE)
    files.store(name, mib * PIECE, mib * PIECE, lambda _, length: content[:length])
    fd = files.take_into_use(name)
    assert fd is not None
    os.close(fd)
    used_s = time.time() - age_s
    os.utime(files.path(name).with_name("checked"), (used_s, used_s))


def names(space: EvictingSpace) -> set[str]:
    return {disk.name for disk in unpacked_disks(space)}


def fill_blob(directory: Path, size: int) -> str:
    content = random.Random(size).randbytes(size)
    with BlockCache(directory).open(MemoryBlob(content, "blob"), digest_of(content)) as blob:
        assert blob.read_at(0, size) == content
    return digest_of(content)


def test_a_use_checks_once_in_a_boot_and_is_noted(space: EvictingSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FlatFiles(space)
    dense(files, "one", age_s=10 * FRESH_S)
    checked: list[str] = []
    check = FlatFiles.check
    monkeypatch.setattr(FlatFiles, "check", lambda *args: (checked.append(args[1]), check(*args)))
    for boot, wanted in (("a", 1), ("a", 1), ("b", 2)):
        monkeypatch.setattr(unpacked, "boot_id", lambda boot=boot: boot)
        fd = files.take_into_use("one")
        assert fd is not None
        os.close(fd)
        assert len(checked) == wanted
    assert time.time() - unpacked_disks(space)[0].last_use < 60
    assert abs(space.count() - disk_usage(space.directory)) == 0
    os.utime(files.path("one"))  # any change of the file has it checked again
    os.close(files.take_into_use("one") or -1)
    assert len(checked) == 3


def test_a_damaged_disk_is_not_used_and_goes(space: EvictingSpace, caplog: pytest.LogCaptureFixture) -> None:
    files = FlatFiles(space)
    dense(files, "one")
    with files.path("one").open("r+b") as file:
        file.seek(3 * PIECE)
        file.write(b"damage")
    assert files.take_into_use("one") is None
    assert "wrong checksum" in caplog.text
    assert names(space) == set()


def test_a_hole_in_the_place_of_data_is_damage(space: EvictingSpace) -> None:
    files = FlatFiles(space)
    dense(files, "one")
    os.truncate(files.path("one"), 2 * PIECE)
    os.truncate(files.path("one"), 4 * PIECE)
    assert files.take_into_use("one") is None


def test_the_least_recently_used_go_first_blobs_and_disks_alike(tmp_path: Path) -> None:
    space = EvictingSpace(tmp_path, quota=64 * PIECE)
    files = FlatFiles(space)
    digest = fill_blob(tmp_path, 3 * PIECE)  # now
    for name, age_s in (("old", 300.0), ("older", 400.0), ("new", -100.0), ("used", 500.0)):
        dense(files, name, age_s=age_s)
    fd = files.open("used")
    assert [path.name for path in by_last_use(space)] == ["used", "older", "old", digest, "new"]
    freed = evict(EvictingSpace(tmp_path, quota=18 * PIECE))
    assert freed >= 4 * PIECE
    assert names(space) == {"used", "old", "new"}
    assert (tmp_path / "blobs" / "local" / digest).exists()
    evict(EvictingSpace(tmp_path, quota=10 * PIECE))
    assert names(space) == {"used", "new"}
    assert disk_usage(tmp_path / "blobs" / "local" / digest) < PIECE
    assert fd is not None
    os.close(fd)


def test_room_for_a_disk_is_made_of_what_was_not_used_for_an_hour(tmp_path: Path) -> None:
    space = EvictingSpace(tmp_path, quota=16 * PIECE)
    files = FlatFiles(space)
    dense(files, "old", age_s=2 * FRESH_S)
    dense(files, "older", age_s=3 * FRESH_S)
    dense(files, "fresh", age_s=FRESH_S / 2)
    assert space.make_room(PIECE) >= PIECE
    assert names(space) == {"old", "older", "fresh"}
    dense(files, "next", 5)
    assert names(space) == {"old", "fresh", "next"}
    assert space.evicted_bytes >= 4 * PIECE
    with pytest.raises(FlatFileError, match=r"no room for an unpacked image .wanted up to 8 MiB"):
        dense(files, "large", 8)  # "old" would not suffice, so it stays
    assert names(space) == {"old", "fresh", "next"}
    fd = files.open("old")
    with pytest.raises(FlatFileError, match="no room"):
        dense(files, "another")
    assert fd is not None
    os.close(fd)


def test_blobs_in_use_do_not_go_for_a_disk(tmp_path: Path) -> None:
    space = EvictingSpace(tmp_path, quota=12 * PIECE)
    content = random.Random(5).randbytes(6 * PIECE)
    cache = BlockCache(tmp_path)
    with cache.open(MemoryBlob(content, "blob"), digest_of(content)) as blob:
        assert blob.read_at(0, len(content)) == content
        sums = tmp_path / "blobs" / "local" / digest_of(content) / "sums"
        with sums.open("r+b") as file:
            file.seek(32)
            file.write(bytes(8))  # the time of its last use
        with pytest.raises(FlatFileError, match="no room"):
            dense(FlatFiles(space), "one", 6)
        assert sums.exists()
    dense(FlatFiles(space), "one", 6)
    assert not sums.exists()
    assert space.count() <= 12 * PIECE


def test_collecting_takes_half_made_disks_and_what_is_too_much(tmp_path: Path) -> None:
    space = EvictingSpace(tmp_path, quota=64 * PIECE)
    files = FlatFiles(space)
    dense(files, "one")
    dense(files, "two", age_s=5.0)
    half = files.path("half").parent
    half.mkdir()
    (half / "disk.new").write_bytes(bytes(2 * PIECE))
    assert {disk.name: (disk.size, disk.in_use) for disk in unpacked_disks(space)}["half"] == (0, False)
    assert collect(space) >= 2 * PIECE
    assert names(space) == {"one", "two"}
    assert collect(space) == 0
    assert collect(EvictingSpace(tmp_path, quota=5 * PIECE)) >= 4 * PIECE
    assert names(space) == {"one"}
    clear(space)
    assert names(space) == set()


def test_a_disk_that_is_looked_at_can_be_opened(space: EvictingSpace) -> None:
    files = FlatFiles(space)
    dense(files, "one")
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            unpacked_disks(space)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(20):
            fd = files.open("one")
            assert fd is not None
            os.close(fd)
    finally:
        ended.set()
        looking.join()


@pytest.mark.parametrize(("scenario", "least"), [("store", 40), ("evict", 5)])
def test_killed_at_every_step(tmp_path: Path, scenario: str, least: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cache.unpackingkills", str(tmp_path), scenario],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= least


@pytest.mark.parametrize("limits", [{}, {"min_free": 1}, {"quota": 64 * PIECE}])
def test_there_is_room_without_a_quota(tmp_path: Path, limits: dict[str, int]) -> None:
    space = EvictingSpace(tmp_path / "cache", **limits)
    dense(FlatFiles(space), "one")
    assert names(space) == {"one"}
