"""Free space on the disks that an experiment writes to, and failures caused by full disks.

A start on a full disk fails in many ways (containerd's text, an OSError, a cache that stores nothing and asks the
registry again), and none of them says anything about the measured programs. So such a failure ends the run with one
line; its cell has no row and is measured again.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError, causes
from obdlab.foreign import NO_SPACE_ERRNOS, says_no_space
from obdlab.lab.run import interrupts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# A file system with less free space counts as full and explains a failure.
_NOTHING = 1 << 20


class DiskFullError(ObdlabError):
    """A disk is full, or too small for an experiment."""


@dataclass(frozen=True, slots=True)
class Room:
    """Free and total bytes of the file system of a directory; ``device`` identifies the file system."""

    directory: Path
    free: int
    size: int
    device: int

    def __str__(self) -> str:
        return f"{self.directory}: {gigabytes(self.free)} of {gigabytes(self.size)} free"


def room(directory: Path) -> Room:
    """Return the room on the file system where ``directory`` is or would be made. Raises OSError."""
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    found = os.statvfs(there)
    return Room(directory, found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize, os.stat(there).st_dev)


def check(error: BaseException, places: Iterable[Path]) -> None:
    """Raise DiskFullError if a full disk caused ``error``; ``places`` are the directories written to."""
    if isinstance(error, DiskFullError):
        raise error
    rooms = sorted((room(place) for place in places), key=lambda each: each.free)
    if _is_about_space(error) or (rooms and rooms[0].free < _NOTHING):
        where = next((str(room(Path(each))) for each in _names(error)), str(rooms[0]) if rooms else "a disk is full")
        raise DiskFullError(f"disk full: {where} ({_first_line(error)})") from error


@contextmanager
def naming_full_disks(*places: Path) -> Iterator[None]:
    """Turn an error caused by a full disk into a DiskFullError that names the disk; interrupts pass."""
    try:
        yield
    except (ObdlabError, OSError) as error:
        interrupts.check(error)
        check(error, places)
        raise


def gigabytes(size: float) -> str:
    """Return a size in words, in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


# Cleaning up on a full disk replaces the first error by another one, so all causes count.
def _is_about_space(error: BaseException) -> bool:
    return any(
        (isinstance(each, OSError) and each.errno in NO_SPACE_ERRNOS) or says_no_space(str(each))
        for each in causes(error)
    )


def _names(error: BaseException) -> Iterator[str]:
    for each in causes(error):
        if isinstance(each, OSError) and each.errno in NO_SPACE_ERRNOS and isinstance(each.filename, str):
            yield each.filename


# A program's output has many lines: return the one that names the missing space, else the first.
def _first_line(error: BaseException) -> str:
    lines = [line.strip(" |") for each in causes(error) for line in str(each).splitlines() if line.strip(" |")]
    told = next((line for line in lines if says_no_space(line)), "")
    return (told or (lines[0] if lines else type(error).__name__))[:200]
