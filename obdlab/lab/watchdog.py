"""A limit of time for work that is known to hang now and then: mounts, daemons, other people's programs."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.lab.process import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


class CellTimeoutError(LabError):
    """A cell took longer than it may."""


@contextmanager
def time_limit(limit_s: float, what: str) -> Iterator[None]:
    """Raise CellTimeoutError in here once ``limit_s`` have passed, wherever the program is.

    Works by SIGALRM, so in the main thread alone; elsewhere nothing is limited.
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
        if over:  # swallowed in there, by code that expects LabErrors for other reasons
            raise expired
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
