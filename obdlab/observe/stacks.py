"""Stacks of all threads of this process, written to its log at a signal.

Not by :mod:`faulthandler`: it walks the stacks of threads while they run, and a process under load crashed in it
within some twenty signals (CPython 3.11). A handler in Python holds the interpreter's lock, so no stack changes while
it reads. The price: a main thread stuck in C code writes nothing.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from typing import TYPE_CHECKING

from obdlab.observe import logs

if TYPE_CHECKING:
    from types import FrameType

#: Signal that makes a process write its stacks.
SIGNAL = signal.SIGUSR2
TITLE = "stacks of all threads, as a signal asked for:"
_MOST_FRAMES = 100
_MOST_THREADS = 1000


def dump_on_signal() -> None:
    """Make SIGUSR2 write the stacks, in this process and in those forked from it. Only for a main thread."""
    signal.signal(SIGNAL, _dump)


def stacks() -> str:
    """Return the stacks of all threads, innermost line first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    frames = sys._current_frames()  # noqa: SLF001 - documented, for this
    for ident, frame in list(frames.items())[:_MOST_THREADS]:
        parts.append(f"thread {names.get(ident, '(not of Python)')} ({ident:#x})")
        parts += _lines(frame)
    return "\n".join(parts)


# Without source lines, since their files may lie on a device that this process serves.
def _lines(frame: FrameType | None) -> list[str]:
    lines: list[str] = []
    while frame is not None and len(lines) < _MOST_FRAMES:
        code = frame.f_code
        lines.append(f"  {code.co_filename}:{frame.f_lineno} in {code.co_qualname}")
        frame = frame.f_back
    return lines if frame is None else [*lines, "  ..."]


# Runs between two instructions of the main thread, which may hold any lock that is not re-entrant.
def _dump(number: int, interrupted: FrameType | None) -> None:
    try:
        record = logging.LogRecord(__name__, logging.INFO, __file__, 0, TITLE, None, None, sinfo=stacks())
        logs.write_at_once(record)
    except Exception:  # the daemon continues after any error here
        pass
