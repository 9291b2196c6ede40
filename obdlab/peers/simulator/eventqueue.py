"""A virtual clock and its queue of events."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Callable


class SimulationError(ObdlabError):
    """A simulation has an invalid parameter, or did not come to its end."""


class Events:
    """Calls in the order of their times, in seconds; of equal times in the order in which they were added."""

    def __init__(self) -> None:
        self.now = 0.0
        #: Number of events so far.
        self.count = 0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._added = 0

    def at(self, time: float, call: Callable[[Any], None], argument: Any) -> None:
        """Have ``call(argument)`` made at ``time``, which is not in the past."""
        self._added += 1
        heappush(self._heap, (time, self._added, call, argument))

    def run(self, settle: Callable[[], None], until: float = float("inf")) -> None:
        """Make all calls; after the last one of each time call ``settle``, which may add some.

        Raises SimulationError if events are left after ``until``.
        """
        heap = self._heap
        while heap:
            now, _, call, argument = heappop(heap)
            if now > until:
                raise SimulationError(f"not finished after {until:g} simulated seconds ({len(heap) + 1} events left)")
            self.now = now
            self.count += 1
            call(argument)
            if not heap or heap[0][0] > now:
                settle()
