"""A time limit for work that can hang: mounts, daemons, foreign programs."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.lab.testbed.process import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


class CellTimeoutError(LabError):
    """A cell exceeded its time limit."""


@contextmanager
def time_limit(limit_s: float, what: str) -> Iterator[None]:
    """Raise CellTimeoutError in the context after ``limit_s``, at any point of the program.

    Uses SIGALRM, so it works in the main thread only; in other threads there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    expired = CellTimeoutError(f"{what}: not done after {limit_s:g} s")
    over = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal over
        over = True
        raise expired

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
        if over:  # code in the context swallowed the error, as it expects LabErrors for other reasons
            raise expired
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
