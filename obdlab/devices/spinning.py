"""Decides whether to poll for the next request for a while instead of sleeping until it comes.

A client that reads one file after another has one request under way at a time, and each wakes a sleeping server: an
interrupt to a halted processor takes 20 to 50 µs in a virtual machine, longer than a read of 4 KiB. A server that
still polls takes the next request at once. It spends only idle processor time: it does not poll when requests come
rarely or in crowds, when this process has other threads to run (they would wait for the interpreter's lock), or when
other processes wait for the processor.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

#: How long to poll for the next request after an answer.
LIMIT_NS = 200_000
#: Average gap between an answer and the next request. Above the range, sleep; below it, polling gains nothing.
_SHORTEST_GAP_NS = 5_000
_LONGEST_GAP_NS = 150_000
#: Shares of the time: other threads of this process running, and this thread waiting for a processor.
_OTHERS = 0.05
_DELAYED = 0.3
#: How long to sleep once other processes wanted the processor.
_YIELD_NS = 100_000_000

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


class Spinning:
    """Decides about polling for the thread that takes requests, from the times of its last requests."""

    def __init__(self) -> None:
        #: How long to poll for the next request before sleeping; 0: do not poll.
        self.limit_ns = 0
        self._possible = len(os.sched_getaffinity(0)) > 1
        self._quiet_until_ns = 0
        self._thread = 0
        self._now_ns = self._others_ns = self._delay_ns = 0

    def look(self, requests: int, busy_ns: int) -> None:
        """Decide again, given the number of requests answered since the last look and the time they took."""
        if not self._possible:
            return
        before_ns, others_ns, delay_ns, thread = self._now_ns, self._others_ns, self._delay_ns, self._thread
        self._now_ns = now = time.monotonic_ns()
        self._others_ns = time.process_time_ns() - time.thread_time_ns()
        self._delay_ns = _run_delay_ns()
        self._thread = threading.get_ident()
        if self._thread != thread:
            self.limit_ns = 0
            return
        taken = now - before_ns
        if self._delay_ns - delay_ns > _DELAYED * taken:
            self._quiet_until_ns = now + _YIELD_NS
        wanted = (
            _SHORTEST_GAP_NS * requests < taken - busy_ns < _LONGEST_GAP_NS * requests
            and self._others_ns - others_ns < _OTHERS * taken
            and now >= self._quiet_until_ns
        )
        self.limit_ns = LIMIT_NS if wanted else 0


# Returns how long this thread was ready to run and did not (Documentation/scheduler/sched-stats.rst).
def _run_delay_ns() -> int:
    try:
        return int(_SCHEDSTAT.read_bytes().split()[1])
    except (OSError, IndexError, ValueError):  # a kernel without schedstat
        return 0
