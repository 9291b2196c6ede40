"""Whether one process is not enough: how much of a processor serving takes."""

from __future__ import annotations

import time

#: Requests between two looks: a clock is read for each, so a look must not come with every request.
LOOK_EVERY = 256
_HIGH = 0.7
_SHORTEST_S = 0.05
#: A longer time with so few requests is no load, and says nothing of the present.
_LONGEST_S = 1.0
_QUIET_S = 2.0


class Load:
    """The processor time of this process over the last looks."""

    def __init__(self) -> None:
        self._begin_s = self._begin_cpu_s = 0.0
        self._quiet_until_s = 0.0

    def is_high(self) -> bool:
        """Tell whether this process took most of one processor lately; True at most every two seconds."""
        now, cpu = time.monotonic(), time.process_time()
        taken, cpu_taken = now - self._begin_s, cpu - self._begin_cpu_s
        if taken < _SHORTEST_S:
            return False
        self._begin_s, self._begin_cpu_s = now, cpu
        if taken > _LONGEST_S or cpu_taken < _HIGH * taken or now < self._quiet_until_s:
            return False
        self._quiet_until_s = now + _QUIET_S
        return True
