"""Units of a cached blob walk through the states of their table, whatever readers, fetches ahead and failures do."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.cache import fetching
from obdlab.cache.flights import Flight
from obdlab.cache.unitstate import TRANSITIONS, State
from obdlab.errors import SourceError
from obdlab.states import IllegalTransitionError
from tests.cache.origin import DATA, UNIT, Origin, open_cached

UNITS = 8


class Queue:
    """In the place of the pool: jobs wait until the test runs them."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []
        self.full = False

    def submit(self, job: Callable[[], None]) -> bool:
        if not self.full:
            self.jobs.append(job)
        return not self.full


class Walk:
    """A cached blob whose units' states are looked at after each step, and in the middle of each fetch."""

    def __init__(self, directory: Path, queue: Queue) -> None:
        self.queue = queue
        self.origin = Origin(before=self.asked)
        self.blob = open_cached(directory, self.origin, extent=UNIT)
        self.fetches = self.blob._fetches
        self.units = self.blob._units
        self.claimed: list[Flight] = []
        self.fails = False
        self.seen = [State.MISSING] * UNITS
        self.reached: set[State] = set()
        store = self.units.files.store

        def stored(space: object, first: int, data: bytes) -> object:
            assert self.state_of(first) is State.FETCHED
            self.look()
            if self.full:
                raise OSError(28, "disk full")
            return store(space, first, data)  # type: ignore[arg-type]

        self.full = False
        self.units.files.store = stored  # type: ignore[method-assign,assignment]

    def state_of(self, unit: int) -> State:
        flight = self.fetches._flights.get(unit)
        if flight is not None:
            return flight.now
        return State.CACHED if self.units.files.present(unit, unit + 1)[0] else State.MISSING

    def asked(self, offset: int, length: int) -> None:
        for unit in range(offset // UNIT, -(-(offset + length) // UNIT)):
            assert self.state_of(unit) is State.FETCHING
        self.look()
        if self.fails:
            raise SourceError("no such luck")

    def look(self) -> None:
        for unit, before in enumerate(self.seen):
            now = self.state_of(unit)
            assert now is before or now in TRANSITIONS[before], f"unit {unit}: from {before} to {now}"
            self.seen[unit] = now
            self.reached.add(now)

    def step(self, name: str, unit: int) -> None:
        stop = min(unit + 2, UNITS)
        before = self.state_of(unit)
        wanted: State | None = None
        if name == "read":
            if before is State.FETCHING:
                return  # a reader would wait for the thread that claimed it
            fetches = self.state_of(unit) is not State.CACHED
            try:
                assert self.blob.read_at(unit * UNIT, UNIT) == DATA[unit * UNIT : (unit + 1) * UNIT]
            except SourceError:
                assert fetches
                assert self.fails
            cached = not fetches or not (self.fails or self.full)
            wanted = State.CACHED if cached else State.MISSING
        elif name == "queue":
            self.fetches._fetch_ahead([(unit, stop)])
            if before is State.MISSING:
                wanted = State.MISSING if self.queue.full else State.QUEUED
        elif name == "run" and self.queue.jobs:
            self.queue.jobs.pop(0)()
        elif name == "claim":
            flight = self.fetches.claim_ahead(unit, stop)
            if flight is not None:
                self.claimed.append(flight)
                wanted = State.FETCHING if before is State.MISSING else None
        elif name in ("fetch", "give back") and self.claimed:
            flight = self.claimed.pop(0)
            unit = flight.first
            wanted = State.MISSING
            if name == "give back":
                self.fetches.give_back(flight)
            elif self.fails:
                with pytest.raises(SourceError):
                    self.fetches.fetch_claimed(flight, self.fetches.read_origin)
            else:
                self.fetches.fetch_claimed(flight, self.fetches.read_origin)
                wanted = State.MISSING if self.full else State.CACHED
            assert flight.now is wanted
        elif name == "evict" and before in (State.CACHED, State.MISSING):
            self.blob.evict(unit * UNIT, UNIT)
            wanted = State.MISSING
        elif name in ("fails", "full"):
            setattr(self, name, not getattr(self, name))
        elif name == "pool full":
            self.queue.full = not self.queue.full
        assert wanted is None or self.state_of(unit) is wanted, name
        self.look()

    def close(self) -> None:
        for flight in self.claimed:
            self.fetches.give_back(flight)
        self.blob.close()
        while self.queue.jobs:
            self.queue.jobs.pop(0)()


STEPS = ("read", "queue", "run", "claim", "fetch", "give back", "evict", "fails", "full", "pool full")


def walk(steps: list[tuple[str, int]]) -> set[State]:
    queue = Queue()
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "_pool", queue)
        walked = Walk(Path(directory), queue)
        try:
            for name, unit in steps:
                walked.step(name, unit)
        finally:
            walked.close()
        return walked.reached


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, UNITS - 1)), max_size=40))
def test_units_follow_their_table(steps: list[tuple[str, int]]) -> None:
    walk(steps)


def test_a_walk_comes_through_every_state() -> None:
    assert walk([("queue", 0), ("read", 0), ("run", 0), ("evict", 0), ("claim", 2), ("fetch", 0)]) == set(State)


def test_a_flight_takes_no_other_way() -> None:
    flight = Flight(0, 1, ahead=True)
    with pytest.raises(IllegalTransitionError, match=r"units: no way from State\.QUEUED to State\.FETCHED"):
        flight.become(State.FETCHED)
