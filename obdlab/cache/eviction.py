"""The order of eviction: blobs by their last use, and within a blob the units not read lately.

Data in use stays: of an open blob, only units go that no reader has used since the eviction's last pass, which is at
least a while ago. If that frees too little, the cache stays full, and new data is not stored.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import TYPE_CHECKING

from obdlab.cache.layout import last_use, remove_blob
from obdlab.cache.unitfiles import CacheFiles
from obdlab.cache.unpacked import remove_unused

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.cache.space import CacheSpace

logger = logging.getLogger(__name__)

# Bytes evicted while the lock is held once.
_STEP = 32 << 20
# Readers note their reads within a quarter of a second after a pass of the eviction.
SWEEP_PAUSE_S = 0.5


def cached_blobs(blobs: Path) -> list[Path]:
    """Return the directories of all blobs, sorted by name."""
    return sorted(path for path in blobs.glob("*/*") if path.is_dir())


def evict(space: CacheSpace) -> int:
    """Evict until the directory is below its low mark, or nothing is left; return the evicted bytes.

    Logs a blob that cannot be evicted, and goes on with the next. Raises OSError.
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
                break  # removed meanwhile
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
    """Evict all of one blob and return the bytes freed; its files are removed unless a process has them open.

    Needs the lock of the cache. Raises OSError.
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
    """Evict up to about ``wanted`` bytes of one blob; removes its files if it is empty then and not open.

    Returns the bytes freed. Needs the lock of the cache. Raises OSError.
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
