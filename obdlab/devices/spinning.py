"""Whether to look for the next request again and again for a while, instead of sleeping until it comes.

Who reads one file after another has one request under way at a time, and each wakes a sleeping server: an interrupt
to a halted processor takes 20 to 50 µs in a virtual machine, longer than a read of 4 KiB. A server that is still
looking takes the next request at once. That costs processor time which nobody else wants, and only then: not once
requests come rarely or in crowds, not while this process has other threads to run (they would wait for the
interpreter's lock), not while others wait for the processor.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

#: How long after an answer the next request is looked for.
LIMIT_NS = 200_000
#: Between the answer to one request and the next, on average. Above, it is slept; below, there is nothing to gain.
_SHORTEST_GAP_NS = 5_000
_LONGEST_GAP_NS = 150_000
#: Of the time: what other threads of this process may run, and how long this one may wait for a processor.
_OTHERS = 0.05
_DELAYED = 0.3
#: How long to sleep after others were seen to want the processor.
_YIELD_NS = 100_000_000

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


class Spinning:
    """What the last requests say about spinning: for one thread that takes them, told of every so many."""

    def __init__(self) -> None:
        #: How long to look for the next request before sleeping; 0 is not at all.
        self.limit_ns = 0
        self._possible = len(os.sched_getaffinity(0)) > 1
        self._quiet_until_ns = 0
        self._thread = 0
        self._now_ns = self._others_ns = self._delay_ns = 0

    def look(self, requests: int, busy_ns: int) -> None:
        """Decide anew, given how many requests were answered since the last look and how long that took."""
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


# How long this thread was ready to run and did not (Documentation/scheduler/sched-stats.rst).
def _run_delay_ns() -> int:
    try:
        return int(_SCHEDSTAT.read_bytes().split()[1])
    except (OSError, IndexError, ValueError):  # a kernel without
        return 0
