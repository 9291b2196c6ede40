"""Whether one process is not enough: how much of its time it is busy serving."""

from __future__ import annotations

import time

#: Requests between two looks: a clock is read for each, so a look must not come with every request.
LOOK_EVERY = 128
#: Of the time; the rest goes by between the answer to one request and the arrival of the next.
_HIGH = 0.5
#: Longer, on average, and no request waits while another is answered: a second process would only take turns.
_LONGEST_GAP_NS = 10_000
_SHORTEST_NS = 50_000_000
#: A longer time with so few requests is no load, and says nothing of the present.
_LONGEST_NS = 1_000_000_000
_QUIET_NS = 2_000_000_000


class Load:
    """How busy this process was over the last looks."""

    def __init__(self) -> None:
        self._begin_ns = 0
        self._busy_ns = self._requests = 0
        self._quiet_until_ns = 0

    def is_high(self, requests: int, busy_ns: int) -> bool:
        """Tell, given what was served since the last look and how long that took, whether others were kept waiting.

        True at most every two seconds.
        """
        now = time.monotonic_ns()
        self._requests += requests
        self._busy_ns += busy_ns
        taken, busy, served = now - self._begin_ns, self._busy_ns, self._requests
        if taken < _SHORTEST_NS:
            return False
        self._begin_ns, self._busy_ns, self._requests = now, 0, 0
        if taken > _LONGEST_NS or now < self._quiet_until_ns:
            return False
        if busy < _HIGH * taken or taken - busy > _LONGEST_GAP_NS * served:
            return False
        self._quiet_until_ns = now + _QUIET_NS
        return True
