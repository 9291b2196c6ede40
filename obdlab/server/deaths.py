"""Decides when to give up a device whose servers keep failing, and the pause before the next server.

A server that dies by itself again and again will do so for ever: the device's users get I/O errors instead. A server
killed from outside is not to blame, however short it lived, if the device made progress while it served.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from obdlab.server.watchdog import Activity
from obdlab.system.pauses import backoff_s

#: A server that served this long did not die "at once".
HEALTHY_S = 0.25
#: After this many deaths at once in a row, the device is given up.
MAX_DEATHS = 10
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_OUT_OF_MEMORY = b"\noom_kill "


@dataclass(frozen=True, slots=True)
class Start:
    """The kernel's counters at the moment a server became ready."""

    #: Requests that the device has completed; -1 if the kernel does not count them.
    completed: int
    #: Processes that the kernel has killed for lack of memory, on the whole machine.
    oom_kills: int
    at_s: float = field(default_factory=time.monotonic)

    @classmethod
    def now(cls, node: Path) -> Start:
        """Read the counters for a device node."""
        activity = Activity.of(node)
        return cls(-1 if activity is None else activity.completed, _oom_kills())

    def was_healthy(self, node: Path, killed_by: int | None) -> bool:
        """Return True if a server that was ready since then, and died just now, is not to blame for its death.

        ``killed_by`` is the signal that killed it, 0 if it exited; None if unknown.
        """
        if time.monotonic() - self.at_s >= HEALTHY_S:
            return True
        activity = Activity.of(node)
        went_ahead = activity is not None and 0 <= self.completed < activity.completed
        return went_ahead and killed_by in (None, signal.SIGKILL) and _oom_kills() == self.oom_kills


class Deaths:
    """Counts failures in a row. A device that fails for longer than ``give_up_after_s`` is given up as well."""

    def __init__(self, give_up_after_s: float) -> None:
        self._give_up_after_s = give_up_after_s
        self._failures = 0
        self._deaths = 0
        self._since_s = 0.0

    def forget(self) -> None:
        """Reset the counts: a server was healthy."""
        self._failures = self._deaths = 0

    def count(self, *, reported: bool) -> str:
        """Count a failure, a death unless the server ``reported`` its cause. Return the reason to give up, or ''."""
        now = time.monotonic()
        if not self._failures:
            self._since_s = now
        self._failures += 1
        self._deaths += not reported
        lasted_s = now - self._since_s
        if self._deaths >= MAX_DEATHS or lasted_s > self._give_up_after_s:
            return f"{self._failures} servers in {lasted_s:.1f} s"
        return ""

    @property
    def pause_s(self) -> float:
        """Pause before the next server; 0 after the first failure."""
        if self._failures <= 1:
            return 0.0
        return backoff_s(self._failures, _FIRST_PAUSE_S, _LONGEST_PAUSE_S)


def _oom_kills() -> int:
    try:
        text = Path("/proc/vmstat").read_bytes()
    except OSError:
        return 0
    _, found, rest = text.partition(_OUT_OF_MEMORY)
    return int(rest.split(b"\n", 1)[0]) if found else 0
