"""Opening files in directories that other users may have prepared: links, pipes and files of others are refused."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

# Names and links of one path.
_MOST_PARTS = 4096
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


def own_path(path: Path) -> Path:
    """Return a path for a file of this process', with its symbolic links resolved.

    Raises OSError: EINVAL for a link of another user than root and this process', and for an existing file that is no
    regular file or that other users can have put there, ELOOP for too many links.
    """
    found, left = Path("/"), list(reversed(path.absolute().parts[1:]))
    for _ in range(_MOST_PARTS):
        if not left:
            break
        name = left.pop()
        entry = found.parent if name == ".." else found / name
        try:
            status = os.lstat(entry)
        except FileNotFoundError:
            found = entry
            continue
        if not stat.S_ISLNK(status.st_mode):
            found = entry
        elif status.st_uid not in (0, os.geteuid()):
            raise OSError(errno.EINVAL, f"symbolic link of user {status.st_uid} (wanted a link of ours)", str(entry))
        else:
            target = Path(os.readlink(entry))
            found = Path("/") if target.is_absolute() else found
            left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    try:
        os.close(open_own(found, os.O_WRONLY))
    except FileNotFoundError:  # made by its first line
        pass
    return found


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & _OTHERS_WRITE


def _words(status: os.stat_result) -> str:
    links = f", {status.st_nlink} names" if stat.S_ISREG(status.st_mode) else ""
    return f"got owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}{links}; wanted ours, without 0022"
