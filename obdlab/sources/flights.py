"""What is under way in the block cache, and what was: fetches, waiting readers, counters."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(slots=True)
class Statistics:
    """What a cached blob did since it was opened. Hits are not counted under a lock: a few may be lost."""

    hits: int = 0  # reads served without waiting for the origin
    misses: int = 0  # reads that were not
    requests: int = 0  # reads of the origin
    demand_bytes: int = 0  # fetched because a reader waited
    readahead_bytes: int = 0  # fetched ahead
    background_bytes: int = 0  # fetched to have the blob whole
    prefetch_bytes: int = 0  # fetched because a trace says that they will be read
    prefetch_used_bytes: int = 0  # of these, in units that were read since
    prefetch_hits: int = 0  # reads that were the first to use something prefetched
    failed_requests: int = 0
    corrupt_units: int = 0  # dropped because the checksum did not match
    evicted_units: int = 0  # dropped because a reader above asked for it
    uncached_bytes: int = 0  # fetched but not kept: cache or disk full

    def count(self, flight: Flight) -> None:
        """Count a fetch that is over; requests that bring several are counted by who makes them."""
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


class Flight:
    """Units being fetched, by whoever set ``started``; the others wait for ``done``."""

    __slots__ = ("ahead", "background", "data", "done", "error", "first", "prefetch", "started", "stop", "streamed")

    def __init__(self, first: int, stop: int, *, ahead: bool) -> None:
        self.first = first
        self.stop = stop
        self.ahead = ahead  # nobody waited when it was asked for
        self.background = False
        self.prefetch = False
        self.streamed = False
        self.started = not ahead
        self.done = threading.Event()
        self.data: bytes | None = None
        self.error: BaseException | None = None


class Holders:
    """Who still needs something that was closed: its owner, and those that hold it beyond that."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._lock = threading.Lock()
        self._count = 1
        self.closed = False

    def hold(self) -> bool:
        """Put off the release until :meth:`let_go`; False if it was closed already."""
        with self._lock:
            if not self.closed:
                self._count += 1
            return not self.closed

    def let_go(self) -> None:
        """Give up what :meth:`hold` took; the last one releases."""
        with self._lock:
            self._count -= 1
            last = self._count == 0
        if last:
            self._release()

    def close(self) -> None:
        """The owner's part, once."""
        with self._lock:
            closed, self.closed = self.closed, True
        if not closed:
            self.let_go()


class Gauge:
    """How many are inside, and since when nobody is."""

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
        """Return how long nobody has waited; 0 while somebody does."""
        with self._lock:
            return 0.0 if self._waiting else time.monotonic() - self._last

    @property
    def busy(self) -> bool:
        """Whether somebody is inside."""
        return self._waiting > 0


class Demand(Gauge):
    """Whether readers of any blob of an image are waiting for an origin; entered while one is."""

    def __init__(self) -> None:
        super().__init__()
        #: Those among them that fetch what nobody expected them to read.
        self.surprised = Gauge()
