"""Copying a file with its holes: shared with the original where the file system can, else its data alone."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from typing import TYPE_CHECKING

from obdlab.errors import SourceError

if TYPE_CHECKING:
    from pathlib import Path

# linux/fs.h
_FICLONE = 0x40049409
_PIECE = 16 << 20


def copy_sparse(source: Path, target: Path, timeout_s: float) -> None:
    """Copy a regular file to a new one. Raises SourceError, also after ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    try:
        with source.open("rb") as data, target.open("xb") as copy:
            if _is_cloned(data.fileno(), copy.fileno()):
                return
            os.ftruncate(copy.fileno(), os.fstat(data.fileno()).st_size)
            for begin, end in _extents(data.fileno()):
                while begin < end:
                    if time.monotonic() > deadline:
                        raise SourceError(f"copying it took longer than {timeout_s:.0f} s", blob=str(source))
                    count = os.copy_file_range(
                        data.fileno(), copy.fileno(), min(end - begin, _PIECE), offset_src=begin, offset_dst=begin
                    )
                    if not count:
                        raise SourceError("became shorter while it was copied", blob=str(source))
                    begin += count
    except OSError as error:
        raise SourceError(f"cannot be copied ({error.strerror})", blob=str(source)) from error


def _is_cloned(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:  # most file systems
        return False
    return True


def _extents(descriptor: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    end = 0
    while True:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return found
            raise
        end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        found.append((begin, end))
