"""Which cached bytes go first: blobs in the order of their last use, and within one what was not read lately."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import TYPE_CHECKING

from obdlab.sources.cachefiles import CacheFiles, last_use, remove_blob

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


def cached_blobs(blobs: Path) -> list[Path]:
    """Return the directories of all blobs, sorted by name."""
    return sorted(path for path in blobs.glob("*/*") if path.is_dir())


def evict(blobs: Path, wanted: int) -> None:
    """Give back ``wanted`` bytes, or as many as there are. Under the lock of the cache.

    What cannot be given back is said in the log, and the next blob's turn comes.
    """
    for directory in sorted(cached_blobs(blobs), key=last_use):
        if wanted <= 0:
            return
        try:
            wanted -= shrink(directory, wanted)
        except OSError as error:
            logger.warning("%s: cannot give back space: %s", directory, error)


def discard(directory: Path) -> int:
    """Give back all of one blob and return how many bytes that was; it is removed if nobody has it open.

    Under the lock of the cache. Raises OSError.
    """
    files = CacheFiles.attach(directory)
    if files is None:
        return remove_blob(directory)
    with closing(files):
        if not files.in_use:
            return remove_blob(directory)
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
        return remove_blob(directory)
    with closing(files):
        freed = files.reclaim(wanted)
        if files.cached_units() == 0 and not files.in_use:
            freed += remove_blob(directory)
        return freed
