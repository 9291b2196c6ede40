"""Ending the processes of a device the hard way."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from obdlab.system.processes import Process

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.server.client import AttachedDevice


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.01)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: Process.of(pid) is None)


def kill_for_good(device: AttachedDevice) -> None:
    """Kill a device's keeper and its server, before either replaces the other: nothing serves it afterwards."""
    os.kill(device.pid, signal.SIGSTOP)
    kill(device.keeper_pid)
    kill(device.pid)
