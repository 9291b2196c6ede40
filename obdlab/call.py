"""The terms of one call down the data path: its deadline, its pace, its cancellation, and a notice before it waits.

A :class:`Call` is handed down with a read, from the device's thread to the socket. Each level may hand on stricter
terms (:meth:`Call.until`). Work for another thread gets its call as a value like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec


class BrokenOffError(ConnectionAbortedError):
    """Another thread has broken off this call."""


class Pace(Protocol):
    """A least speed for answers (:class:`obdlab.registry.tries.WindowPace`)."""

    #: When more bytes must have arrived (time.monotonic); None while the wait for an answer does not count.
    end: float | None

    def received(self, size: int) -> None:
        """Count received bytes."""


class Cancellation(Protocol):
    """The means by which another thread breaks a call off (:class:`obdlab.registry.tries.SocketCancellation`)."""

    #: True once another thread needs the answer no longer.
    broken_off: bool

    def use(self, used: Any) -> None:
        """Set the socket that the call waits for; None when it may serve another call. Raises BrokenOffError."""


class Call(msgspec.Struct, frozen=True):
    """The terms of one call. A struct, as its making then costs no call of Python's."""

    #: When the call must have ended, with all its retries (time.monotonic); None: no limit.
    deadline: float | None = None
    #: Called before the thread waits for something slow: a device lets another thread take requests meanwhile.
    on_wait: Callable[[], None] | None = None
    #: The least speed of the answer; None: any.
    pace: Pace | None = None
    #: Through which other threads can break the call off; None: they cannot.
    cancellation: Cancellation | None = None

    def until(self, deadline: float) -> Call:
        """Return the same terms with the earlier of both deadlines."""
        if self.deadline is not None and self.deadline <= deadline:
            return self
        return Call(deadline, self.on_wait, self.pace, self.cancellation)

    def left_s(self, most_s: float) -> float:
        """Return the time until the deadline: at most ``most_s``, at least 0."""
        return most_s if self.deadline is None else max(0.0, min(most_s, self.deadline - time.monotonic()))

    def about_to_wait(self) -> None:
        """Give notice that the thread may wait long now (network, another thread's fetch)."""
        if self.on_wait is not None:
            self.on_wait()

    @property
    def broken_off(self) -> bool:
        """True if another thread has broken the call off."""
        return self.cancellation is not None and self.cancellation.broken_off


#: No deadline, no least speed, no hook.
UNBOUND = Call()
