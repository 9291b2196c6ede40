"""Unpacked disks in the cache directory: whole or not there, within the limits, and never taken from their users."""

from __future__ import annotations

import fcntl
import os
import random
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from obdlab.cache.eviction import EvictingSpace, evict
from obdlab.cache.space import disk_usage
from obdlab.cache.unpacked import PIECE, FlatFileError, FlatFiles, remove_unused
from obdlab.errors import CorruptBlobError, SourceError
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
