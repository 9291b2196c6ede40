"""Block cache on local disk between a blob and where it comes from; shared by all devices and processes.

Layout: ``<directory>/blobs/<registry>/<digest>/{data, sums}`` (see :mod:`obdlab.sources.cachefiles`). Each process
checks a unit's checksum when it first uses the unit, and notes that in a table of one byte per unit, so that a hit is
a search in that table and one ``pread``. A unit that fails is dropped and fetched again. How the directory is kept
within its limits: :mod:`obdlab.sources.cachespace`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.blob import Blob, MemoryBlob, check_range
from obdlab.errors import ObdlabError, SourceError
from obdlab.formats.oci import check_digest
from obdlab.registry.deadline import deadline_of_thread
from obdlab.sources.cachefiles import CacheFiles, unit_sum
from obdlab.sources.cachespace import CacheSpace
from obdlab.sources.fetchpool import FetchPool
from obdlab.sources.flights import Demand, Flight, Statistics, total_of
from obdlab.sources.readahead import ReadAhead
from obdlab.waiting import waiting

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

# Pieces of this size keep 1 Gbit/s at 5 ms round trip busy with four requests under way, at a tenth of one core.
_PIECE = 256 << 10
# What a manifest says of a blob's size is believed only so far: the table of its units takes disk and memory.
_LARGEST = 256 << 30
# Fetching ahead gives up sooner than a reader, who then still has time to try for himself.
_BACKGROUND_SHARE = 0.25

# States of a unit in the table; a read is a hit if no unit of it is _UNKNOWN.
_UNKNOWN, _CHECKED, _MARKED = 0, 1, 2

# One component of a path, and none that begins with a dot.
_REGISTRY = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9.:+\[\]-]{0,254}", re.ASCII)

_pool = FetchPool(threads=8, queued=64)


class BlockCache:
    """Cached blobs below one directory. ``unit`` is the least that is asked of an origin, a power of two >= 4096.

    ``registry`` names whose word is taken for what belongs to a digest: a part of a blob cannot be checked against
    it, so blobs are shared only between those who name the same. For ``quota`` and ``min_free``, which hold for the
    whole directory, see :class:`CacheSpace`.
    Sequential readers have up to ``readahead_max`` bytes fetched ahead of them (0: none). A read ends within
    ``deadline_s``. Making one touches nothing; no thread runs before the first read.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        registry: str = "local",
        quota: int = 0,
        min_free: int = 0,
        unit: int = 64 << 10,
        readahead_max: int = 1 << 20,
        deadline_s: float = 120.0,
    ) -> None:
        if unit < 4096 or unit & (unit - 1):
            raise ValueError(f"cache unit: not a power of two of at least 4096 (got {unit})")
        if _REGISTRY.fullmatch(registry) is None:
            raise ValueError(f"cache: not a registry's name (got {registry!r})")
        self._space = CacheSpace(directory, quota=quota, min_free=min_free)
        self._blobs = self._space.blobs / registry
        self._unit = unit
        self._readahead_max = readahead_max
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._statistics: list[Statistics] = []
        self._demand = Demand()

    def open(self, origin: Blob, digest: str) -> Blob:
        """Return ``origin`` seen through the cache; closing that closes the origin.

        A cache that cannot be used (disk full, no permission) is said in the log, and reads go to the origin.
        Raises FormatError if ``digest`` is none.
        """
        check_digest(digest, origin.name)
        if origin.size == 0:
            return MemoryBlob(b"", origin.name)
        if origin.size > _LARGEST:
            logger.warning("%s: not cached: blob of %d bytes (at most %d are)", origin.name, origin.size, _LARGEST)
            return origin
        try:
            files = CacheFiles.open(self._space, self._blobs / digest, origin.size, self._unit)
        except OSError as error:
            logger.warning("%s: not cached: %s", origin.name, error)
            return origin
        blob = CachedBlob(
            origin,
            files,
            self._space,
            self._demand,
            readahead_max=self._readahead_max,
            deadline_s=self._deadline_s,
        )
        with self._lock:
            self._statistics.append(blob.counters)
        return blob

    def statistics(self) -> dict[str, int]:
        """Return the sums over all blobs opened so far (fields of :class:`Statistics`), and the bytes given back."""
        with self._lock:
            return total_of(self._statistics) | {"evicted_bytes": self._space.evicted_bytes}


