"""Bytes of files in the page cache, by mincore(2).

mincore works on every kernel and, unlike ``fincore``, without a process per batch of files; a snapshot has thousands.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_FAILED = ctypes.c_void_p(-1).value
# The most bytes per mincore call: a vector of 256 KiB.
_WINDOW = 1 << 30


def resident_bytes(path: Path) -> int:
    """Return the bytes of a file in the page cache, in whole pages. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        size = os.fstat(descriptor).st_size
        return sum(
            _resident(descriptor, offset, min(_WINDOW, size - offset), path) for offset in range(0, size, _WINDOW)
        )
    finally:
        os.close(descriptor)


def resident_below(directories: Iterable[Path]) -> tuple[int, int]:
    """Return (bytes in the page cache, bytes in all) of the regular files below directories.

    File systems mounted there are skipped (looking would warm their data up), as are databases (``*.db``), which
    snapshotters have from the start. Files that vanish meanwhile do not count.
    """
    resident = total = 0
    for directory in directories:
        device = directory.stat().st_dev if directory.exists() else -1
        for parent, below, names in os.walk(directory):
            below[:] = [name for name in below if _device(Path(parent, name)) == device]
            for name in names:
                path = Path(parent, name)
                with suppress(FileNotFoundError):
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode) and status.st_size and path.suffix != ".db":
                        total += status.st_size
                        resident += resident_bytes(path)
    return resident, total


def occupied_below(directories: Iterable[Path]) -> int:
    """Return the bytes on disk of the files below directories, without file systems mounted there."""
    occupied = 0
    for directory in directories:
        device = _device(directory)
        for parent, below, names in os.walk(directory):
            below[:] = [name for name in below if _device(Path(parent, name)) == device]
            for name in names:
                with suppress(FileNotFoundError):
                    occupied += 512 * Path(parent, name).lstat().st_blocks
    return occupied


def _device(path: Path) -> int:
    try:
        return path.lstat().st_dev
    except OSError:
        return -1


def _resident(descriptor: int, offset: int, length: int, path: Path) -> int:
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), "mmap failed", str(path))
    try:
        pages = -(-length // mmap.PAGESIZE)
        vector = ctypes.create_string_buffer(pages)
        if _libc.mincore(address, length, vector) != 0:
            raise OSError(ctypes.get_errno(), "mincore failed", str(path))
        # Only the lowest bit of each byte is defined.
        return sum(byte & 1 for byte in vector.raw) * mmap.PAGESIZE
    finally:
        _libc.munmap(address, length)
