"""Running the programs of an experiment: with deadlines, the end of their output in errors, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_TAIL_LINES = 15


class LabError(ObdlabError):
    """A program or part of the test bed failed."""


def run(
    arguments: Sequence[str | Path],
    *,
    timeout_s: float = 60.0,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
    input_text: str | None = None,
) -> str:
    """Run a program to its end and return its output. ``environment`` is added to this process's own.

    On timeout, or if this process is interrupted, the program and its children are killed. Raises LabError with the
    last lines of the output if the program cannot be started, fails or takes too long.
    """
    name = " ".join(map(str, arguments[:3]))
    try:
        child = subprocess.Popen(
            [str(argument) for argument in arguments],
            stdin=subprocess.PIPE if input_text is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={**os.environ, **environment} if environment else None,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise LabError(f"{arguments[0]}: cannot be run: {error}") from error
    try:
        output, _ = child.communicate(input_text, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        output = _kill_group(child)
        raise LabError(f"{name}: not done after {timeout_s:g} s\n{tail(output)}") from error
    except BaseException:
        _kill_group(child)
        raise
    if child.returncode != 0:
        raise LabError(f"{name}: exit status {child.returncode}\n{tail(output)}")
    return output


def tail(text: str, lines: int = _TAIL_LINES) -> str:
    """Return the last lines of a program's output, for an error message."""
    kept = [line for line in text.strip().splitlines() if line.strip()][-lines:]
    return "\n".join(f"  | {line}" for line in kept) if kept else "  (no output)"


def _kill_group(child: subprocess.Popen[str]) -> str:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    try:
        output, _ = child.communicate(timeout=10)
    except subprocess.TimeoutExpired:  # a grandchild in its own session keeps the pipe open
        return ""
    return output or ""


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float, poll_s: float = 0.005) -> None:
    """Return once ``condition`` holds. Raises LabError naming ``what`` if it does not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            raise LabError(f"{what}: not after {timeout_s:g} s")
        time.sleep(poll_s)


class Daemon:
    """A background program in its own session, with its output in a log file."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str | Path],
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start the program. Raises LabError if that fails."""
        self.name = name
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            try:
                self._child = subprocess.Popen(
                    [str(argument) for argument in arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment} if environment else None,
                    start_new_session=True,
                    pass_fds=tuple(pass_fds),
                )
            except OSError as error:
                raise LabError(f"{name}: cannot be run: {error}") from error

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._child.pid

    def is_running(self) -> bool:
        """Return True if the program has not ended."""
        return self._child.poll() is None

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
        """Return once ``condition`` holds. Raises LabError with the log's end on timeout, or if the daemon ends."""

        def holds() -> bool:
            if not self.is_running():
                raise LabError(f"{self.name}: ended with status {self._child.returncode}\n{self.log_tail()}")
            return condition()

        try:
            wait_until(holds, f"{self.name}: {what}", timeout_s)
        except LabError as error:
            if self.is_running():
                raise LabError(f"{error}\n{self.log_tail()}") from None
            raise

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        with self.log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 16384))
            return tail(log.read().decode(errors="replace"))

    def stop(self, timeout_s: float = 15.0) -> None:
        """End the program: SIGTERM, then SIGKILL after ``timeout_s``. Idempotent."""
        if self.is_running():
            self._child.terminate()
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait(timeout_s)
