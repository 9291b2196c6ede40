"""Which cached bytes go first: blobs in the order of their last use, and within one what was not read lately.

What is being read stays: of a blob that somebody has open, only units go that nobody read since the eviction last
came by, and that is at least a while ago. If that is not enough, the cache stays full, and what comes is not stored.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import TYPE_CHECKING

from obdlab.sources.cachefiles import CacheFiles
from obdlab.sources.cachelayout import last_use, remove_blob
from obdlab.sources.flatfiles import remove_unused

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.sources.cachespace import CacheSpace

logger = logging.getLogger(__name__)

# The lock is held while so much is given back.
_STEP = 32 << 20
# Readers tell within a quarter of a second what they read, if the eviction has come by.
SWEEP_PAUSE_S = 0.5


def cached_blobs(blobs: Path) -> list[Path]:
    """Return the directories of all blobs, sorted by name."""
    return sorted(path for path in blobs.glob("*/*") if path.is_dir())


def evict(space: CacheSpace) -> int:
    """Give back until the directory holds no more than it should, or nothing is left; return how much it was.

    What cannot be given back is said in the log, and the next blob's turn comes. Raises OSError.
    """
    freed = remove_unused(space) if space.excess() > 0 else 0
    freed += _come_by(space)
    if space.excess() <= 0:
        return freed
    space.count()
    if space.excess() <= 0:
        return freed
    time.sleep(SWEEP_PAUSE_S)
    return freed + _come_by(space)


def _come_by(space: CacheSpace) -> int:
    freed = 0
    for directory in sorted(cached_blobs(space.blobs), key=last_use):
        while (wanted := space.excess()) > 0:
            step = min(wanted, _STEP)
            try:
                with space.changing(directory, patient=True):
                    got = shrink(directory, step)
            except FileNotFoundError:
                break  # went meanwhile
            except OSError as error:
                logger.warning("%s: cannot give back space: %s", directory, error)
                break
            freed += got
            if got < step:
                break
        if wanted <= 0:
            break
    return freed


def discard(directory: Path) -> int:
    """Give back all of one blob and return how many bytes that was; it is removed if nobody has it open.

    Under the lock of the cache. Raises OSError.
    """
    files = CacheFiles.attach(directory)
    if files is None:
        return _remove(directory)
    with closing(files):
        if not files.in_use:
            return _remove(directory)
        before = files.disk_bytes()
        files.drop(0, files.units)
        files.punch(0, files.units)
        return before - files.disk_bytes()


def shrink(directory: Path, wanted: int) -> int:
    """Give back up to about ``wanted`` bytes of one blob; one that is empty then and not open is removed.

    Returns how many it was. Under the lock of the cache. Raises OSError.
    """
    files = CacheFiles.attach(directory)
    if files is None:
        return _remove(directory)
    with closing(files):
        before = files.disk_bytes()
        in_use = files.in_use
        files.sweep(wanted, spare_used=in_use)
        freed = before - files.disk_bytes()
        if not in_use and files.cached_units() == 0:
            freed += _remove(directory)
        return freed


def _remove(directory: Path) -> int:
    freed = sum(512 * path.lstat().st_blocks for path in directory.iterdir())
    remove_blob(directory)
    return freed
