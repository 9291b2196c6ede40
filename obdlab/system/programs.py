"""Running other programs: for a block, at whose end they end, or to their own end within a time."""

from __future__ import annotations

import signal
import subprocess
import threading
from contextlib import ExitStack, contextmanager
from typing import IO, TYPE_CHECKING

from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


class ProgramError(ObdlabError):
    """A program cannot be started, failed or took too long. The text is that of the system or of the program."""

    @property
    def last_line(self) -> str:
        """The last line of the text."""
        return str(self).splitlines()[-1]


def run(command: Sequence[str], timeout_s: float, *, stdin: bytes = b"", fine: Sequence[int] = (0,)) -> bytes:
    """Run a program and return its output. Raises ProgramError unless its exit status is one of ``fine``."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramError(str(error)) from error
    if done.returncode not in fine:
        text = (done.stderr.strip() or done.stdout.strip()).decode(errors="replace")
        raise ProgramError(text or f"exit status {done.returncode}")
    return done.stdout


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
