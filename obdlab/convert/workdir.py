"""Directories that a conversion works in: gone when it ends, or, if it was killed, when the next one begins."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PREFIX = "obdlab-convert-"
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def work_directory(parent: Path) -> Iterator[Path]:
    """Make a directory below ``parent`` that is this conversion's for the block, then remove it.

    What this user's killed conversions left there is removed first; directories that are in use are locked.
    Raises SourceError if ``parent`` cannot be used.
    """
    try:
        _sweep(parent)
        directory, lock = _make(parent)
    except OSError as error:
        raise SourceError(f"cannot make a work directory: {error.strerror}", blob=str(parent)) from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _make(parent: Path) -> tuple[Path, int]:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        # Until it is locked, it looks like one that was left.
        with suppress(FileNotFoundError):
            lock = os.open(directory, _FLAGS)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if directory.exists():
                return directory, lock
            os.close(lock)


def _sweep(parent: Path) -> None:
    with os.scandir(parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(_PREFIX)]
    for name in names:
        # Others' directories, and what is none, are none of ours.
        with suppress(OSError):
            _sweep_one(parent / name)


def _sweep_one(directory: Path) -> None:
    lock = os.open(directory, _FLAGS)
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(lock)
