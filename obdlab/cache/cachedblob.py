"""A blob read through the block cache: hits are answered here, misses by :mod:`obdlab.cache.fetching`."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from time import monotonic, sleep
from typing import TYPE_CHECKING

from crc32c import crc32c

from obdlab.blob import Blob, check_range
from obdlab.cache.ahead.pieces import PiecesAhead
from obdlab.cache.fetching import Fetches
from obdlab.cache.flights import Holders, Statistics
from obdlab.cache.layout import PAGE_SHIFT, SEED
from obdlab.cache.policy import PIECE, Extent
from obdlab.cache.readahead import ReadAhead
from obdlab.cache.units import CachedUnits
from obdlab.call import UNBOUND, Call
from obdlab.errors import SourceError
from obdlab.observe import audit
from obdlab.observe.counters import CHECKSUM_FAILURES, MISS_TIMES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.cache.flights import Demand, Flight
    from obdlab.cache.space import CacheSpace
    from obdlab.cache.units import UnitCheck

logger = logging.getLogger(__name__)

# A long stream is fetched in larger pieces: at 1 Gbit/s the processor is the limit, and its cost is per request.
_STREAM_PIECE = 1 << 20
# A reader is sequential after this way: with half of it, importing pandas fetches 12 % more than it needs.
_MIN_WAY_EXTENTS = 8
# Units checked at a time in a search for missing ones.
_SCAN_UNITS = 1024
# Longest wait for a unit that others fetch, and the interval of checking.
_OTHERS_S, _LOOK_S = 5.0, 0.01
# Bytes of a read that show if the unit may be cached.
_GUESS = 64


class CachedBlob(Blob):
    """One blob in the cache; the origin is the blob below. Made by :meth:`BlockCache.open`."""

    below: Blob

    def __init__(
        self,
        origin: Blob,
        space: CacheSpace,
        directory: Path,
        unit: int,
        extent: int,
        extent_max: int,
        demand: Demand,
        *,
        readahead_max: int,
        deadline_s: float,
        check: UnitCheck | None = None,
    ) -> None:
        self.name = origin.name
        self.counters = Statistics()
        #: The terms of reads without a call.
        self.terms = UNBOUND
        #: The directory of the blob's files.
        self.directory = directory
        self.below = origin
        self._demand = demand
        self._size = origin.size
        self._deadline_s = deadline_s
        self._units = units = CachedUnits(space, directory, origin.size, unit, origin.name, self.counters, check)
        self._files = units.files
        self._unit = unit = self._files.unit  # chosen by the process that made the files
        self._holders = Holders(self._release)
        extent = max(1, extent // unit)
        self._extent = Extent(extent, max(1, extent_max // unit) if extent_max else 0, unit)
        min_way = {} if extent == 1 else {"min_way": _MIN_WAY_EXTENTS * extent}
        readahead = ReadAhead(self._files.units, readahead_max // unit, _STREAM_PIECE // unit, **min_way)
        self._fetches = Fetches(origin, units, self._holders, demand, readahead, deadline_s)
        # Locals of the hit path.
        self._fd = self._files.fd
        self._pread = audit.pread_of("file:read", str(directory / "data"), audit.SLOW_READ_S)
        self._sums = units.sums
        self._attend = units.attend
        self._page_to_unit = units.unit_shift - PAGE_SHIFT
        self._page_mask = (1 << self._page_to_unit) - 1

    @property
    def size(self) -> int:
        return self._size

    def statistics(self) -> dict[str, int]:
        """Return the counters (fields of :class:`Statistics`)."""
        return asdict(self.counters)

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        """Return the bytes from the cache, or fetch them. Raises what the origin raises."""
        end = offset + length
        if offset < 0 or length <= 0 or end > self._size:
            check_range(self, offset, length)
            return b""
        first = offset >> PAGE_SHIFT
        last = end - 1 >> PAGE_SHIFT
        start = first << PAGE_SHIFT
        try:
            # The file ends where the blob does; if it does not, _gather clips the result.
            data = self._pread(self._fd, last - first + 1 << PAGE_SHIFT, start)
        except OSError:
            data = b""
        shift = self._page_to_unit
        if first >> shift == last >> shift:
            wanted = self._sums[last]
            seed = self._sums[first - 1] if first & self._page_mask else SEED
            hit = wanted and crc32c(data, seed) == wanted
        else:
            hit = self._matches(data, first, last)
        if not hit:
            # The file has zeros where nothing is cached; a wrong guess costs a look at the sums.
            return self._gather(offset, length, call, data[:_GUESS].strip(b"\0") != b"")
        self.counters.hits += 1
        if self._attend.find(1, first >> shift, (last >> shift) + 1) >= 0 or monotonic() >= self._units.tick_at:
            self._tell_held(first >> shift, (last >> shift) + 1)
        return data[offset - start : end - start]

    def evict(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        if length == 0 or not self._holders.hold():
            return
        try:
            first, stop = offset // self._unit, (offset + length - 1) // self._unit + 1
            self._fetches.settle(first, stop)
            # Units of a verified blob are right: an image that takes it for a file of another kind must not drop them
            # for other images. A mark in another user's files proves nothing.
            if self.verified and not self._files.read_only:
                return
            self._units.drop(first, stop)
            self.counters.evicted_units += stop - first
            self.below.evict(offset, length)
        finally:
            self._holders.let_go()

    def opened(self, deadline_s: float, *, extents: bool = True) -> None:
        """Make misses fetch whole ``extents`` from now on, and reads end within ``deadline_s``; :attr:`terms` end.

        Opening an image reads few, known places, and has its own deadline.
        """
        if extents:
            self._fetches.extent = self._extent
        self.terms = UNBOUND
        self._deadline_s = self._fetches.deadline_s = deadline_s

    def close(self) -> None:
        """Close cache and origin once the last fetch has ended."""
        self._holders.close()

    # -- for the background download ---------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._holders.closed

    @property
    def verified(self) -> bool:
        """True if the whole blob is cached and matches its digest."""
        return self._files.header.verified

    def hold(self) -> bool:
        """Keep files and origin open beyond :meth:`close`, until :meth:`let_go`. Return False if closed already."""
        return self._holders.hold()

    def let_go(self) -> None:
        """Release a :meth:`hold`."""
        self._holders.let_go()

    def quiet_s(self) -> float:
        """Return the time since a reader of the image last waited for an origin; 0 while one waits."""
        return self._demand.quiet_s()

    def length_of(self, first: int, stop: int) -> int:
        """Return the number of bytes in the units."""
        return self._files.length_of(first, stop)

    def has(self, begin: int, end: int) -> bool:
        """Return True if all units of the bytes ``[begin, end)`` are cached; their content is not looked at."""
        return all(self._files.present(begin // self._unit, -(-end // self._unit)))

    def missing_bytes(self) -> int:
        """Return about how many bytes of the blob are not cached."""
        return max(0, self._size - self._files.cached_units() * self._unit)

    def missing_piece(self, unit: int, length: int = PIECE) -> tuple[int, int] | None:
        """Return the next missing units from ``unit`` on, at most ``length`` bytes; None if all are cached."""
        most = max(1, length // self._unit)
        while unit < self._files.units:
            there = self._files.present(unit, min(unit + _SCAN_UNITS, self._files.units))
            if False in there:
                first = there.index(False)
                missing = there[first : first + most]
                length = missing.index(True) if True in missing else len(missing)
                return unit + first, unit + first + length
            unit += len(there)
        return None

    def fetch_in_background(self, first: int, stop: int) -> None:
        """Fetch the units that are neither cached nor in flight. Raises what the origin raises."""
        self._fetches.fetch_in_background(first, stop)

    def fill(self, read: Callable[[int], bytes]) -> None:
        """Store all units that are not cached; ``read`` returns the blob's next bytes, in order.

        A unit that others fetch is waited for, for some seconds: their fetch may fail. Raises what ``read`` raises,
        and SourceError if the cache does not keep a unit.
        """
        step = max(1, PIECE // self._unit)
        for first in range(0, self._files.units, step):
            stop = min(first + step, self._files.units)
            data = memoryview(read(self._files.length_of(first, stop)))
            end = monotonic() + _OTHERS_S
            pause_s = 0.0
            while not all(self._files.present(first, stop)):
                if monotonic() > end:
                    raise SourceError("the cache does not keep it (is its file system full?)", blob=self.name)
                sleep(pause_s)
                pause_s = _LOOK_S
                flight = self._fetches.claim_ahead(first, stop)
                if flight is None:
                    continue

                def part(flight: Flight, _: Call, data: memoryview = data, begin: int = first * self._unit) -> bytes:
                    offset, length = self._fetches.range_of(flight)
                    return bytes(data[offset - begin :][:length])

                self._fetches.fetch_claimed(flight, part)

    # -- for replaying traces ----------------------------------------------------------------------------------------

    @property
    def unit(self) -> int:
        """Bytes of a unit."""
        return self._unit

    @property
    def demand(self) -> Demand:
        """The gauge of readers, of the whole image, that wait for an origin."""
        return self._demand

    def expect(self, units: bytes) -> None:
        """Announce that the units with a 1 will be prefetched soon; empty bytes end it."""
        self._fetches.expected = units

    def prefetch(self, first: int, stop: int) -> None:
        """Fetch the units that are neither cached nor in flight. Raises what the origin raises."""
        self._fetches.prefetch(first, stop)

    def pieces_ahead(self, first: int, stop: int) -> PiecesAhead:
        """Return an object that fetches the missing units in order, by as few requests as possible."""
        return PiecesAhead(self.below, self._fetches, first, stop, unit=self._unit, most=PIECE)

    # -- the end of a download ---------------------------------------------------------------------------------------

    def verify(self) -> bool:
        """Check the whole blob against its digest and mark it as verified; drop all of it if it does not match.

        Returns False also if a part is missing or damaged on disk, or the blob was closed.
        """
        generation = self._files.header.generation
        whole = hashlib.sha256()
        step = max(1, PIECE // self._unit)
        unit = 0
        while unit < self._files.units:
            data = self._units.load(unit, min(unit + step, self._files.units))
            if self.closed or not data:
                return False
            whole.update(data)
            unit += -(-len(data) // self._unit)
        if f"sha256:{whole.hexdigest()}" == self.directory.name:
            return self._files.mark_verified(generation)
        logger.error("%s: does not match its digest (got sha256:%s), fetching it again", self.name, whole.hexdigest())
        CHECKSUM_FAILURES.add(label="digest")
        self._units.drop(0, self._files.units)
        return False

    # -- the slow path -----------------------------------------------------------------------------------------------

    def _matches(self, data: bytes, first: int, last: int) -> bool:
        # Checks the pages of each unit by one CRC, seeded with the sum before them. It is too short to be worth
        # releasing the interpreter lock.
        sums, mask = self._sums, self._page_mask
        view = memoryview(data)
        page = first
        while page <= last:
            end = min(page | mask, last)
            wanted = sums[end]
            seed = sums[page - 1] if page & mask else SEED
            piece = view[page - first << PAGE_SHIFT : end + 1 - first << PAGE_SHIFT]
            if not wanted or crc32c(piece, seed, 0) != wanted:
                return False
            page = end + 1
        return True

    # A hit reads without a hold: read from another file, the bytes would not match their sums. Writing needs one.
    def _tell_held(self, first: int, stop: int) -> None:
        if self._holders.hold():
            try:
                self._tell(first, stop)
            finally:
                self._holders.let_go()

    def _tell(self, first: int, stop: int) -> None:
        # Cleared first, so that a mark set meanwhile is not lost.
        self._attend[first:stop] = bytes(stop - first)
        self._fetches.reached(first, stop)
        self._units.note_use(first, stop)

    def _gather(self, offset: int, length: int, call: Call | None, maybe_cached: bool) -> bytes:
        started = monotonic()
        terms, end = call or self.terms, started + self._deadline_s
        if terms.deadline is None or end < terms.deadline:
            terms = Call(end, terms.on_wait)
        shift = self._units.unit_shift
        first, stop = offset >> shift, (offset + length - 1 >> shift) + 1
        end = offset + length
        pieces = []
        waited = False
        if not self._holders.hold():
            raise SourceError("read after close", blob=self.name, offset=offset)
        try:
            while offset < end:
                unit = offset >> shift
                data, late = self._fetches.obtain(unit, stop, terms, maybe_cached)
                waited |= late
                start = unit << shift
                piece = memoryview(data)[offset - start : end - start]
                pieces.append(piece)
                offset += len(piece)
            self._tell(first, stop)
        finally:
            self._holders.let_go()
        if waited:
            self.counters.misses += 1
            MISS_TIMES.observe(monotonic() - started)
        else:
            self.counters.hits += 1
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    def _release(self) -> None:
        self._fd = -1
        self._files.close()
        self.below.close()
