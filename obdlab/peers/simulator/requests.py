"""Bursts of requests to a function: each runs in a container of its own, and new containers are started as needed.

As FaaSNet's evaluation has them: a container serves one request at a time; a request that finds none idle has one
started on the next host, and takes the first that becomes free.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from obdlab.peers.simulator.eventqueue import SimulationError
from obdlab.peers.simulator.swarm import Swarm, no_collection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.peers.simulator.parts import Container
    from obdlab.peers.simulator.site import Outcome, Site
    from obdlab.peers.simulator.workload import Workload

#: A response that takes so many times a request's own time shows a system that has not recovered.
SLOW = 1.5


@dataclass(frozen=True, slots=True)
class Shape:
    """Requests per second: ``usual``, and ``burst`` from ``begins_s`` on until ``ends_s``. Their times are random."""

    usual: float
    burst: float
    begins_s: float
    ends_s: float

    def times(self, seed: int) -> list[float]:
        """Return the requests' times, in seconds."""
        random, now = Random(seed), 0.0
        found: list[float] = []
        while True:
            # The next one of the highest rate, kept as often as the rate of its time is of it.
            now += random.expovariate(max(self.usual, self.burst))
            if now >= self.ends_s:
                return found
            rate = self.burst if now >= self.begins_s else self.usual
            if random.random() < rate / max(self.usual, self.burst):
                found.append(now)


#: FaaSNet's, section 4: the first burst of the IoT trace, and the synthetic one; both cut behind their recovery.
SHAPES = {"iot": Shape(10.0, 350.0, 30.0, 210.0), "synthetic": Shape(1.0, 100.0, 30.0, 210.0)}


@dataclass(slots=True)
class Served:
    """The responses to requests, by number, and the containers that were started for them."""

    times_s: list[float]
    response_s: list[float]
    outcome: Outcome

    def recovered_s(self, begins_s: float, run_s: float) -> float:
        """Return the seconds from ``begins_s`` until the last request that had a slow response; 0 without one.

        If that is about the last request of all, the system has not recovered within the requests' time.
        """
        late = (
            at
            for at, took in zip(self.times_s, self.response_s, strict=True)
            if at >= begins_s and took > SLOW * run_s
        )
        return max((at - begins_s for at in late), default=0.0)


def serve(
    site: Site,
    workload: Workload,
    topology: str,
    hosts: int,
    requests_s: Sequence[float],
    run_s: float,
    *,
    seed: int,
    arity: int = 2,
    noise: float = 0.0,
    until_s: float = 3600.0,
) -> Served:
    """Answer requests, each of which takes ``run_s``, with at most one container on each host.

    The other arguments are those of :func:`obdlab.peers.simulator.simulate`. Raises SimulationError.
    """
    if hosts < 1 or not requests_s or min(requests_s) < 0 or run_s <= 0:
        raise SimulationError(
            f"wanted hosts, requests and a positive run_s (got {hosts}, {len(requests_s)}, {run_s})"
        )
    with no_collection():
        return _Pool(site, workload, topology, hosts, seed, arity, noise).serve(requests_s, run_s, until_s)


class _Pool(Swarm):
    def serve(self, requests_s: Sequence[float], run_s: float, until_s: float) -> Served:
        self._run_s, self._idle, self._starting = run_s, 0, 0
        self._waiting: deque[int] = deque()
        self._served = Served(list(requests_s), [0.0] * len(requests_s), self.outcome)
        for number, at in enumerate(requests_s):
            self._events.at(at, self._request, number)
        self._finish(until_s)
        return self._served

    def _request(self, number: int) -> None:
        self._waiting.append(number)
        if self._idle:
            self._idle -= 1
            self._take()
        elif self._starting < len(self._waiting) and len(self.outcome.ready_s) < len(self._hosts):
            self._starting += 1
            self._start(self._events.now, 1)

    def _ready(self, container: Container) -> None:
        super()._ready(container)
        self._starting -= 1
        self._free(0)

    # A container has become free: the longest waiting request takes it.
    def _free(self, _: int) -> None:
        if self._waiting:
            self._take()
        else:
            self._idle += 1

    def _take(self) -> None:
        number = self._waiting.popleft()
        end_s = self._events.now + self._run_s
        self._served.response_s[number] = end_s - self._served.times_s[number]
        self._events.at(end_s, self._free, 0)
