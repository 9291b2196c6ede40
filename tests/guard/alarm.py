"""The limit of one test: stacks of all threads, FUSE connections aborted, the test interrupted."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING

from tests.guard import fuse, processes

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

#: Interrupts the main thread. SIGALRM is used by the product.
SIGNAL = signal.SIGRTMIN + 10


class TimedOut(BaseException):
    """A test was not done in time. Not an Exception: neither a test nor hypothesis may take it for one of its own."""


class Alarm:
    """Interrupts the main thread after ``limit_s``. ``report`` gets the stacks first, in a thread of the alarm's."""

    def __init__(self, limit_s: float, report: Callable[[str], None]) -> None:
        self._report = report
        self._timer = threading.Timer(limit_s, self._go_off)
        self._timer.daemon = True
        self._timer.name = "alarm"

    def start(self) -> None:
        """Begin to count."""
        self._timer.start()

    def cancel(self) -> None:
        """Do not go off any more. May be called twice."""
        self._timer.cancel()
        if threading.current_thread() is not self._timer:
            self._timer.join()

    def _go_off(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        self._report(stacks())
        signal.pthread_kill(main, SIGNAL)
        # A thread that waits in the kernel for this process's own answer can't take the signal before.
        fuse.abort(fuse.connections_of({os.getpid()}))


def stacks() -> str:
    """Return the stacks of all threads of this process but the calling one, and the processes below it.

    Other than faulthandler's timer, which reads them while they change (python died of that), this holds the
    interpreter's lock.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames: dict[int, FrameType] = sys._current_frames()
    parts = []
    for ident, frame in frames.items():
        if ident != threading.get_ident():
            parts.append(f"-- thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}")
    children = [processes.describe(pid) for pid in sorted(processes.descendants())]
    return "".join(parts) + "-- processes\n" + "\n".join(children)
