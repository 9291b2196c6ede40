"""A deadline that holds for all a thread does with a registry, however deep below it happens."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def thread_deadline() -> float | None:
    """Return the deadline in force in this thread, if there is one."""
    return getattr(_local, "deadline", None)
