"""Waiting for the reads that began before a moment, while later reads go on."""

from __future__ import annotations

import threading

#: Longest time to wait for reads that began earlier.
READERS_DEADLINE_S = 60.0


class Readers:
    """Counts the reads under way by phase; a wait begins the next phase. ``lock`` guards the counts."""

    def __init__(self, lock: threading.Lock) -> None:
        self._left = threading.Condition(lock)
        self._counts = [0, 0]
        self._phase = 0

    def begin(self) -> int:
        """Count a read that begins. The caller holds the lock. Return the read's phase, for :meth:`end`."""
        self._counts[self._phase] += 1
        return self._phase

    def end(self, phase: int) -> None:
        """Count a read that ends. Takes the lock."""
        with self._left:
            self._counts[phase] -= 1
            if phase != self._phase and not self._counts[phase]:
                self._left.notify_all()

    def wait_for_earlier(self) -> bool:
        """Return once every read that began before this call has ended; False after a minute. Takes the lock."""
        with self._left:
            if not self._is_over(1 - self._phase):  # empty, unless an earlier call timed out
                return False
            self._phase = 1 - self._phase
            return self._is_over(1 - self._phase)

    def _is_over(self, phase: int) -> bool:
        return self._left.wait_for(lambda: not self._counts[phase], READERS_DEADLINE_S)
