"""Misses of the block cache: one request for adjacent units, one fetch for all readers that wait for them.

Between the threads of a process a table of flights shows the fetching thread; between processes a lock on the units'
range in the shared file does. A reader waits only a limited time for another process's fetch, in case that hangs.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from obdlab.cache.fetchpool import FetchPool
from obdlab.cache.flights import Flight
from obdlab.cache.policy import SINGLE
from obdlab.cache.unitstate import State
from obdlab.call import Call
from obdlab.errors import ObdlabError, SourceError
from obdlab.observe import audit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from obdlab.blob import Blob
    from obdlab.cache.flights import Demand, Holders
    from obdlab.cache.readahead import ReadAhead
    from obdlab.cache.units import CachedUnits

    #: Returns the bytes of a flight's units, on the terms of the call.
    ReadUnits = Callable[[Flight, Call], bytes]

logger = logging.getLogger(__name__)

# Fetching ahead gives up sooner than a reader, which then still has time to fetch itself.
_BACKGROUND_SHARE = 0.25
# Longest wait of a reader for another process that fetches its units, and the intervals of checking.
_OTHERS_S = 5.0
_LOOK_FIRST_S, _LOOK_MOST_S = 0.0005, 0.005
# Storing waits for the lock of the cache's space, which has a deadline of its own.
_SETTLE_S = 5.0

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
        #: A reader's miss fetches the missing units of the extent around it.
        self.extent = SINGLE
        #: Fetches ahead of readers get a share of it; readers have their own deadline.
        self.deadline_s = deadline_s
        self.name = origin.name
        self._origin = origin
        self._decodes_pieces = origin.piece(0) is not None
        self._units = units
        self._holders = holders
        self._demand = demand
        self._readahead = readahead
        self._lock = threading.Lock()
        self._flights: dict[int, Flight] = {}
        #: 1 for each unit that will be fetched soon: a reader that comes earlier fetches only those it needs.
        self.expected = b""
        # Prefetched units that have not been used since.
        self._unused: set[int] = set()

    def obtain(self, unit: int, stop: int, call: Call, maybe_cached: bool = False) -> tuple[bytes | memoryview, bool]:
        """Return the content of one or more units from ``unit`` on, and True if the caller had to wait for it.

        The call must have a deadline. With ``maybe_cached`` the files are looked at before anything is claimed, which
        is cheaper if the unit is there, and dearer if not. Raises what the origin raises.
        """
        waited = False
        files = self._units.files
        while True:
            if not files.attached:
                self._units.reattach()
            ahead: list[tuple[int, int]] = []
            mine = held = False
            with self._lock:
                flight = self._flights.get(unit)
                if flight is None:
                    expected = bool(self.expected) and self._is_expected(unit)
                    extent = 1 if expected else self.extent.units(self._origin.link)
                    begin, end = unit - unit % extent, min(stop + -stop % extent, files.units)
                    if self._decodes_pieces:
                        begin, end = self._piece_around(unit, stop)
                    around = files.present(begin, end) if maybe_cached else ()
                    if not around or not around[unit - begin]:
                        begin, end, held = self._hold_around(unit, begin, end)
                        # After the claim, so that a unit that another process stores meanwhile is not fetched again.
                        around = files.present(begin, end)
                    there = around[unit - begin : stop - begin]
                    if not there[0]:
                        flight = self._claim_around(unit, begin, around)
                        if not expected:
                            ahead = self._readahead.missed(flight.first, flight.stop, self.extent.growth(extent))
                        mine = True
                    if held:
                        self._release_others(begin, end, flight)
                else:
                    if flight.now is State.QUEUED:
                        flight.become(State.FETCHING)
                        mine = True
                    if flight.stop < stop:  # the rest need not wait for this flight
                        ahead = [(flight.stop, stop)]
            if ahead:
                self._fetch_ahead(ahead)
            if flight is None:
                data = self._units.load(unit, unit + _run(there), call)
                if data:
                    return data, waited
                self._check_deadline(unit, call)
                continue
            # Before waiting, so that the next pieces are in flight meanwhile.
            if self._readahead.marks:
                self._pass_marks(unit, min(stop, flight.stop))
            with self._demand:
                if mine and self.expected and self._is_expected(unit):
                    self._fetch(flight, call, patient=True, held=held)
                elif mine:
                    with self._demand.surprised:
                        self._fetch(flight, call, patient=True, held=held)
                else:
                    self._await(flight, call)
            waited = True
            if flight.data is not None and unit < flight.stop:
                return memoryview(flight.data)[unit - flight.first << self._units.unit_shift :], True
            self._check_deadline(unit, call)

    # Returns the units to fetch with a miss of `[unit, stop)`: also those that lie whole in the piece that the origin
    # has to decode for it.
    def _piece_around(self, unit: int, stop: int) -> tuple[int, int]:
        shift = self._units.unit_shift
        begin, end = self._origin.piece(unit << shift) or (unit << shift, stop << shift)
        end = self._units.files.units if end == self._origin.size else end >> shift
        return min(-(-begin >> shift), unit), max(end, stop)

    def settle(self, first: int, stop: int) -> None:
        """Wait until units that have come are stored: dropping them then drops all there is of them.

        A flight hands its bytes out before it stores them. A reader that found them wrong would get them again.
        """
        end = time.monotonic() + _SETTLE_S
        with self._lock:
            flights = {flight for unit in range(first, stop) if (flight := self._flights.get(unit)) is not None}
            come = [flight for flight in flights if flight.now is State.FETCHED]
        while any(flight.now is State.FETCHED for flight in come) and time.monotonic() < end:
            time.sleep(_LOOK_FIRST_S)

    def fetch_in_background(self, first: int, stop: int) -> None:
        """Fetch the units that are neither cached nor in flight. Raises what the origin raises."""
        unit = first
        while unit < stop:
            with self._lock:
                flight = self._claim_next(unit, stop)
                if flight is None:
                    return
                flight.become(State.FETCHING)
                flight.background = True
            started = time.monotonic()
            self._fetch(flight, self._background(), patient=False)
            if flight.data is not None:
                offset = flight.first << self._units.unit_shift
                audit.record("bk_download", self.name, offset, len(flight.data), started)
            unit = flight.stop

    def prefetch(self, first: int, stop: int) -> None:
        """Like :meth:`fetch_in_background`, but counted as prefetch: a reader is expected soon."""
        unit = first
        while unit < stop:
            flight = self.claim_ahead(unit, stop)
            if flight is None:
                return
            self.fetch_claimed(flight, self.read_origin)
            unit = flight.stop

    def claim_ahead(self, unit: int, stop: int) -> Flight | None:
        """Claim the next units that are neither cached nor in flight; readers of them wait for the caller's fetch.

        The caller must pass the result to :meth:`fetch_claimed` or :meth:`give_back`. None: nothing is missing.
        """
        with self._lock:
            flight = self._claim_next(unit, stop)
            if flight is not None:
                flight.become(State.FETCHING)
                flight.prefetch = True
                self._unused.update(range(flight.first, flight.stop))
        return flight

    def hold_claimed(self, flight: Flight) -> None:
        """Show a claimed flight to other processes, too, unless one of them fetches its units or has fetched them."""
        files = self._units.files
        if flight.held or files.claim(flight.first, flight.stop) is not None:
            return
        flight.held = not any(files.present(flight.first, flight.stop))
        if not flight.held:
            files.unclaim(flight.first, flight.stop)

    def fetch_claimed(self, flight: Flight, read: ReadUnits) -> None:
        """Fetch a claimed flight by ``read(flight, call)``, and store it. Raises what ``read`` raises.

        Waits for another process that fetches the units: two that fetch the same in the same order, such as a pull
        and the server of its image, take turns, and nothing comes twice.
        """
        stop = flight.stop
        try:
            self._fetch(flight, self._background(), patient=True, held=flight.held, read=read)
        finally:
            fetched = flight.first if flight.data is None else flight.stop  # other threads may fetch the rest
            with self._lock:
                self._unused.difference_update(range(fetched, stop))

    def give_back(self, flight: Flight) -> None:
        """Abandon a claimed flight; threads waiting for it fetch the units themselves."""
        with self._lock:
            self._unused.difference_update(range(flight.first, flight.stop))
        if flight.held:
            self._units.files.unclaim(flight.first, flight.stop)
        self._end(flight)

    def range_of(self, flight: Flight) -> tuple[int, int]:
        """Return a flight's offset and length in bytes."""
        return flight.first << self._units.unit_shift, self._units.files.length_of(flight.first, flight.stop)

    def end_of(self, stop: int) -> int:
        """Return the first byte after the units before ``stop``."""
        return self._units.files.length_of(0, stop)

    def reached(self, first: int, stop: int) -> None:
        """Note that a reader came to the units: count prefetched ones, and fetch ahead if one of them has a mark."""
        if self._unused:
            self._count_used(first, stop)
        if self._readahead.marks:
            self._pass_marks(first, stop)

    def _count_used(self, first: int, stop: int) -> None:
        with self._lock:
            used = self._unused.intersection(range(first, stop))
            self._unused -= used
            if used:
                counters = self._units.counters
                counters.prefetch_hits += 1
                counters.prefetch_used_bytes += sum(self._units.files.length_of(unit, unit + 1) for unit in used)

    def _pass_marks(self, first: int, stop: int) -> None:
        ahead: list[tuple[int, int]] = []
        with self._lock:
            for unit in range(first, stop):
                if self._readahead.is_mark(unit):
                    ahead += self._readahead.passed(unit)
        if ahead:
            self._fetch_ahead(ahead)

    # -- between threads ---------------------------------------------------------------------------------------------

    def _claim_next(self, unit: int, stop: int) -> Flight | None:
        # Claims the next units that are neither cached nor in flight. Needs the lock.
        there = self._units.files.present(unit, stop)
        for number in range(unit, stop):
            if number not in self._flights and not there[number - unit]:
                return self._claim(number, there[number - unit :], ahead=True)
        return None

    def _claim(self, unit: int, there: Sequence[bool], *, ahead: bool) -> Flight:
        # A reader holds the files itself until its own flight has ended.
        if ahead and not self._holders.hold():
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

    def _hold_around(self, unit: int, begin: int, end: int) -> tuple[int, int, bool]:
        # Claims the units around one in the files, those among [begin, end) that are in no flight and that no other
        # process has claimed. Returns their range, and False if even the one is claimed elsewhere. Needs the lock.
        first, stop = unit, unit + 1
        while first > begin and first - 1 not in self._flights:
            first -= 1
        while stop < end and stop not in self._flights:
            stop += 1
        for _ in range(3):  # a claim on each side of the unit
            busy = self._units.files.claim(first, stop)
            if busy is None:
                return first, stop, True
            first, stop = (unit, stop) if busy <= unit else (first, busy)
        return unit, unit + 1, False

    def _release_others(self, begin: int, end: int, flight: Flight | None) -> None:
        # Releases what _hold_around() claimed, but for the units of the flight. Needs the lock.
        files = self._units.files
        if flight is None:
            files.unclaim(begin, end)
            return
        if begin < flight.first:
            files.unclaim(begin, flight.first)
        if flight.stop < end:
            files.unclaim(flight.stop, end)

    def _claim_around(self, unit: int, begin: int, there: Sequence[bool]) -> Flight:
        # Claims the missing units around one, among those from `begin` on; ``there`` is True for each cached one.
        first = unit
        while first > begin and not there[first - 1 - begin] and first - 1 not in self._flights:
            first -= 1
        return self._claim(first, there[first - begin :], ahead=False)

    def _end(self, flight: Flight, state: State = State.MISSING) -> None:
        with self._lock:
            flight.become(state)
            for unit in range(flight.first, flight.stop):
                del self._flights[unit]
        flight.done.set()
        if flight.ahead:
            self._holders.let_go()

    def _await(self, flight: Flight, call: Call) -> None:
        # Returns when the other thread's fetch has ended. Raises its error, unless fetching again may help.
        call.about_to_wait()
        finished = flight.done.wait(call.left_s(self.deadline_s))
        if not finished:
            raise self._late(flight.first)
        error = flight.error
        if isinstance(error, ObdlabError) and not flight.ahead:
            raise error

    # -- fetching ----------------------------------------------------------------------------------------------------

    def _fetch(
        self, flight: Flight, call: Call, *, patient: bool, held: bool = False, read: ReadUnits | None = None
    ) -> None:
        # Fetches and stores; with ``held`` the units are claimed already. Afterwards flight.data is set or another
        # process fetched the units; else it raises.
        claimed, ending = False, State.MISSING
        try:
            turn = held or self._take_turn(flight, call, patient)
            if turn is None:
                return
            claimed = turn
            flight.data = (read or self.read_origin)(flight, call)
            with self._lock:
                flight.become(State.FETCHED)
                self._units.counters.count(flight)
            flight.done.set()  # spares waiting threads the disk; the units stay claimed until stored
            if self._units.store(flight.first, flight.data):
                ending = State.CACHED
        except BaseException as error:
            if flight.data is None:
                flight.error = error
                with self._lock:
                    self._units.counters.count(flight)
                flight.done.set()
            raise
        finally:
            if claimed:
                self._units.files.unclaim(flight.first, flight.stop)
            self._end(flight, ending)

    def read_origin(self, flight: Flight, call: Call) -> bytes:
        """Return the bytes of a flight's units from the origin, by one read. Raises what the origin raises."""
        offset = flight.first << self._units.unit_shift
        length = self._units.files.length_of(flight.first, flight.stop)
        if call.on_wait is not None:
            call.on_wait()
        data = self._origin.read_at(offset, length, call)
        if len(data) != length:
            what = f"short read (got {len(data)} bytes, wanted {length})"
            raise SourceError(what, blob=self.name, offset=offset)
        return data

    def _take_turn(self, flight: Flight, call: Call, patient: bool) -> bool | None:
        # Returns None if another process has fetched the units, or is doing so. Otherwise this thread fetches them;
        # True if the claim shows that to other processes.
        files = self._units.files
        busy = files.claim(flight.first, flight.stop)
        if busy is not None and busy > flight.first:  # the units before are free
            self._shorten(flight, busy)
            busy = files.claim(flight.first, flight.stop)
        if busy is not None:
            return self._wait_for_others(flight, call) if patient else None
        if any(files.present(flight.first, flight.stop)):  # stored since the flight began
            files.unclaim(flight.first, flight.stop)
            return None
        return True

    def _wait_for_others(self, flight: Flight, call: Call) -> bool | None:
        files = self._units.files
        end = time.monotonic() + call.left_s(_OTHERS_S)
        pause_s = _LOOK_FIRST_S
        call.about_to_wait()
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
                self._units.attend[first] = 1  # note_use must see the reader arrive there
                unit = first
                while unit < stop and not self._holders.closed:
                    try:
                        flight = self._claim_next(unit, stop)
                    except SourceError:  # closed meanwhile: the flights claimed so far still have to end
                        break
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
            if flight.now is not State.QUEUED:
                return  # a reader took it over
            flight.become(State.FETCHING)
        try:
            self._fetch(flight, self._background(), patient=False)
        except ObdlabError as error:
            logger.info("fetching ahead failed: %s", error)

    def _abandon(self, flight: Flight) -> None:
        # The fetch ahead does not take place; if a reader took the flight over meanwhile, the reader fetches it.
        with self._lock:
            if flight.now is not State.QUEUED:
                return
            flight.become(State.MISSING)
        self._end(flight)

    def _background(self) -> Call:
        return Call(time.monotonic() + self.deadline_s * _BACKGROUND_SHARE)

    def _check_deadline(self, unit: int, call: Call) -> None:
        if call.left_s(self.deadline_s) <= 0:
            raise self._late(unit)

    def _late(self, unit: int) -> SourceError:
        offset = unit << self._units.unit_shift
        return SourceError("no data within the deadline", blob=self.name, offset=offset, temporary=True)


def _run(there: Sequence[bool]) -> int:
    # Returns the number of cached units from the first one on.
    return there.index(False) if False in there else len(there)
