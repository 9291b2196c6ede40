"""The cached units of one blob in one process: checksums in memory, so that a hit is one pread and one CRC."""

from __future__ import annotations

import errno
import logging
import threading
import time
from typing import TYPE_CHECKING, Protocol

from obdlab.cache.layout import PAGE_SHIFT, pages_of, unit_sums
from obdlab.cache.space import CacheFullError
from obdlab.cache.unitfiles import CacheFiles
from obdlab.observe import audit
from obdlab.observe.counters import CORRUPTIONS_HEALED, STORE_FAILURES

if TYPE_CHECKING:
    from array import array
    from pathlib import Path

    from obdlab.blob import Buffer
    from obdlab.cache.flights import Statistics
    from obdlab.cache.space import CacheSpace
    from obdlab.call import Call

logger = logging.getLogger(__name__)

# Interval of noting the blob's use and checking its files.
_TICK_S = 0.25
# Pause before trying again to open the files.
_RETRY_S = 2.0
# Errors of opening for writing where reading may still work.
_NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)


class UnitCheck(Protocol):
    """Checks units against a hash that the image's manifest pins, beyond the sums of the cache's own files."""

    #: Text without "/" that names the right bytes: blobs of another name do not share files.
    name: str
    #: Bytes of a checked unit. A cached blob's units are multiples of it.
    unit: int

    def first_wrong(self, offset: int, data: Buffer, call: Call | None = None) -> int | None:
        """Return the offset of the first wrong unit in ``data``, whole units at ``offset``; None if all are right.

        What the check reads is read on the terms of the ``call``. Raises an ObdlabError if they cannot be checked.
        """


