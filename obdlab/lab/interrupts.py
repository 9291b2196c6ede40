"""Signals that end an experiment: Ctrl-C, SIGTERM and SIGHUP stop the run and never become a measured row.

Two things can swallow the KeyboardInterrupt that a signal raises. Cleaning up raises an error of its own, which takes
its place (found by :func:`obdlab.errors.interrupt_behind`); or it is raised inside a callback whose caller drops
every exception (a destructor, a C library). So the handler also notes the signal, and the code that is about to turn
an error into a row, or to begin the next cell, asks :func:`check`.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.errors import interrupt_behind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A signal is the whole process's, and so is the note of it.
_seen = threading.Event()


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in here, and note them for :func:`check`.

    A signal that is ignored (``nohup``, a shell's background job) stays ignored. Only the main thread can set
    handlers; in other threads nothing changes.
    """
    _seen.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _interrupt)
        yield
        check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check(error: BaseException | None = None) -> None:
    """Raise KeyboardInterrupt if a signal has come, or if ``error`` took the place of an interrupt.

    Raises the SystemExit instead if that is what ``error`` replaced.
    """
    behind = None if error is None else interrupt_behind(error)
    if behind is not None:
        raise behind
    if _seen.is_set():
        raise KeyboardInterrupt from error


def _interrupt(number: int, frame: FrameType | None) -> None:
    _seen.set()
    raise KeyboardInterrupt
