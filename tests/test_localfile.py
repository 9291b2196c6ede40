"""LocalFile: exact reads, clear refusals, nothing leaked."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from obdlab.errors import OutOfRangeError, SourceError
from obdlab.localfile import LocalFile, read_regular


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_reads_what_the_file_holds(tmp_path: Path) -> None:
    data = os.urandom(10_000)
    path = tmp_path / "data"
    path.write_bytes(data)
    with LocalFile(path) as blob:
        assert blob.size == 10_000
        assert blob.name == str(path)
        assert blob.read_at(0, 10_000) == data
        assert blob.read_at(9_999, 1) == data[-1:]
        assert blob.read_at(10_000, 0) == b""
        assert blob.read_at(123, 4567) == data[123 : 123 + 4567]


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 11), (11, 0), (5, -1), (10, 1)])
def test_refuses_ranges_outside(tmp_path: Path, offset: int, length: int) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(10))
    with LocalFile(path) as blob, pytest.raises(OutOfRangeError, match="data"):
        blob.read_at(offset, length)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nothing-here: cannot open \(No such file"):
        LocalFile(tmp_path / "nothing-here")


def test_other_kinds_are_refused_without_a_leak(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = open_descriptors()
    with pytest.raises(SourceError, match="is a directory"):
        LocalFile(tmp_path)
    with pytest.raises(SourceError, match="is a special file"):
        LocalFile(tmp_path / "fifo")
    with pytest.raises(SourceError, match="is a special file"):
        LocalFile("/dev/zero")
    assert open_descriptors() == before


def test_file_cut_short_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(100))
    with LocalFile(path) as blob:
        os.truncate(path, 40)
        assert blob.read_at(0, 40) == bytes(40)
        with pytest.raises(SourceError, match=r"cut short \(got 30 of 60 bytes\) at offset 10"):
            blob.read_at(10, 60)


def test_close_twice_then_read(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x")
    before = open_descriptors()
    blob = LocalFile(path)
    blob.close()
    blob.close()
    assert open_descriptors() == before
    with pytest.raises(SourceError, match="read after close"):
        blob.read_at(0, 1)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 5000])
def test_read_regular_tells_a_larger_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(data := os.urandom(size))
    assert read_regular(path, 100) == data[:101]


def test_read_regular_neither_waits_nor_reads_without_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            read_regular(path, 100)


def test_read_regular_takes_memory_by_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    tracemalloc.start()
    try:
        read_regular(path, 64 << 20)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
