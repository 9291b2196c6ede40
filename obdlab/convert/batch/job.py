"""One image of a list, and its conversion by a process of its own.

So a conversion killed for its memory takes nothing else with it, and a conversion is stopped in the same way as a
user would stop it. The process reads its job from standard input, which stays open as long as the result is wanted,
and writes its outcome as one line of JSON.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: Length field before the job.
LENGTH_BYTES = 8
_LOOK_S = 0.2
# Time for a stopped conversion to clean up.
_END_S = 30.0
_MOST_SAID = 64 << 10
_MOST_TOLD = 2000


@dataclass(frozen=True, slots=True)
class Pair:
    """One image of a list: its source, and the destination of the converted image."""

    source: str
    destination: str


@dataclass(frozen=True, slots=True)
class Job:
    """Input of a conversion process: a Python module to run, and its standard input."""

    module: str
    payload: bytes
    #: Seconds until it is stopped.
    timeout_s: float = 7200.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one conversion. Sizes in bytes; for an index, the sum of all images."""

    digest: str = ""
    layers: int = 0
    source_size: int = 0
    size: int = 0
    seconds: float = 0.0
    host: str = ""
    #: The reason of a failure, else empty.
    error: str = ""
    #: True if another try may succeed.
    temporary: bool = False
    #: Name of the blob that the error concerns, with which its text begins; empty for other errors.
    blob: str = ""

    def to_line(self) -> bytes:
        """Return the line that a conversion process writes."""
        return json.dumps(asdict(self)).encode() + b"\n"


def run_job(job: Job, stopped: Callable[[], bool]) -> Outcome:
    """Run a conversion process until it ends, ``stopped`` is true or its time is over. Raises nothing but bugs."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        try:
            # A session of its own, since an interrupt from the terminal is for the process that runs the list.
            process = subprocess.Popen(
                [sys.executable, "-m", job.module],
                stdin=subprocess.PIPE, stdout=said, stderr=errors, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return _failed(begin, f"cannot start a conversion process: {error.strerror}", temporary=True)
        with process:
            why = _follow(process, job, begin + job.timeout_s, stopped)
        if why:
            return _failed(begin, why, temporary=True)
        return _outcome(process.returncode, said, errors, begin)


def _follow(process: subprocess.Popen[bytes], job: Job, deadline: float, stopped: Callable[[], bool]) -> str:
    # Waits until the process ends. Returns the reason if it had to be stopped.
    assert process.stdin is not None
    why = ""
    try:
        try:
            process.stdin.write(len(job.payload).to_bytes(LENGTH_BYTES, "big") + job.payload)
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended at once, and reports why
        while not why:
            try:
                process.wait(_LOOK_S)
                return ""
            except subprocess.TimeoutExpired:
                if stopped():
                    why = "stopped"
                elif time.monotonic() > deadline:
                    why = f"not done in {job.timeout_s:.0f} s"
        return why
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.close()
    except BrokenPipeError:
        pass
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _outcome(status: int, said: IO[bytes], errors: IO[bytes], begin: float) -> Outcome:
    said.seek(0)
    line = said.read(_MOST_SAID)
    try:
        return Outcome(**{**json.loads(line), "host": socket.gethostname(), "seconds": time.monotonic() - begin})
    except (ValueError, TypeError):
        pass
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
        return _failed(begin, f"the conversion process was killed ({name})", temporary=True)
    errors.seek(max(0, errors.seek(0, 2) - _MOST_TOLD))
    last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    return _failed(begin, f"the conversion process ended with status {status}: {' '.join(last)}", temporary=False)


def _failed(begin: float, error: str, *, temporary: bool) -> Outcome:
    seconds = time.monotonic() - begin
    return Outcome(error=error, temporary=temporary, host=socket.gethostname(), seconds=seconds)
