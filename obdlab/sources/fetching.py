"""What the block cache does when something is not there: one request for adjacent units, one fetch for all who wait.

Between the threads of a process a table tells who fetches what; between processes a lock on the units' range in the
shared file does. Another process' fetch is waited for only so long, in case that process hangs.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError, SourceError
from obdlab.observe import audit
from obdlab.registry.deadline import deadline_of_thread
from obdlab.sources.extent import SINGLE
from obdlab.sources.fetchpool import FetchPool
from obdlab.sources.flights import Flight
from obdlab.waiting import waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from obdlab.blob import Blob
    from obdlab.sources.cachedunits import CachedUnits
    from obdlab.sources.flights import Demand, Holders
    from obdlab.sources.readahead import ReadAhead

    #: Returns the bytes of a flight's units, by the deadline.
    ReadUnits = Callable[[Flight, float], bytes]

logger = logging.getLogger(__name__)

# Fetching ahead gives up sooner than a reader, who then still has time to try for himself.
_BACKGROUND_SHARE = 0.25
# So long a reader waits for another process that fetches what he wants, looking at these intervals.
_OTHERS_S = 5.0
_LOOK_FIRST_S, _LOOK_MOST_S = 0.0005, 0.005

_pool = FetchPool(threads=8, queued=64)


class Fetches:
    """The fetches of one blob, from its origin into its cached units."""

    def __init__(
        self,
        origin: Blob,
        units: CachedUnits,
        holders: Holders,
        demand: Demand,
        readahead: ReadAhead,
        deadline_s: float,
    ) -> None:
        #: A reader's miss fetches what is missing of the extent around it.
        self.extent = SINGLE
        #: Fetches ahead of readers have a part of it; readers come with their own.
        self.deadline_s = deadline_s
        self.name = origin.name
        self._origin = origin
        self._units = units
        self._holders = holders
        self._demand = demand
        self._readahead = readahead
        self._lock = threading.Lock()
        self._flights: dict[int, Flight] = {}
        #: 1 for each unit that will be fetched soon: a reader who comes sooner takes just what he needs of these.
        self.expected = b""
        # Prefetched, and not used since.
        self._unused: set[int] = set()

    def obtain(self, unit: int, stop: int, deadline: float) -> tuple[bytes | memoryview, bool]:
        """Return the content of one or more units from ``unit`` on, and whether it had to be waited for.

        Raises what the origin raises.
        """
        waited = False
        while True:
            self._units.reattach()
            ahead: list[tuple[int, int]] = []
            mine = False
            with self._lock:
                flight = self._flights.get(unit)
                if flight is None:
                    there = self._units.files.present(unit, stop)
                    if not there[0]:
                        expected = self._is_expected(unit)
                        extent = 1 if expected else self.extent.units(getattr(self._origin, "link", None))
                        flight = self._claim_extent(unit, stop, extent)
                        if not expected:
                            ahead = self._readahead.missed(flight.first, flight.stop, self.extent.growth(extent))
                        mine = True
                else:
                    if not flight.started:
                        flight.started = mine = True
                    if flight.stop < stop:  # the rest need not wait for it
                        ahead = [(flight.stop, stop)]
            self._fetch_ahead(ahead)
            if flight is None:
                data = self._units.load(unit, unit + _run(there))
                if data:
                    return data, waited
                self._check_deadline(unit, deadline)
                continue
            # Before waiting, so that the next pieces are on their way meanwhile.
            self.pass_marks(unit, min(stop, flight.stop))
            with self._demand:
                if mine:
                    with nullcontext() if self._is_expected(unit) else self._demand.surprised:
                        self._fetch(flight, deadline, patient=True)
                else:
                    self._await(flight, deadline)
            waited = True
            if flight.data is not None and unit < flight.stop:
                return memoryview(flight.data)[unit - flight.first << self._units.unit_shift :], True
            self._check_deadline(unit, deadline)

    def fetch_in_background(self, first: int, stop: int) -> None:
        """Fetch what of the units is neither there nor under way. Raises what the origin raises."""
        unit = first
        while unit < stop:
            with self._lock:
                flight = self._claim_next(unit, stop)
                if flight is None:
                    return
                flight.started = flight.background = True
            started = time.monotonic()
            self._fetch(flight, started + self.deadline_s * _BACKGROUND_SHARE, patient=False)
            if flight.data is not None:
                offset = flight.first << self._units.unit_shift
                audit.record("bk_download", self.name, offset, len(flight.data), started)
            unit = flight.stop

    def prefetch(self, first: int, stop: int) -> None:
        """As :meth:`fetch_in_background`, because a reader is expected soon."""
        unit = first
        while unit < stop:
            flight = self.claim_ahead(unit, stop)
            if flight is None:
                return
            self.fetch_claimed(flight, self._read_origin)
            unit = flight.stop

    def claim_ahead(self, unit: int, stop: int) -> Flight | None:
        """Claim the next units that are neither there nor under way: whoever reads them waits for our caller.

        He must call :meth:`fetch_claimed` or :meth:`give_back` with what is returned; None: nothing is to be fetched.
        """
        with self._lock:
            flight = self._claim_next(unit, stop)
            if flight is not None:
                flight.started = flight.prefetch = True
                self._unused.update(range(flight.first, flight.stop))
        return flight

    def fetch_claimed(self, flight: Flight, read: ReadUnits) -> None:
        """Fetch what was claimed, by ``read(flight, deadline)``, and store it. Raises what that raises."""
        stop = flight.stop
        try:
            deadline = time.monotonic() + self.deadline_s * _BACKGROUND_SHARE
            self._fetch(flight, deadline, patient=False, read=read)
        finally:
            fetched = flight.first if flight.data is None else flight.stop  # others may fetch the rest
            with self._lock:
                self._unused.difference_update(range(fetched, stop))

    def count_request(self) -> None:
        """Count a request that brings the units of several fetches."""
        with self._lock:
            self._units.counters.requests += 1

    def give_back(self, flight: Flight) -> None:
        """What was claimed is not fetched: those who wait for it do."""
        with self._lock:
            self._unused.difference_update(range(flight.first, flight.stop))
        self._end(flight)

    def range_of(self, flight: Flight) -> tuple[int, int]:
        """Return a flight's offset and length in bytes."""
        return flight.first << self._units.unit_shift, self._units.files.length_of(flight.first, flight.stop)

    def end_of(self, stop: int) -> int:
        """Return the first byte after the units before ``stop``."""
        return self._units.files.length_of(0, stop)

    def note_use(self, first: int, stop: int) -> None:
        """The units were read: count what was prefetched of them."""
        if not self._unused:
            return
        with self._lock:
            used = self._unused.intersection(range(first, stop))
            self._unused -= used
            if used:
                counters = self._units.counters
                counters.prefetch_hits += 1
                counters.prefetch_used_bytes += sum(self._units.files.length_of(unit, unit + 1) for unit in used)

    def pass_marks(self, first: int, stop: int) -> None:
        """A reader came by these units: fetch ahead of him."""
        ahead: list[tuple[int, int]] = []
        with self._lock:
            for unit in range(first, stop):
                if self._readahead.is_mark(unit):
                    ahead += self._readahead.passed(unit)
        self._fetch_ahead(ahead)

    # -- between threads ---------------------------------------------------------------------------------------------

    def _claim_next(self, unit: int, stop: int) -> Flight | None:
        # The next units that are neither there nor under way. Under the lock.
        there = self._units.files.present(unit, stop)
        for number in range(unit, stop):
            if number not in self._flights and not there[number - unit]:
                return self._claim(number, there[number - unit :], ahead=True)
        return None

    def _claim(self, unit: int, there: Sequence[bool], *, ahead: bool) -> Flight:
        if not self._holders.hold():
            raise SourceError("read after close", blob=self.name, offset=unit << self._units.unit_shift)
        end = unit + 1
        while end < unit + len(there) and not there[end - unit] and end not in self._flights:
            end += 1
        flight = Flight(unit, end, ahead=ahead)
        for number in range(unit, end):
            self._flights[number] = flight
        return flight

    def _is_expected(self, unit: int) -> bool:
        return unit < len(self.expected) and self.expected[unit] == 1

    def _claim_extent(self, unit: int, stop: int, extent: int) -> Flight:
        begin = unit - unit % extent
        stop = min(stop + -stop % extent, self._units.files.units)
        there = self._units.files.present(begin, stop)
        first = unit
        while first > begin and not there[first - 1 - begin] and first - 1 not in self._flights:
            first -= 1
        return self._claim(first, there[first - begin :], ahead=False)

    def _end(self, flight: Flight) -> None:
        with self._lock:
            for unit in range(flight.first, flight.stop):
                del self._flights[unit]
        flight.done.set()
        self._holders.let_go()

    def _await(self, flight: Flight, deadline: float) -> None:
        # Returns when the other thread's fetch is over; raises its error, unless trying ourselves may help.
        with waiting():
            finished = flight.done.wait(max(0.0, deadline - time.monotonic()))
        if not finished:
            raise self._late(flight.first)
        error = flight.error
        if isinstance(error, ObdlabError) and not flight.ahead:
            raise error

    # -- fetching ----------------------------------------------------------------------------------------------------

    def _fetch(self, flight: Flight, deadline: float, *, patient: bool, read: ReadUnits | None = None) -> None:
        # Fetches and stores. Afterwards flight.data is there, or another process fetched it, or the error is raised.
        claimed = False
        try:
            turn = self._take_turn(flight, deadline, patient)
            if turn is None:
                return
            claimed = turn
            flight.data = (read or self._read_origin)(flight, deadline)
            self._settle(flight)  # nobody else waits for the disk, and the units stay claimed until they are stored
            self._units.store(flight.first, flight.data)
        except BaseException as error:
            if flight.data is None:
                flight.error = error
                self._settle(flight)
            raise
        finally:
            if claimed:
                self._units.files.unclaim(flight.first, flight.stop)
            self._end(flight)

    def _read_origin(self, flight: Flight, deadline: float) -> bytes:
        offset, length = self.range_of(flight)
        with waiting(), deadline_of_thread(deadline):
            data = self._origin.read_at(offset, length)
        if len(data) != length:
            what = f"short read (got {len(data)} bytes, wanted {length})"
            raise SourceError(what, blob=self.name, offset=offset)
        return data

    def _settle(self, flight: Flight) -> None:
        with self._lock:
            self._units.counters.count(flight)
        flight.done.set()

    def _take_turn(self, flight: Flight, deadline: float, patient: bool) -> bool | None:
        # None: another process has fetched it, or does. Otherwise it is ours to fetch; True if others know that.
        files = self._units.files
        busy = files.claim(flight.first, flight.stop)
        if busy is not None and busy > flight.first:  # what lies before is ours
            self._shorten(flight, busy)
            busy = files.claim(flight.first, flight.stop)
        if busy is not None:
            return self._wait_for_others(flight, deadline) if patient else None
        if any(files.present(flight.first, flight.stop)):  # since we looked
            files.unclaim(flight.first, flight.stop)
            return None
        return True

    def _wait_for_others(self, flight: Flight, deadline: float) -> bool | None:
        files = self._units.files
        end = min(deadline, time.monotonic() + _OTHERS_S)
        pause_s = _LOOK_FIRST_S
        with waiting():
            while time.monotonic() < end:
                time.sleep(pause_s)
                pause_s = min(1.5 * pause_s, _LOOK_MOST_S)
                if files.present(flight.first, flight.first + 1)[0]:
                    return None
                if files.claim(flight.first, flight.stop) is None:
                    if not any(files.present(flight.first, flight.stop)):
                        return True
                    files.unclaim(flight.first, flight.stop)
                    return None
        return False

    def _shorten(self, flight: Flight, stop: int) -> None:
        with self._lock:
            for unit in range(stop, flight.stop):
                del self._flights[unit]
            flight.stop = stop

    # -- ahead of readers --------------------------------------------------------------------------------------------

    def _fetch_ahead(self, pieces: Sequence[tuple[int, int]]) -> None:
        flights = []
        with self._lock:
            for first, stop in pieces:
                self._units.attend[first] = 1  # the reader's arrival there matters
                unit = first
                while unit < stop and not self._holders.closed:
                    flight = self._claim_next(unit, stop)
                    if flight is None:
                        break
                    flights.append(flight)
                    unit = flight.stop
        for flight in flights:
            if not _pool.submit(partial(self._run_ahead, flight)):
                self._abandon(flight)

    def _run_ahead(self, flight: Flight) -> None:
        if self._holders.closed:
            self._abandon(flight)
            return
        with self._lock:
            if flight.started:
                return  # a reader could not wait
            flight.started = True
        try:
            self._fetch(flight, time.monotonic() + self.deadline_s * _BACKGROUND_SHARE, patient=False)
        except ObdlabError as error:
            logger.info("fetching ahead failed: %s", error)

    def _abandon(self, flight: Flight) -> None:
        # Nobody will fetch it ahead; a reader that took it over meanwhile does.
        with self._lock:
            if flight.started:
                return
            flight.started = True
        self._end(flight)

    def _check_deadline(self, unit: int, deadline: float) -> None:
        if time.monotonic() >= deadline:
            raise self._late(unit)

    def _late(self, unit: int) -> SourceError:
        offset = unit << self._units.unit_shift
        return SourceError("no data within the deadline", blob=self.name, offset=offset, temporary=True)


def _run(there: Sequence[bool]) -> int:
    # How many are there from the first on.
    return there.index(False) if False in there else len(there)
