"""Helpers for a single-threaded process that forks: forking, leaving the child, polling for signals."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable


def fork_to(run: Callable[[], None]) -> int:
    """Fork; the child runs ``run`` and ends, the parent gets its process number. Raises OSError."""
    pid = os.fork()
    if pid == 0:
        become(run)
    return pid


def become(run: Callable[[], None]) -> NoReturn:
    """In a forked child: call ``run`` and end the process; with status 1 if ``run`` raised."""
    status = 1
    try:
        run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        leave(status)


def leave(status: int) -> NoReturn:
    """End a forked child without the exit handlers of its parent's imports."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Signals:
    """Makes signals pollable: no signal interrupts this process in the middle of other work.

    A handler that logs, for example, could wait for a lock that the interrupted line holds.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when signals have come."""
        return self._reader

    def come(self) -> set[int]:
        """Return the signals that have come since the last call."""
        try:
            return set(os.read(self._reader, 4096))
        except BlockingIOError:
            return set()

    def forget(self) -> None:
        """In a forked child: stop listening. The signals' handlers still do nothing."""
        signal.set_wakeup_fd(-1)
        os.close(self._reader)
        os.close(self._writer)
