"""Decides whether one serving process is too few, by the share of its time it is busy."""

from __future__ import annotations

import time

#: Requests between two looks: a clock is read for each, so a look must not come with every request.
LOOK_EVERY = 128
#: Busy share of the time; the rest passes between one answer and the next request.
_HIGH = 0.5
#: With a longer average gap no request waits while another is answered: a second process would only take turns.
_LONGEST_GAP_NS = 10_000
_SHORTEST_NS = 50_000_000
#: So few requests in a longer time are no load, and say nothing of the present.
_LONGEST_NS = 1_000_000_000
_QUIET_NS = 2_000_000_000


class Load:
    """How busy this process was over the last looks."""

    def __init__(self) -> None:
        self._begin_ns = 0
        self._busy_ns = self._requests = 0
        self._quiet_until_ns = 0

    def is_high(self, requests: int, busy_ns: int) -> bool:
        """Return True if requests were kept waiting. Takes the requests since the last look, and their time.

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
