"""Opening files in directories that other users may have prepared: links, pipes and files of others are refused."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check_own_directory(path: Path, *, follow_symlinks: bool = True) -> None:
    """Raise OSError (EINVAL) unless only root and this process' user can add and change files in a directory.

    Raises FileNotFoundError if the directory is missing, NotADirectoryError for anything else, a symbolic link among
    them unless ``follow_symlinks``.
    """
    status = os.stat(path, follow_symlinks=follow_symlinks)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if not _is_ours(status):
        raise OSError(errno.EINVAL, f"directory can be changed by other users ({_words(status)})", str(path))


def open_own(path: Path, flags: int, mode: int = 0o600) -> int:
    """Open a regular file that only root and this process' user can have put there; symbolic links are not followed.

    Raises OSError: ELOOP for a symbolic link, EINVAL for anything else than such a file.
    """
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, mode)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1 and _is_ours(status):
        return fd
    os.close(fd)
    what = "not a regular file" if not stat.S_ISREG(status.st_mode) else "file can be changed by other users"
    raise OSError(errno.EINVAL, f"{what} ({_words(status)})", str(path))


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & _OTHERS_WRITE


def _words(status: os.stat_result) -> str:
    links = f", {status.st_nlink} names" if stat.S_ISREG(status.st_mode) else ""
    return f"got owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}{links}; wanted ours, without 0022"
