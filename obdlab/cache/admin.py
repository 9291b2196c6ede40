"""Managing the cache directory while others use it: list and remove blobs and unpacked disks, check blobs."""

from __future__ import annotations

import hashlib
import logging
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.cache.eviction import cached_blobs, discard, evict
from obdlab.cache.layout import DECOMPRESSED, unit_sums
from obdlab.cache.unitfiles import CacheFiles
from obdlab.cache.unpacked import FlatFile, directories_of, entry_of, remove_unused

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from obdlab.cache.space import CacheSpace

logger = logging.getLogger(__name__)

_READ_UNITS = 256


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One blob in the cache. Sizes in bytes; ``size`` is 0 if its files are damaged."""

    registry: str
    digest: str
    size: int
    cached_bytes: int
    disk_bytes: int
    last_use: float  # seconds since 1970
    in_use: bool
    verified: bool  # all of it was there and matched the digest


@dataclass(frozen=True, slots=True)
class CheckedBlob:
    """Result of :func:`check_blob`. ``damaged`` has the offsets of units that do not match their sums."""

    registry: str
    digest: str
    checked_bytes: int
    damaged: tuple[int, ...]
    #: True if the blob matches its digest; None if it is incomplete, or is decompressed content.
    matches: bool | None

    @property
    def sound(self) -> bool:
        return not self.damaged and self.matches is not False


def blobs_of(space: CacheSpace, digests: Collection[str] = ()) -> list[Path]:
    """Return the directories of all blobs, or of those with one of ``digests``."""
    return [path for path in cached_blobs(space.blobs) if not digests or path.name in digests]


def entries(space: CacheSpace, digests: Collection[str] = ()) -> list[CacheEntry]:
    """Return all blobs, or those with one of ``digests``, the last used first. Raises OSError."""
    found = []
    for directory in blobs_of(space, digests):
        with space.changing(directory, patient=True):  # keeps in_use stable: no process can open the blob meanwhile
            if directory.is_dir():
                found.append(_entry(directory))
    return sorted(found, key=lambda entry: entry.last_use, reverse=True)


def _entry(directory: Path) -> CacheEntry:
    files = CacheFiles.attach(directory)
    if files is None:
        return CacheEntry(directory.parent.name, directory.name, 0, 0, 0, 0.0, in_use=False, verified=False)
    with closing(files):
        header = files.header
        return CacheEntry(
            directory.parent.name,
            directory.name,
            files.size,
            min(files.cached_units() * files.unit, files.size),
            files.disk_bytes(),
            header.last_use,
            in_use=files.in_use,
            verified=header.verified,
        )


def unpacked_disks(space: CacheSpace) -> list[FlatFile]:
    """Return all unpacked disks, the last used first."""
    found = [entry for directory in directories_of(space) if (entry := entry_of(directory)) is not None]
    return sorted(found, key=lambda entry: entry.last_use, reverse=True)


def collect(space: CacheSpace) -> int:
    """Remove half-made unpacked disks of killed processes, and evict down to the limits; return the bytes freed.

    Raises OSError.
    """
    freed = remove_unused(space, half_made_only=True)
    space.count()
    return freed + (evict(space) if space.excess() > 0 else 0)


def clear(space: CacheSpace, digests: Collection[str] = ()) -> int:
    """Remove all blobs and unused unpacked disks, or the blobs ``digests``, and return the bytes freed on disk.

    Devices that read them go on, and fetch from their registry again. Raises OSError.
    """
    freed = 0
    # Takes the lock for each blob, so that devices can store in between.
    for directory in blobs_of(space, digests):
        with space.changing(directory, patient=True):
            if directory.is_dir():
                freed += discard(directory)
    return freed if digests else freed + remove_unused(space)


def check_blob(
    space: CacheSpace, directory: Path, *, repair: bool, progress: Callable[[int], object] = lambda _: None
) -> CheckedBlob | None:
    """Read and check the cached units of a blob; ``repair`` drops damaged ones.

    Returns None if the blob was removed meanwhile. ``progress`` gets the bytes read. Raises OSError.
    """
    with space.changing(directory, patient=True):
        if not directory.is_dir():
            return None
        files = CacheFiles.attach(directory)
        if files is None:
            if repair:
                discard(directory)
            return CheckedBlob(directory.parent.name, directory.name, 0, (0,), None)
    with closing(files):
        return _check(space, files, repair, progress)


def _check(space: CacheSpace, files: CacheFiles, repair: bool, progress: Callable[[int], object]) -> CheckedBlob:
    generation = files.header.generation
    whole = hashlib.sha256()
    checked = 0
    damaged: list[int] = []
    for first in range(0, files.units, _READ_UNITS):
        there = files.present(first, min(first + _READ_UNITS, files.units))
        for unit in (first + number for number, present in enumerate(there) if present):
            data = _sound_unit(space, files, unit, repair)
            if data is None:
                damaged.append(unit * files.unit)
                continue
            whole.update(data)
            checked += len(data)
            progress(len(data))
    matches = None
    named_by_content = not files.directory.parent.name.endswith(DECOMPRESSED)
    if named_by_content and checked == files.size and not damaged:
        matches = f"sha256:{whole.hexdigest()}" == files.directory.name
        if matches:
            files.mark_verified(generation)
        elif repair:
            with space.changing(files.directory, patient=True):
                if files.directory.is_dir():
                    discard(files.directory)
    return CheckedBlob(files.directory.parent.name, files.directory.name, checked, tuple(damaged), matches)


def _sound_unit(space: CacheSpace, files: CacheFiles, unit: int, repair: bool) -> bytes | None:
    # Returns the unit's content (empty if it was removed meanwhile), or None if it is damaged.
    data = _matching(files, unit)
    if data is not None:
        return data
    with space.changing(files.directory, patient=True):  # no process stores or evicts it now
        data = _matching(files, unit)
        if data is None and repair:
            files.drop(unit, unit + 1)
            files.punch(unit, unit + 1)
        return data


def _matching(files: CacheFiles, unit: int) -> bytes | None:
    wanted = files.sums(unit, unit + 1)
    if not wanted[-1]:
        return b""
    data = files.load(unit, unit + 1)
    sound = len(data) == files.length_of(unit, unit + 1) and memoryview(unit_sums(data)) == wanted
    return data if sound else None