class CachedBlob(Blob):
    """One blob in the cache. Made by :meth:`BlockCache.open`."""

    def __init__(
        self,
        origin: Blob,
        files: CacheFiles,
        space: CacheSpace,
        demand: Demand,
        *,
        readahead_max: int,
        deadline_s: float,
    ) -> None:
        self.name = origin.name
        self.counters = Statistics()
        self._origin = origin
        self._files = files
        self._space = space
        self._demand = demand
        self._fd = files.fd
        self._used = files.used
        self._size = origin.size
        unit = files.unit
        self._shift = unit.bit_length() - 1
        self._deadline_s = deadline_s
        self._states = bytearray(files.units)
        self._generation = files.generation
        self._readahead = ReadAhead(files.units, readahead_max // unit, _PIECE // unit)
        self._lock = threading.Lock()
        self._flights: dict[int, Flight] = {}
        self._users = 1  # this object, and each fetch that may still write
        self._closed = False

    @property
    def size(self) -> int:
        return self._size

    def statistics(self) -> dict[str, int]:
        """Return the counters (fields of :class:`Statistics`)."""
        return asdict(self.counters)

    def read_at(self, offset: int, length: int) -> bytes:
        """Return the bytes from the cache, or fetch them. Raises what the origin raises."""
        if offset < 0 or length < 0 or offset + length > self._size:
            check_range(self, offset, length)
        first = offset >> self._shift
        stop = (offset + length - 1 >> self._shift) + 1
        states = self._states
        generation = self._generation  # before the states: another thread may be about to bring both up to date
        if states.find(_UNKNOWN, first, stop) < 0:
            try:
                data = os.pread(self._fd, length, offset)
            except OSError:
                data = b""
            # After the read: units whose sums were taken away before it are noticed here.
            if len(data) == length and self._files.generation == generation:
                self.counters.hits += 1
                self._files.stamp()
                if not self._used[
                    first
                ]:  # looking is cheaper than writing, and the next unit is the next read's first
                    self._files.touch(first, stop)
                if states.find(_MARKED, first, stop) >= 0:
                    self._pass_marks(first, stop)
                return data
            if self._closed:
                raise SourceError("read after close", blob=self.name, offset=offset)
            self._forget()
        return self._gather(offset, length)

    def evict(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        if length == 0:
            return
        first, stop = offset >> self._shift, (offset + length - 1 >> self._shift) + 1
        with self._lock:
            self._drop(first, stop)
            self.counters.evicted_units += stop - first
        self._origin.evict(offset, length)

    def close(self) -> None:
        """Close cache and origin, once the last fetch under way is over."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._leave()

    # -- for the background download ---------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        """Where the blob's files are."""
        return self._files.directory

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def verified(self) -> bool:
        """Whether all of it is there and matches its digest."""
        return self._files.verified

    def hold(self) -> bool:
        """Keep files and origin open beyond :meth:`close`, until :meth:`let_go`; False if closed already."""
        with self._lock:
            if self._closed:
                return False
            self._users += 1
            return True

    def let_go(self) -> None:
        """Give up what :meth:`hold` took."""
        self._leave()

    def quiet_s(self) -> float:
        """Return how long no reader of the image has waited for an origin; 0 while one does."""
        return self._demand.quiet_s()

    def length_of(self, first: int, stop: int) -> int:
        """Return how many bytes the units have."""
        return self._files.length_of(first, stop)

    def missing_piece(self, unit: int) -> tuple[int, int] | None:
        """Return the next units from ``unit`` on that are not there, at most a piece; None if there are none."""
        sums, units = self._files.sums, self._files.units
        while unit < units and sums[unit]:
            unit += 1
        stop = unit
        most = min(unit + max(1, _PIECE >> self._shift), units)
        while stop < most and not sums[stop]:
            stop += 1
        return (unit, stop) if unit < stop else None

    def fetch_in_background(self, first: int, stop: int) -> None:
        """Fetch what of the units is neither there nor under way. Raises what the origin raises."""
        unit = first
        while unit < stop:
            with self._lock:
                if unit in self._flights or self._files.sums[unit]:
                    unit += 1
                    continue
                flight = self._claim(unit, stop, ahead=True)
                flight.started = flight.background = True
            self._fetch(flight, time.monotonic() + self._deadline_s * _BACKGROUND_SHARE)
            unit = flight.stop

    def verify(self) -> bool:
        """Check the whole blob against its digest and mark it as verified; take all of it away if it does not match.

        Returns False also if some of it is missing or damaged on disk, or the blob was closed.
        """
        generation = self._files.generation
        whole = hashlib.sha256()
        step = max(1, _PIECE >> self._shift)
        for first in range(0, self._files.units, step):
            stop = min(first + step, self._files.units)
            data = self._load(first, stop)
            if self._closed or len(data) != self._files.length_of(first, stop):
                return False
            whole.update(data)
        if f"sha256:{whole.hexdigest()}" == self.directory.name:
            return self._files.mark_verified(generation)
        logger.error("%s: does not match its digest (got sha256:%s), fetching it again", self.name, whole.hexdigest())
        with self._lock:
            self._drop(0, self._files.units)
        return False

    # -- the slow way ------------------------------------------------------------------------------------------------

    def _gather(self, offset: int, length: int) -> bytes:
        deadline = time.monotonic() + self._deadline_s
        first, stop = offset >> self._shift, (offset + length - 1 >> self._shift) + 1
        end = offset + length
        pieces = []
        fetched = False
        while offset < end:
            unit = offset >> self._shift
            data, from_origin = self._obtain(unit, stop, deadline)
            fetched |= from_origin
            start = unit << self._shift
            piece = memoryview(data)[offset - start : end - start]
            pieces.append(piece)
            offset += len(piece)
        self._files.touch(first, stop)
        self._files.stamp()
        if fetched:
            self.counters.misses += 1
        else:
            self.counters.hits += 1
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    def _obtain(self, unit: int, stop: int, deadline: float) -> tuple[bytes | memoryview, bool]:
        # Returns the content of one or more units from ``unit`` on, and whether the origin had to be waited for.
        while True:
            ahead: list[tuple[int, int]] = []
            with self._lock:
                flight = self._flights.get(unit)
                if flight is None and self._files.sums[unit]:
                    present = self._present_until(unit, stop)
                    mine = False
                elif flight is None:
                    flight = self._claim(unit, stop, ahead=False)
                    ahead = self._readahead.missed(flight.first, flight.stop)
                    mine = True
                else:
                    mine = not flight.started
                    flight.started = True
            self._fetch_ahead(ahead)
            if flight is None:
                data = self._load(unit, present)
                if data:
                    self._pass_marks(unit, present)
                    return data, False
                continue
            # Before waiting, so that the next pieces are on their way meanwhile.
            self._pass_marks(unit, min(stop, flight.stop))
            with self._demand:
                if mine:
                    self._fetch(flight, deadline)
                else:
                    self._await(flight, deadline)
            if flight.data is not None:
                return memoryview(flight.data)[unit - flight.first << self._shift :], True

    def _present_until(self, unit: int, stop: int) -> int:
        sums, flights = self._files.sums, self._flights
        end = unit + 1
        while end < stop and sums[end] and end not in flights:
            end += 1
        return end

    def _claim(self, unit: int, stop: int, *, ahead: bool) -> Flight:
        sums, flights = self._files.sums, self._flights
        end = unit + 1
        while end < stop and not sums[end] and end not in flights:
            end += 1
        flight = Flight(unit, end, ahead=ahead)
        for number in range(unit, end):
            flights[number] = flight
        self._users += 1
        return flight

    def _load(self, first: int, stop: int) -> bytes:
        # Returns the checked content of the units up to the first that fails, which is dropped.
        generation = self._files.generation
        sums = self._files.sums[first:stop].tolist()  # before the data, which may go and come back meanwhile
        data = self._files.load(first, stop)
        view = memoryview(data)
        for unit in range(first, stop):
            start = unit - first << self._shift
            length = self._files.length_of(unit, unit + 1)
            content = view[start : start + length]
            wanted = sums[unit - first]
            if len(content) == length and wanted and unit_sum(content) == wanted:
                self._set_checked(unit, unit + 1, generation)
                continue
            if wanted and self._files.generation == generation:  # else somebody took it away just now
                self._heal(unit)
            return data[:start]
        return data

    def _heal(self, unit: int) -> None:
        logger.warning(
            "%s: cached data failed its checksum at offset %d, fetching it again", self.name, unit << self._shift
        )
        with self._lock:
            self.counters.corrupt_units += 1
            self._drop(unit, unit + 1)

    # -- fetching ----------------------------------------------------------------------------------------------------

    def _fetch(self, flight: Flight, deadline: float) -> None:
        # Fetches and stores; afterwards flight.data is there or the error is raised.
        try:
            length = self._files.length_of(flight.first, flight.stop)
            with waiting(), deadline_of_thread(deadline):
                data = self._origin.read_at(flight.first << self._shift, length)
            if len(data) != length:
                raise SourceError(
                    f"short read (got {len(data)} bytes, wanted {length})",
                    blob=self.name,
                    offset=flight.first << self._shift,
                )
            flight.data = data
            self._settle(flight)  # nobody else waits for the disk, and the units stay claimed until they are stored
            self._store(flight, data)
        except BaseException as error:
            if flight.data is None:
                flight.error = error
                self._settle(flight)
            raise
        finally:
            with self._lock:
                for unit in range(flight.first, flight.stop):
                    del self._flights[unit]
            self._leave()

    def _settle(self, flight: Flight) -> None:
        with self._lock:
            self.counters.count(flight)
        flight.done.set()

    def _store(self, flight: Flight, data: bytes) -> None:
        generation = self._files.generation
        try:
            self._files.store(self._space, flight.first, data)
        except OSError as error:
            # Once is enough: a full disk fails every time.
            level = logging.DEBUG if self.counters.uncached_bytes else logging.WARNING
            logger.log(level, "%s: not cached: %s", self.name, error.strerror)
            self.counters.uncached_bytes += len(data)
            return
        self._set_checked(flight.first, flight.stop, generation)

    def _await(self, flight: Flight, deadline: float) -> None:
        # Returns when the other thread's fetch is over; raises its error, unless trying ourselves may help.
        with waiting():
            finished = flight.done.wait(max(0.0, deadline - time.monotonic()))
        offset = flight.first << self._shift
        if not finished:
            raise SourceError("no data within the deadline", blob=self.name, offset=offset, temporary=True)
        error = flight.error
        if isinstance(error, ObdlabError) and not flight.ahead:
            raise error

    def _fetch_ahead(self, pieces: Sequence[tuple[int, int]]) -> None:
        flights = []
        with self._lock:
            if self._closed:
                return
            for first, stop in pieces:
                if self._states[first] == _CHECKED:
                    self._states[first] = _MARKED
                unit = first
                while unit < stop:
                    if unit in self._flights or self._files.sums[unit]:
                        unit += 1
                        continue
                    flights.append(self._claim(unit, stop, ahead=True))
                    unit = flights[-1].stop
        for flight in flights:
            if not _pool.submit(partial(self._run_ahead, flight)):
                self._abandon(flight)

    def _run_ahead(self, flight: Flight) -> None:
        with self._lock:
            if flight.started:
                return  # a reader could not wait
            flight.started = True
            abandon = self._closed
        if abandon:
            self._finish_unfetched(flight)
            return
        try:
            self._fetch(flight, time.monotonic() + self._deadline_s * _BACKGROUND_SHARE)
        except ObdlabError as error:
            logger.info("fetching ahead failed: %s", error)

    def _abandon(self, flight: Flight) -> None:
        # Nobody will fetch it ahead; a reader that took it over meanwhile does.
        with self._lock:
            if flight.started:
                return
            flight.started = True
        self._finish_unfetched(flight)

    def _finish_unfetched(self, flight: Flight) -> None:
        with self._lock:
            for unit in range(flight.first, flight.stop):
                del self._flights[unit]
        flight.done.set()
        self._leave()

    def _pass_marks(self, first: int, stop: int) -> None:
        with self._lock:
            ahead: list[tuple[int, int]] = []
            for unit in range(first, stop):
                if self._readahead.is_mark(unit):
                    ahead += self._readahead.passed(unit)
                if self._states[unit] == _MARKED:
                    self._states[unit] = _CHECKED
        if ahead:
            self._fetch_ahead(ahead)

    # -- the table ---------------------------------------------------------------------------------------------------

    def _set_checked(self, first: int, stop: int, generation: int) -> None:
        # ``generation`` is from before the units were checked: if it has changed, they may have been dropped since.
        with self._lock:
            if generation != self._generation or generation != self._files.generation:
                return
            for unit in range(first, stop):
                self._states[unit] = _MARKED if self._readahead.is_mark(unit) else _CHECKED

    def _drop(self, first: int, stop: int) -> None:
        # Under the lock. Our own change of generation leaves the rest of the table good, if nobody else made one.
        known = self._files.generation == self._generation
        self._states[first:stop] = bytes(stop - first)
        self._files.drop(first, stop)
        if known:
            self._generation = (self._generation + 1) & 0xFFFFFFFF

    def _forget(self) -> None:
        with self._lock:
            # In this order: who sees the new generation must not see the old states.
            generation = self._files.generation
            self._states[:] = bytes(len(self._states))
            self._generation = generation

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._files.close()
            self._fd = -1
            self._origin.close()
