"""Fetches in flight, waiting readers, and counters of the block cache."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from obdlab.cache.unitstate import TRANSITIONS, State
from obdlab.states import StateOf

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(slots=True)
class Statistics:
    """Counters of a cached blob since it was opened. Hits are not counted under a lock: a few may be lost."""

    hits: int = 0  # reads served without waiting for the origin
    misses: int = 0  # reads that waited for the origin
    requests: int = 0  # reads of the origin
    demand_bytes: int = 0  # fetched because a reader waited
    readahead_bytes: int = 0  # fetched ahead
    background_bytes: int = 0  # fetched to have the blob whole
    prefetch_bytes: int = 0  # fetched because a trace names them
    prefetch_used_bytes: int = 0  # of these, in units that were read since
    prefetch_hits: int = 0  # reads that were the first to use prefetched units
    failed_requests: int = 0
    corrupt_units: int = 0  # dropped because the checksum did not match
    evicted_units: int = 0  # dropped because a reader above asked for it
    uncached_bytes: int = 0  # fetched but not kept: cache or disk full

    def count(self, flight: Flight) -> None:
        """Count a flight that has ended. The first flight of a stream counts as its request."""
        self.requests += not flight.streamed
        if flight.data is None:
            self.failed_requests += 1
        elif flight.prefetch:
            self.prefetch_bytes += len(flight.data)
        elif flight.background:
            self.background_bytes += len(flight.data)
        elif flight.ahead:
            self.readahead_bytes += len(flight.data)
        else:
            self.demand_bytes += len(flight.data)


def total_of(statistics: Sequence[Statistics]) -> dict[str, int]:
    """Return the field-wise sum."""
    total = asdict(Statistics())
    for one in statistics:
        for name, value in asdict(one).items():
            total[name] += value
    return total


class Flight(StateOf[State]):
    """Units being fetched, by the thread that made them FETCHING; other threads wait for ``done``.

    The state, that of all its units, changes under the lock of the blob's table of flights.
    """

    __slots__ = ("ahead", "background", "data", "done", "error", "first", "held", "prefetch", "stop", "streamed")

    def __init__(self, first: int, stop: int, *, ahead: bool) -> None:
        # As StateOf does: a miss makes a flight, and its calls are counted (tests/cache/test_misspath.py).
        self.now = State.QUEUED if ahead else State.FETCHING
        self._name, self._table = "units", TRANSITIONS
        self.first = first
        self.stop = stop
        self.ahead = ahead  # no reader waited when it was made
        self.background = False
        self.prefetch = False
        self.held = False  # other processes see it, before it is fetched
        self.streamed = False  # its bytes came by the request of an earlier flight
        self.done = threading.Event()
        self.data: bytes | None = None
        self.error: BaseException | None = None


class Holders:
    """Counts the users of a closable resource: its owner, and holders that need it beyond :meth:`close`."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._lock = threading.Lock()
        self._count = 1
        self.closed = False

    def hold(self) -> bool:
        """Put off the release until :meth:`let_go`. Return False if it was closed already."""
        with self._lock:
            if not self.closed:
                self._count += 1
            return not self.closed

    def let_go(self) -> None:
        """Release a :meth:`hold`; the last user releases the resource."""
        with self._lock:
            self._count -= 1
            last = self._count == 0
        if last:
            self._release()

    def close(self) -> None:
        """Release the owner's use; later calls do nothing."""
        with self._lock:
            closed, self.closed = self.closed, True
        if not closed:
            self.let_go()


class Gauge:
    """Counts the threads inside, and remembers when the last one left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting = 0
        self.entered = 0
        self._last = 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._waiting += 1
            self.entered += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._waiting -= 1
            self._last = time.monotonic()

    def quiet_s(self) -> float:
        """Return the time since the last thread left; 0 while any is inside."""
        with self._lock:
            return 0.0 if self._waiting else time.monotonic() - self._last

    @property
    def busy(self) -> bool:
        """True if any thread is inside."""
        return self._waiting > 0


class Demand(Gauge):
    """Readers of all blobs of an image that are waiting for an origin; each enters while it waits."""

    def __init__(self) -> None:
        super().__init__()
        #: The readers among them that wait for units which no trace announced.
        self.surprised = Gauge()
        #: The traces and hot layers that are being fetched ahead.
        self.announced = Gauge()
