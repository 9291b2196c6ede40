"""Whether somebody uses a block device, so that taking it away would break them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from obdlab.devices import loop
from obdlab.devices.mount import mounts_of
from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from pathlib import Path

_TRANSIENT_USE_S = 1.0


# A container being started copies all mounts for a moment and drops them; only longer use is use.
def wait_unused(device: Path) -> None:
    """Return once nobody uses the device. Raises DeviceError, naming the users, if that lasts."""
    deadline = time.monotonic() + _TRANSIENT_USE_S
    while loop.in_use(device):
        if mounts_of(device) or time.monotonic() > deadline:
            raise DeviceError(f"{device}: still in use ({_users(device)})")
        time.sleep(0.02)


def _users(device: Path) -> str:
    found = [f"mounted on {entry.mountpoint}" for entry in mounts_of(device)]
    return ", ".join(found) or "by an overlay or another mount namespace, such as a container's"
