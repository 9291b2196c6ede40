"""Signals that end an experiment: Ctrl-C, SIGTERM and SIGHUP stop the run and never become a measured row.

The KeyboardInterrupt that a signal raises can get lost in two ways. Cleaning up raises an error that replaces it
(:func:`obdlab.errors.interrupt_behind` finds it); or a callback raises it whose caller drops every exception (a
destructor, a C library). So the handler also notes the signal. Code that is about to turn an error into a row, or to
begin the next cell, calls :func:`check`.
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
# A signal goes to the whole process, so its note is global.
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

    Raises SystemExit instead if ``error`` took the place of one.
    """
    behind = None if error is None else interrupt_behind(error)
    if behind is not None:
        raise behind
    if _seen.is_set():
        raise KeyboardInterrupt from error


def _interrupt(number: int, frame: FrameType | None) -> None:
    _seen.set()
    raise KeyboardInterrupt
