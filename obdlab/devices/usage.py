"""Detects the users of a block device, which taking it away would break."""

from __future__ import annotations

import os
import time
from pathlib import Path

from obdlab.devices import loop
from obdlab.errors import DeviceError
from obdlab.system.mount import mounts_of

#: A starting container copies all mounts for a moment and drops them; only longer use counts.
TRANSIENT_USE_S = 1.0
#: On a busy machine that moment takes seconds: the patience of callers for which an error costs more than a wait.
STARTS_END_S = 10.0


def wait_unused(device: Path) -> None:
    """Return once the device is unused. Raises DeviceError, naming the users, if it stays in use."""
    deadline = time.monotonic() + TRANSIENT_USE_S
    while loop.in_use(device):
        if mounts_of(device) or time.monotonic() > deadline:
            raise DeviceError(f"{device}: still in use ({_users(device)})")
        time.sleep(0.02)


def _users(device: Path) -> str:
    found = [f"mounted on {entry.mountpoint}" for entry in mounts_of(device)] or _elsewhere(device)
    return ", ".join(found) or "by an overlay or another mount namespace, such as a container's"


def _elsewhere(device: Path) -> list[str]:
    number = os.stat(device).st_rdev
    return namespaces_that_mount(f" {os.major(number)}:{os.minor(number)} ".encode())


def namespaces_that_mount(wanted: bytes) -> list[str]:
    """Return texts naming the other mount namespaces with a mount whose line in mountinfo contains ``wanted``."""
    # One process stands for its mount namespace. The kernel lists no mounts of a namespace without processes.
    seen, found = {os.readlink("/proc/self/ns/mnt")}, []
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            namespace = os.readlink(process / "ns" / "mnt")
            if namespace in seen:
                continue
            seen.add(namespace)
            if wanted in (process / "mountinfo").read_bytes():
                name = (process / "comm").read_text().strip()
                found.append(f"in another mount namespace, that of process {process.name} ({name})")
        except OSError:  # ended meanwhile, or a kernel thread
            continue
    return found
