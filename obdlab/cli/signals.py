"""SIGINT and SIGTERM as the end of a service that runs until then."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def catch_signals() -> Callable[[], None]:
    """Return a function that waits until SIGINT or SIGTERM has come after this call. For the main thread.

    The signals are handled, not blocked and waited for: threads that libraries started earlier would not block them,
    so that the kernel could deliver one to such a thread and end the process; and child processes would inherit the
    mask. The handler writes to a pipe: an Event deadlocks if a handler runs while the main thread is in its wait().
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        while not {signal.SIGINT, signal.SIGTERM} & set(os.read(reader, 64)):  # other signals write here too
            pass

    return wait
