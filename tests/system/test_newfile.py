"""Outputs that appear whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from obdlab.errors import SourceError
from obdlab.system.newfile import OutputError, new_file, replace_file


def test_nothing_is_seen_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with new_file(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert os.listdir(tmp_path) == ["out"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def fail(path: Path, error: BaseException, *, force: bool) -> None:
    with new_file(path, force=force) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
@pytest.mark.parametrize("force", [True, False])
def test_a_failure_leaves_nothing(error: BaseException, force: bool, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        fail(tmp_path / "out", error, force=force)
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_what_was_to_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        fail(path, ZeroDivisionError(), force=True)
    assert path.read_bytes() == b"old"
    with pytest.raises(SourceError, match=r"out: cannot be written \(No space"):
        fail(path, OSError(28, "No space left on device"), force=True)
    assert path.read_bytes() == b"old"
    with new_file(path, force=True) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


def lose_a_race(path: Path) -> None:
    with new_file(path) as file:
        file.write(b"mine")
        path.write_bytes(b"theirs")


def test_another_that_was_faster_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(OutputError, match="exists already"):
        lose_a_race(path)
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_that_leads_nowhere_is_something(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.symlink_to(tmp_path / "absent")
    with pytest.raises(OutputError, match="exists already"):
        fail(path, ZeroDivisionError(), force=False)
    with pytest.raises(SourceError, match="cannot be made"):
        fail(tmp_path / "absent" / "out", ZeroDivisionError(), force=False)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_replaced_whole(tmp_path: Path, private: bool, sync: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with path.open("rb") as before:
        replace_file(path, b"new", private=private, sync=sync)
        assert before.read() == b"old"
    assert path.read_bytes() == b"new"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == (0o600 if private else 0o666 & ~mask)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inner").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        replace_file(tmp_path / "taken", b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "missing" / "file", b"new")
