"""A container that ``ctr run`` started: the times of its start, and its removal."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.lab.testbed.process import LabError, run

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class StartTimes:
    """The moments of a start in Unix time (s): stamps of containerd's events, and the sight of the probe's line."""

    requested_s: float
    container_created_s: float
    task_created_s: float
    task_started_s: float
    ready_s: float

    def phases_s(self) -> dict[str, float]:
        """Return the seconds of each phase: create (container and task), start (its process runs), ready (line).

        containerd stamps the task's start when the runtime reports it; a fast container is ready before that. Then
        "ready" is 0, and "start" ends with the line.
        """
        started_s = min(self.task_started_s, self.ready_s)
        return {
            "create": self.task_created_s - self.requested_s,
            "start": started_s - self.task_created_s,
            "ready": self.ready_s - started_s,
        }


class RunningContainer:
    """A running container, with ``ctr run`` attached to it."""

    times: StartTimes

    @property
    def client_pid(self) -> int:
        """The process ID of ``ctr run``."""
        return self._child.pid

    def __init__(self, ctr: Sequence[str], name: str, child: subprocess.Popen[bytes]) -> None:
        self.name = name
        self._ctr = ctr
        self._child = child
        self._removed = False

    def remove(self, timeout_s: float = 30.0) -> None:
        """Kill the container and remove it with its snapshot. Raises LabError if it does not go away. Idempotent."""
        if self._removed:
            return
        deadline = time.monotonic() + timeout_s
        while self._child.poll() is None and time.monotonic() < deadline:
            # Repeat the kill: a container that is still starting has no task yet.
            with suppress(LabError):
                run([*self._ctr, "tasks", "kill", "--signal", "SIGKILL", "--all", self.name], timeout_s=timeout_s)
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(0.1)
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait(timeout_s)
        if self._child.stdout is not None:
            self._child.stdout.close()
        if self.name in run([*self._ctr, "containers", "list", "-q"]).split():
            remove_container(self._ctr, self.name)
        self._removed = True


def remove_container(ctr: Sequence[str], name: str) -> None:
    """Kill a container's task if it runs and remove it with its snapshot, by the ``ctr`` words. Raises LabError."""
    with suppress(LabError):  # no task: it has ended or never started
        run([*ctr, "tasks", "delete", "--force", name])
    run([*ctr, "containers", "delete", name])
