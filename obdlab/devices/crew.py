"""Leader and followers: one thread takes requests; another takes over while it waits.

On a pure hit path a single thread runs: a second reader thread costs a fifth of the IOPS under Python's interpreter
lock. A request that is about to wait (:attr:`obdlab.call.Call.on_wait`) first hands the lead to an idle follower or a
new thread, so that the device keeps answering other requests.
"""

from __future__ import annotations

import operator
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from obdlab.call import UNBOUND, Call
from obdlab.devices.device import DeviceStatistics
from obdlab.observe.counters import TIME_SLOTS, times_table

if TYPE_CHECKING:
    from collections.abc import Callable


def _no_times() -> list[int]:
    return [0] * TIME_SLOTS


@dataclass(slots=True, eq=False)
class Member:
    """One thread of a crew, with counters that only this thread writes."""

    leading: bool = False
    wake: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    #: Buffer for requests; goes with the lead, unless the member still needs its content.
    buffer: bytearray = field(default_factory=bytearray)
    needs_buffer: bool = False
    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    errors: int = 0
    slowest_ns: int = 0
    #: Durations of reads and writes: their sum, and their number by the bit length of their nanoseconds.
    read_ns: int = 0
    write_ns: int = 0
    read_times: list[int] = field(default_factory=_no_times)
    write_times: list[int] = field(default_factory=_no_times)
    #: The terms of the member's requests: before one waits, the member gives the lead away.
    call: Call = UNBOUND
    #: When the request under way was taken (time.monotonic_ns); 0 if there is no request.
    since_ns: int = 0

    def add(self, other: Member) -> None:
        """Add another thread's counters to these."""
        self.reads += other.reads
        self.read_bytes += other.read_bytes
        self.writes += other.writes
        self.written_bytes += other.written_bytes
        self.errors += other.errors
        self.slowest_ns = max(self.slowest_ns, other.slowest_ns)
        self.read_ns += other.read_ns
        self.write_ns += other.write_ns
        self.read_times[:] = map(operator.add, self.read_times, other.read_times)
        self.write_times[:] = map(operator.add, self.write_times, other.write_times)


class Crew:
    """Threads that share one stream of requests, at most ``limit`` of them, started on demand.

    ``turn(member)`` takes and answers requests as long as ``member.leading``. It returns False once the stream has
    ended for good. A follower ends after ``idle_s`` without work.
    """

    def __init__(
        self, turn: Callable[[Member], bool], *, limit: int = 256, idle_s: float = 10.0, name: str = "crew"
    ) -> None:
        self._turn = turn
        self._limit = limit
        self._idle_s = idle_s
        self._name = name
        self._lock = threading.Lock()
        self._members: set[Member] = set()
        self._idle: list[Member] = []
        self._past = Member()
        self._vacant = False
        self._ended = False
        self._all_gone = threading.Event()

    def start(self) -> None:
        """Start the first leader."""
        with self._lock:
            self._add_leader()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the stream has ended and all threads are done. Return False on timeout."""
        return self._all_gone.wait(timeout_s)

    @property
    def size(self) -> int:
        """Threads alive at the moment."""
        return len(self._members)

    def totals(self) -> Member:
        """Return the sum of all counters, past threads included."""
        total = Member()
        with self._lock:
            total.add(self._past)
            for member in self._members:
                total.add(member)
        return total

    def statistics(self, last_error: str) -> DeviceStatistics:
        """Return the counters of the device that this crew serves."""
        total = self.totals()
        return DeviceStatistics(
            reads=total.reads,
            read_bytes=total.read_bytes,
            writes=total.writes,
            written_bytes=total.written_bytes,
            errors=total.errors,
            slowest_ms=total.slowest_ns / 1e6,
            threads=self.size,
            last_error=last_error,
            read_times=times_table(total.read_times, total.read_ns),
            write_times=times_table(total.write_times, total.write_ns),
            under_way_s=self.under_way_s(),
        )

    def under_way_s(self) -> tuple[float, ...]:
        """Return the age of each request under way, the oldest first."""
        now = time.monotonic_ns()
        with self._lock:
            begun = [since for member in self._members if (since := member.since_ns)]
        return tuple(sorted(((now - since) / 1e9 for since in begun), reverse=True))

    # Hundreds of threads may wait at a time; only members that lead or hold data to write need a large buffer.
    def _hand_buffer(self, member: Member, successor: Member) -> None:
        if not member.needs_buffer:
            successor.buffer, member.buffer = member.buffer, bytearray()

    def _add_leader(self, predecessor: Member | None = None) -> None:
        member = Member(leading=True)
        thread = threading.Thread(target=self._run, args=(member,), name=self._name, daemon=True)
        self._members.add(member)
        if predecessor is not None:
            self._hand_buffer(predecessor, member)
        try:
            thread.start()
        except RuntimeError:
            self._members.discard(member)
            if predecessor is not None and member.buffer:
                predecessor.buffer = member.buffer
            raise

    def _give_lead_away(self, member: Member) -> None:
        with self._lock:
            if self._ended:
                return
            if self._idle:
                successor = self._idle.pop()
                self._hand_buffer(member, successor)
                successor.leading = True
                successor.wake.release()
            elif len(self._members) < self._limit:
                try:
                    self._add_leader(member)
                except RuntimeError:  # no more threads: this member keeps the lead
                    return
            else:
                self._vacant = True
            member.leading = False

    def _run(self, member: Member) -> None:
        def about_to_wait() -> None:
            if member.leading:
                self._give_lead_away(member)

        member.call = Call(on_wait=about_to_wait)
        try:
            while self._turn(member) and self._lead_again(member):
                pass
        finally:
            if member.leading:  # also if its turn failed: better no device than one without answers
                self._end()
            self._leave(member)

    # Waits until this member is to lead; returns False if it is to end.
    def _lead_again(self, member: Member) -> bool:
        with self._lock:
            if self._ended:
                return False
            if self._vacant:
                self._vacant = False
                member.leading = True
                return True
            self._idle.append(member)
        if not member.wake.acquire(timeout=self._idle_s):
            with self._lock:
                if member in self._idle:
                    self._idle.remove(member)
                    return False
            member.wake.acquire()  # another thread has just chosen it: the wake-up is on its way
        return not self._ended

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            for follower in self._idle:
                follower.wake.release()
            self._idle.clear()

    def _leave(self, member: Member) -> None:
        with self._lock:
            self._members.discard(member)
            self._past.add(member)
            last = not self._members
            if last:
                self._ended = True
        if last:
            self._all_gone.set()
