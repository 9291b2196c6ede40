"""SIGINT and SIGTERM as the end of a service that runs until then."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def catch_signals() -> Callable[[], None]:
    """Return a function that waits until SIGINT or SIGTERM has come, counted from now. For the main thread.

    The signals are handled, not blocked and waited for. Threads that libraries have started before would have them
    unblocked, so that the kernel could hand one to such a thread, which ends the process; and child processes would
    inherit the mask. A pipe, which whichever thread gets the signal writes to, because an Event deadlocks if its
    handler runs while the main thread is inside the Event's wait().
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        while not {signal.SIGINT, signal.SIGTERM} & set(os.read(reader, 64)):  # others come here too
            pass

    return wait
