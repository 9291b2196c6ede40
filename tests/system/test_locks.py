"""Locks of files between processes, by a deadline."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest

from obdlab.system.locks import directory_locked, lock_until, try_lock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_HOLD = """
import fcntl, sys, time
with open(sys.argv[1], "a") as file:
    fcntl.flock(file, fcntl.LOCK_SH if sys.argv[2] == "shared" else fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def locked_elsewhere(path: Path, how: str = "alone") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _HOLD, str(path), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        try:
            yield holder
        finally:
            holder.kill()


def test_a_lock_of_another_process_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open() as file, locked_elsewhere(path):
        began = time.monotonic()
        assert not lock_until(file.fileno(), began + 0.2)
        assert time.monotonic() - began >= 0.2
        assert not lock_until(file.fileno(), began)  # one try
        assert not try_lock(file.fileno())
        assert not try_lock(file.fileno(), shared=True)


def test_a_lock_is_there_once_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open() as file, locked_elsewhere(path) as holder:
        holder.kill()
        assert lock_until(file.fileno(), time.monotonic() + 60.0)
        with path.open() as another:
            assert not try_lock(another.fileno())


def test_readers_share_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open() as file, locked_elsewhere(path, "shared"):
        assert try_lock(file.fileno(), shared=True)
        assert not lock_until(file.fileno(), time.monotonic())


def test_a_lock_goes_with_its_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with closing(path.open("a")) as first:
        assert try_lock(first.fileno())
    second = os.open(path, os.O_RDONLY)
    try:
        assert try_lock(second)
    finally:
        os.close(second)


def test_a_directory_is_locked_for_the_block(tmp_path: Path) -> None:
    with directory_locked(tmp_path) as first:
        assert first
        with directory_locked(tmp_path) as second:
            assert not second
        with directory_locked(tmp_path, 0.05) as later:
            assert not later
    with directory_locked(str(tmp_path)) as again:
        assert again
    with pytest.raises(FileNotFoundError), directory_locked(tmp_path / "none"):
        pass