class CachedUnits:
    """The units of one blob, in memory and in its files. Thread-safe.

    ``sums`` has the same values as the file ``sums``, or 0 for pages of a unit that this process has not used yet.
    ``attend`` is 1 for each unit whose next use must be reported (:meth:`note_use`, read-ahead); after ``tick_at``
    the next use of any unit must be. With ``check``, a unit of the files must also pass that before this process uses
    it, and at each use if other users can change the files.
    """

    def __init__(
        self,
        space: CacheSpace,
        directory: Path,
        size: int,
        unit: int,
        name: str,
        counters: Statistics,
        check: UnitCheck | None = None,
    ):
        self.name = name
        self._check = check
        self.counters = counters
        self._space = space
        self.files, error = _open(space, directory, size, unit)
        if error is not None:
            self._say_not_cached(error)
        self.unit_shift = self.files.unit.bit_length() - 1
        self.sums = memoryview(bytearray(4 * pages_of(size))).cast("I")
        self.attend = bytearray(b"\1" * self.files.units)
        self.tick_at = 0.0
        self._sweeps = 0
        # Units that were damaged on disk and are not cached again yet.
        self._damaged: set[int] = set()
        self._reattaching = threading.Lock()
        self._retry_at = time.monotonic() + _RETRY_S

    # A cache without write permission is the same for every blob, so it is logged once.
    def _say_not_cached(self, error: OSError) -> None:
        level, name = _level(error), self.name
        if error.errno in _NOT_OURS:
            level = logging.DEBUG if self._space.refusal_said else level
            name, self._space.refusal_said = str(self._space.directory), True
        hits = ", but for what is there" if self.files.read_only else ""
        logger.log(level, "%s: not cached for now%s: %s", name, hits, error)

    def reattach(self) -> None:
        """If the files could not be opened, or were removed, try again from time to time."""
        if self.files.attached or time.monotonic() < self._retry_at or not self._reattaching.acquire(blocking=False):
            return
        try:
            files, error = _open(self._space, self.files.directory, self.files.size, self.files.unit)
            if error is None and files.unit == self.files.unit:
                self.files.replace(files)
                logger.info("%s: cached again", self.name)
                return
            files.close()
            logger.debug("%s: still not cached: %s", self.name, error or "others cache it with another unit")
        finally:
            self._retry_at = time.monotonic() + _RETRY_S
            self._reattaching.release()

    def load(self, first: int, stop: int, call: Call | None = None) -> bytes:
        """Return the checked content of the units up to the first that fails; a damaged ``first`` is dropped."""
        files = self.files
        step = 1 << self.unit_shift - PAGE_SHIFT
        for _ in range(2):  # other processes may evict and store the unit meanwhile: only a second mismatch is damage
            sums = files.sums(first, stop)  # before the data
            started = time.monotonic()
            data = files.load(first, stop)
            if time.monotonic() - started >= audit.SLOW_READ_S:
                self._audit("file:read", first, len(data), started, audit.SLOW_READ_S)
            view = memoryview(data)
            unit = first
            while unit < stop:
                content = view[unit - first << self.unit_shift : unit + 1 - first << self.unit_shift]
                wanted = sums[(unit - first) * step : (unit + 1 - first) * step]
                if not wanted[-1] or len(content) != files.length_of(unit, unit + 1):
                    break
                if memoryview(unit_sums(content)) != wanted:
                    break
                unit += 1
            if unit > first and self._check is not None:
                checked = view[: unit - first << self.unit_shift]
                wrong = self._check.first_wrong(first << self.unit_shift, checked, call)
                unit = unit if wrong is None else wrong >> self.unit_shift
            if unit > first:
                if self._check is None or not files.read_only:
                    self._adopt(first, sums[: (unit - first) * step])
                return data[: unit - first << self.unit_shift]
            if not files.present(first, first + 1)[0]:
                return b""
        self._heal(first)
        return b""

    def store(self, first: int, data: bytes) -> bool:
        """Store fetched units if possible. Return False if not; logs the reason."""
        if not self.files.attached:
            self.counters.uncached_bytes += len(data)
            return False
        try:
            started = time.monotonic()
            sums = self.files.store(self._space, first, data)
            if time.monotonic() - started >= audit.SLOW_WRITE_S:
                self._audit("file:write", first, len(data), started, audit.SLOW_WRITE_S)
        except OSError as error:
            self._not_stored(error, len(data))
            return False
        self._adopt(first, sums)
        if self._damaged:
            self._note_healed(first, len(data))
        return True

    def _note_healed(self, first: int, length: int) -> None:
        healed = {unit for unit in self._damaged if 0 <= unit - first << self.unit_shift < length}
        if healed:
            self._damaged -= healed
            CORRUPTIONS_HEALED.add(len(healed), "cache")

    def drop(self, first: int, stop: int) -> None:
        """Drop the units, for all processes."""
        self.forget(first, stop)
        try:
            self.files.drop(first, stop)
        except OSError as error:
            logger.warning("%s: not cached for now: %s", self.name, error)
            self._detach()

    def forget(self, first: int, stop: int) -> None:
        """Make the next use of the units check the files."""
        begin, end = first << self.unit_shift - PAGE_SHIFT, stop << self.unit_shift - PAGE_SHIFT
        self.sums[begin:end] = memoryview(bytes(4 * len(self.sums[begin:end]))).cast("I")

    def note_use(self, first: int, stop: int) -> None:
        """Report that the units are being read, so that the eviction spares them."""
        now = time.monotonic()
        if now >= self.tick_at:
            self.tick_at = now + _TICK_S
            self._tick()
        self.files.touch(first, stop)

    def _tick(self) -> None:
        if not self.files.attached:
            return
        header = self.files.current_header()
        if header is None:
            self._went()
            return
        self.files.stamp()
        if header.sweeps != self._sweeps:
            self._sweeps = header.sweeps
            self.attend[:] = b"\1" * len(self.attend)

    def _adopt(self, first: int, sums: memoryview | array[int]) -> None:
        begin = first << self.unit_shift - PAGE_SHIFT
        self.sums[begin : begin + len(sums)] = memoryview(sums)

    def _heal(self, unit: int) -> None:
        logger.warning(
            "%s: cached data failed its checksum at offset %d, fetching it again", self.name, unit << self.unit_shift
        )
        self.counters.corrupt_units += 1
        self._damaged.add(unit)
        self.drop(unit, unit + 1)

    def _not_stored(self, error: OSError, length: int) -> None:
        STORE_FAILURES.add()
        if error.errno == errno.ESTALE:
            self._went()
        else:
            # Log once: a full disk fails every time.
            level = logging.DEBUG if self.counters.uncached_bytes else _level(error)
            logger.log(level, "%s: not cached: %s", self.name, error.strerror)
        self.counters.uncached_bytes += length

    def _audit(self, action: str, unit: int, length: int, started: float, slow_s: float) -> None:
        path = str(self.files.directory / "data")
        audit.record_slow(action, path, unit << self.unit_shift, length, started, slow_s)

    def _went(self) -> None:
        logger.info("%s: the cache's files were removed or changed by others", self.name)
        self._detach()

    def _detach(self) -> None:
        self.files.replace(CacheFiles.absent(self.files.directory, self.files.size, self.files.unit))


def _open(space: CacheSpace, directory: Path, size: int, unit: int) -> tuple[CacheFiles, OSError | None]:
    try:
        return CacheFiles.open(space, directory, size, unit), None
    except OSError as error:
        files = CacheFiles.open_read_only(directory, size) if error.errno in _NOT_OURS else None
        return files or CacheFiles.absent(directory, size, unit), error


def _level(error: OSError) -> int:
    # A full or busy cache is normal; a failing disk is not.
    return logging.INFO if isinstance(error, CacheFullError | TimeoutError) else logging.WARNING
