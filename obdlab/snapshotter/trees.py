"""Deleting and counting directories with hostile contents, as containers and images make them.

A hostile owner may nest directories deeper than a recursion or a path reaches, and replace a directory by a link
during the walk. So each step starts from an open directory and follows no link, and few directories are open at once.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MAX_DEPTH = 100
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def delete_tree(directory: Path) -> None:
    """Delete a directory with its contents, but nothing behind links or mounts.

    Anything that cannot be deleted stays.
    """
    with suppress(OSError):
        descriptor = os.open(directory, _FLAGS)
        try:
            while _empty(descriptor, descriptor, 0):
                pass
        finally:
            os.close(descriptor)
        os.rmdir(directory)


# Returns True if directories too deep to be reached were moved up to ``top``, where the next turn reaches them.
def _empty(top: int, descriptor: int, depth: int) -> bool:
    moved = False
    with os.scandir(descriptor) as entries:
        for entry in entries:
            with suppress(OSError):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=descriptor)
                elif depth == _MAX_DEPTH:
                    os.rename(entry.name, f".deep-{secrets.token_hex(8)}", src_dir_fd=descriptor, dst_dir_fd=top)
                    moved = True
                else:
                    child = os.open(entry.name, _FLAGS, dir_fd=descriptor)
                    try:
                        if os.fstat(child).st_dev == os.fstat(top).st_dev:
                            moved = _empty(top, child, depth + 1) or moved
                    finally:
                        os.close(child)
                    os.rmdir(entry.name, dir_fd=descriptor)
    return moved


def statuses(root: Path, *, skip: str = "") -> Iterator[os.stat_result]:
    """Yield the status of a directory and of all entries below it; nothing if the directory is missing.

    Leaves out entries of the root called ``skip``, entries more than 100 directories deep, and entries that vanish
    meanwhile.
    """
    try:
        descriptor = os.open(root, _FLAGS)
    except OSError:
        return
    try:
        yield os.fstat(descriptor)
        yield from _below(descriptor, skip, 0)
    finally:
        os.close(descriptor)


def _below(descriptor: int, skip: str, depth: int) -> Iterator[os.stat_result]:
    with os.scandir(descriptor) as entries:
        for entry in entries:
            if entry.name == skip:
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            yield status
            if not stat.S_ISDIR(status.st_mode) or depth == _MAX_DEPTH:
                continue
            try:
                child = os.open(entry.name, _FLAGS, dir_fd=descriptor)
            except OSError:
                continue
            try:
                yield from _below(child, "", depth + 1)
            finally:
                os.close(child)
