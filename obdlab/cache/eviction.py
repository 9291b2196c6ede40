"""Eviction: a thread of a full cache, and its order: blobs and unpacked disks by their last use, in a blob the units
not read lately.

A process that finds the directory above its high mark starts a thread that evicts until it is below the low mark. The
thread holds the lock for one step of a blob at a time, and only one process evicts.

Data in use stays: of an open blob, only units go that no reader has used since the eviction's last pass, which is at
least a while ago. A disk in use stays whole. If that frees too little, the cache stays full, and new data is not
stored.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from obdlab.cache import unpacked
from obdlab.cache.layout import last_use, remove_blob
from obdlab.cache.space import CacheSpace, disk_usage
from obdlab.cache.unitfiles import CacheFiles
from obdlab.observe import audit
from obdlab.system.locks import directory_locked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

# Bytes evicted while the lock is held once.
_STEP = 32 << 20
# Readers note their reads within a quarter of a second after a pass of the eviction.
SWEEP_PAUSE_S = 0.5
# For a disk that is to be unpacked nothing is evicted that was used since: images that are used in turn would evict
# each other, and each would be fetched and unpacked again.
FRESH_S = 3600.0
# Pause after an eviction that did not help.
_REST_S = 1.0


class EvictingSpace(CacheSpace):
    """A cache directory that stays within its limits: a store that finds it too full starts an eviction."""

    def __init__(self, directory: Path | str, *, quota: int = 0, min_free: int = 0) -> None:
        super().__init__(directory, quota=quota, min_free=min_free)
        #: Bytes evicted so far, by this object.
        self.evicted_bytes = 0
        self._evicting = threading.Lock()
        self._no_eviction_before = 0.0

    def start_eviction(self, wanted: int = 0) -> None:
        """Start a thread that evicts until there is room for ``wanted`` bytes; returns at once.

        Does nothing if one is running already, or the last one did not help a moment ago.
        """
        if time.monotonic() < self._no_eviction_before or not self._evicting.acquire(blocking=False):
            return
        self._wanted = wanted
        try:
            threading.Thread(target=self._evict, name="obdlab-evict", daemon=True).start()
        except RuntimeError:  # the system has no more threads: the next store tries again
            self._evicting.release()

    def make_room(self, wanted: int) -> int:
        """Evict blobs and disks that are not in use and were not for an hour, until ``wanted`` bytes fit.

        Nothing is evicted if that would not suffice. Returns the bytes that may be stored. Raises OSError.
        """
        room = super().make_room(wanted)
        if room >= wanted:
            return room
        old = [each for each in by_last_use(self) if last_use_of(self, each) < time.time() - FRESH_S]
        if room + sum(_evictable(self, each) for each in old) < wanted:
            return room
        for directory in old:
            freed = _remove_if_unused(self, directory)
            self.evicted_bytes += freed
            room = super().make_room(wanted)
            if room >= wanted:
                break
        return room

    def wait_for_eviction(self, timeout_s: float) -> bool:
        """Wait until this object's eviction is over, if there is one. Return False on timeout."""
        over = self._evicting.acquire(timeout=timeout_s)
        if over:
            self._evicting.release()
        return over

    def _evict(self) -> None:
        try:
            with self._sole_evictor() as mine:
                if mine:
                    freed = evict(self)
                    self.evicted_bytes += freed
                    logger.info("%s: gave back %d bytes", self.directory, freed)
                    if audit.active:
                        audit.record_values("eviction", actualEvict=freed, totalUsed=self.count())
                if not mine or not freed:
                    self._no_eviction_before = time.monotonic() + _REST_S
        except OSError as error:
            logger.warning("%s: eviction failed: %s", self.directory, error)
            self._no_eviction_before = time.monotonic() + _REST_S
        except Exception:
            logger.exception("%s: eviction failed unexpectedly", self.directory)
            self._no_eviction_before = time.monotonic() + _REST_S
        finally:
            self._evicting.release()

    @contextmanager
    def _sole_evictor(self) -> Iterator[bool]:
        # Between processes: two would evict twice as much as is needed. Yields True if this process is the one.
        self.blobs.mkdir(mode=0o700, exist_ok=True)  # a cache may have unpacked disks alone
        with directory_locked(self.blobs) as is_alone:
            yield is_alone


def cached_blobs(blobs: Path) -> list[Path]:
    """Return the directories of all blobs, sorted by name."""
    return sorted(path for path in blobs.glob("*/*") if path.is_dir())


def by_last_use(space: CacheSpace) -> list[Path]:
    """Return the directories of all blobs and unpacked disks, the least recently used first."""
    return sorted([*cached_blobs(space.blobs), *unpacked.directories_of(space)], key=partial(last_use_of, space))


def last_use_of(space: CacheSpace, directory: Path) -> float:
    """Return the time of the last use of a blob or an unpacked disk (seconds since 1970); 0 if unknown."""
    return (last_use if space.blobs in directory.parents else unpacked.last_use)(directory)


def evict(space: CacheSpace) -> int:
    """Evict until the directory is below its low mark, or nothing is left; return the evicted bytes.

    Logs a blob that cannot be evicted, and goes on with the next. Raises OSError.
    """
    freed = _come_by(space)
    if space.excess() <= 0:
        return freed
    space.count()
    if space.excess() <= 0:
        return freed
    time.sleep(SWEEP_PAUSE_S)
    return freed + _come_by(space)


def _come_by(space: CacheSpace) -> int:
    freed = 0
    for directory in by_last_use(space):
        is_blob = space.blobs in directory.parents
        while (wanted := space.excess()) > 0:
            step = min(wanted, _STEP) if is_blob else sys.maxsize
            try:
                if is_blob:
                    with space.changing(directory, patient=True):
                        got = shrink(directory, step)
                else:
                    got = unpacked.remove_if_unused(space, directory)
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


def _remove_if_unused(space: CacheSpace, directory: Path) -> int:
    if space.blobs not in directory.parents:
        return unpacked.remove_if_unused(space, directory)
    with space.changing(directory, patient=True):
        return 0 if not directory.exists() or _is_used(directory) else _remove(directory)


def _evictable(space: CacheSpace, directory: Path) -> int:
    if space.blobs not in directory.parents:
        entry = unpacked.entry_of(directory)
        return 0 if entry is None or entry.in_use else entry.disk_bytes
    with space.changing(directory, patient=True):
        return 0 if not directory.exists() or _is_used(directory) else disk_usage(directory)


# Needs the lock of the cache.
def _is_used(directory: Path) -> bool:
    files = CacheFiles.attach(directory)
    if files is None:
        return False
    with closing(files):
        return files.in_use


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
