"""A deadline for everything that a thread does with a registry, at any depth of calls."""

from __future__ import annotations

import threading


class _InForce(threading.local):
    deadline: float | None = None


#: The deadline of the calling thread, as an attribute: every operation of a socket looks it up.
IN_FORCE = _InForce()


class deadline_of_thread:  # noqa: N801 - used as a function
    """Let no socket operation, retry or pause of this thread last beyond ``deadline`` (time.monotonic).

    Inside a block with an earlier deadline the earlier one stays in force.
    """

    __slots__ = ("_deadline", "_outer")

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._outer: float | None = None

    def __enter__(self) -> None:
        outer = self._outer = IN_FORCE.deadline
        IN_FORCE.deadline = self._deadline if outer is None else min(outer, self._deadline)

    def __exit__(self, *_: object) -> None:
        IN_FORCE.deadline = self._outer


def thread_deadline() -> float | None:
    """Return the deadline in force in this thread, if there is one."""
    return IN_FORCE.deadline
