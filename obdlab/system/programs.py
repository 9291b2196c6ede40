"""Running another program for a while: it ends with the block that runs it, also if a signal interrupts the block."""

from __future__ import annotations

import signal
import subprocess
import threading
from contextlib import ExitStack, contextmanager
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def running(
    command: Sequence[str], *, stdout: int | IO[bytes] | None = None, stderr: int | IO[bytes] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program without input for the block; kill it at the end of the block. Raises OSError if it cannot start.

    A signal that raises KeyboardInterrupt may come at any moment. While the program is started, it is held back:
    inside Popen it would leave a program that no caller knows of.
    """
    with ExitStack() as ending:
        with _held_back():
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
            ending.callback(_end, process)
        yield process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


# Python runs the handlers of signals in the main thread, between any two steps of it. Blocking the signals would not
# do: the kernel gives them to another thread then, and the program would inherit the mask.
@contextmanager
def _held_back() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {}
    try:
        for number in _INTERRUPTS:
            handler = signal.getsignal(number)
            if callable(handler):  # others end the process, or are ignored
                before[number] = handler
                signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in came:
            signal.raise_signal(each)
