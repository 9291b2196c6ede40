"""Running the differ's work in processes of their own: the service stays small, and a hostile layer ends one job.

A request and its answer are JSON objects, on standard input and output. A job is killed when its caller is gone or
its time is over, and ends with this process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from obdlab.errors import ObdlabError, restored
from obdlab.snapshotter.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Seconds for one layer of some GB on a slow disk, with the wait for other layers.
TIMEOUT_S = 3600.0
_MODULE = "obdlab.differ.worker"
_POLL_S = 0.2
_MOST_SHOWN = 500


class JobError(ObdlabError):
    """A job of the differ failed without a cause of its own, was cancelled, or took too long."""


class Jobs:
    """Runs as many jobs at once as there are processors; further callers wait."""

    def __init__(self, most: int = 0) -> None:
        self._free = threading.Semaphore(most or os.cpu_count() or 1)

    def run(self, request: Mapping[str, Any], is_wanted: Callable[[], bool]) -> dict[str, Any]:
        """Run a job and return its answer; ``is_wanted`` is asked several times a second.

        Raises UnsupportedError if the job found a layer that is not the differ's, else the job's error or JobError.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while not self._free.acquire(timeout=_POLL_S):
            _check(is_wanted, deadline)
        try:
            return _run(json.dumps({**request, "parent": os.getpid()}).encode(), is_wanted, deadline)
        finally:
            self._free.release()


def _run(request: bytes, is_wanted: Callable[[], bool], deadline: float) -> dict[str, Any]:
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise JobError(f"cannot start the differ's process ({error})") from error
    with process:
        try:
            output, errors = _finished(process, request, is_wanted, deadline)
        except BaseException:
            process.kill()
            raise
    try:
        answer = json.loads(output)
    except ValueError:
        last = (errors.decode(errors="replace").strip().splitlines() or ["no word"])[-1][:_MOST_SHOWN]
        raise JobError(f"the differ's process ended with status {process.returncode} ({last})") from None
    if "unsupported" in answer:
        raise UnsupportedError(answer["unsupported"])
    if "error" in answer:
        raise restored(answer["error"], answer["text"])
    return dict(answer)


def _finished(
    process: subprocess.Popen[bytes], request: bytes, is_wanted: Callable[[], bool], deadline: float
) -> tuple[bytes, bytes]:
    given: bytes | None = request
    while True:
        try:
            return process.communicate(given, timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            given = None  # the first call goes on writing it
            _check(is_wanted, deadline)


def _check(is_wanted: Callable[[], bool], deadline: float) -> None:
    if not is_wanted():
        raise JobError("the caller has given up")
    if time.monotonic() > deadline:
        raise JobError(f"took longer than {TIMEOUT_S:.0f} s")
