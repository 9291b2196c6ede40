"""Whether one process is not enough: how much of its time it is busy serving."""

from __future__ import annotations

import time

#: Requests between two looks: a clock is read for each, so a look must not come with every request.
LOOK_EVERY = 256
#: Of the time; the rest goes by between the answer to one request and the arrival of the next.
_HIGH = 0.5
_SHORTEST_NS = 50_000_000
#: A longer time with so few requests is no load, and says nothing of the present.
_LONGEST_NS = 1_000_000_000
_QUIET_NS = 2_000_000_000


class Load:
    """How busy this process was over the last looks."""

    def __init__(self) -> None:
        self._begin_ns = 0
        self._busy_ns = 0
        self._quiet_until_ns = 0

    def is_high(self, busy_ns: int) -> bool:
        """Tell, given the time spent serving since the last look, whether that was most of the time lately.

        True at most every two seconds.
        """
        now = time.monotonic_ns()
        self._busy_ns += busy_ns
        taken, busy = now - self._begin_ns, self._busy_ns
        if taken < _SHORTEST_NS:
            return False
        self._begin_ns, self._busy_ns = now, 0
        if taken > _LONGEST_NS or busy < _HIGH * taken or now < self._quiet_until_ns:
            return False
        self._quiet_until_ns = now + _QUIET_NS
        return True
