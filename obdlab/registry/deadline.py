"""A deadline for everything that a thread does with a registry, at any depth of calls."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_LEAST_TRY_S = 1.0

_local = threading.local()


@contextmanager
def deadline_of_thread(deadline: float) -> Iterator[None]:
    """Let no socket operation, retry or pause of this thread last beyond ``deadline`` (time.monotonic).

    Inside a block with an earlier deadline the earlier one stays in force.
    """
    outer = thread_deadline()
    _local.deadline = deadline if outer is None else min(outer, deadline)
    try:
        yield
    finally:
        _local.deadline = outer


@contextmanager
def one_try() -> Iterator[None]:
    """Leave half of the thread's time for another try; the last second is not halved."""
    deadline = thread_deadline()
    now = time.monotonic()
    if deadline is None or deadline - now < 2 * _LEAST_TRY_S:
        yield
        return
    with deadline_of_thread(now + (deadline - now) / 2):
        yield


def thread_deadline() -> float | None:
    """Return the deadline in force in this thread, if there is one."""
    return getattr(_local, "deadline", None)
