"""Waiting for a container to be ready, by a line of its output.

The probe executes nothing in the container and does not poll it, so it costs no snapshotter anything.
"""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING

from obdlab.lab.testbed.process import LabError, tail

if TYPE_CHECKING:
    from obdlab.lab.images.recipe import Probe

_CHUNK = 65536
_KEPT = 64 << 10


class ContainerEndedError(LabError):
    """The container ended before it was ready."""


def wait_for_line(descriptor: int, probe: Probe, what: str) -> float:
    """Read a container's output until a line holds the probe's text; return the time of that line (Unix time).

    Raises ContainerEndedError if the output ends before that, LabError after the probe's ``timeout_s``; both with the
    last lines of the output.
    """
    wanted = probe.ready_line.encode()
    deadline = time.monotonic() + probe.timeout_s
    output = b""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    while (left_s := deadline - time.monotonic()) > 0:
        if not poller.poll(left_s * 1000):
            break
        chunk = os.read(descriptor, _CHUNK)
        seen_s = time.time()
        if not chunk:
            raise ContainerEndedError(f"{what}: ended before it was ready\n{tail(_text(output))}")
        # The text may arrive in pieces; it counts once its line is finished.
        output = output[-_KEPT:] + chunk
        if any(wanted in line for line in output.split(b"\n")[:-1]):
            return seen_s
    raise LabError(f"{what}: not ready after {probe.timeout_s:g} s\n{tail(_text(output))}")


def _text(output: bytes) -> str:
    return output.decode(errors="replace")
