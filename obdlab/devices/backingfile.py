"""Replacing the served file below a used device with a local file, so that the kernel goes on without a server.

LOOP_CHANGE_FD has the loop device go on with another file. The kernel takes that for a change of media. EROFS and
readers of the bare device do not mind, but it shuts a mounted ext4 or xfs down. A device made ``exchangeable`` has a
second loop device below it: the ioctl goes to that one, and users of the upper one do not notice. (FUSE_PASSTHROUGH
would need no ioctl on a loop device, but the kernel reads it only when a file is opened, and the loop device has the
served file open from the beginning.)
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices import loop
from obdlab.devices.fuse_loop import devices_of, label_below
from obdlab.errors import DeviceError
from obdlab.system.mount import detect_fs

if TYPE_CHECKING:
    from collections.abc import Iterator

_NODES = "/dev/loop"
_MOST_NESTED = 8


def go_on_with(directory: Path, file: int) -> None:
    """Have the read-only device at ``directory`` go on with an open file of the same size and content.

    The kernel then closes the served file, which ends its server. Raises DeviceError, having changed nothing, if the
    device is missing, its use would not survive the change, or the kernel refuses.
    """
    devices = devices_of(directory)
    if len(devices) != 1:
        raise DeviceError(f"device {directory.name}: no loop device of its own (got {len(devices)}, wanted one)")
    with _told(directory, devices[0]) as opened:
        try:
            loop.change_backing(opened, file)
        except OSError as error:
            raise DeviceError(f"{devices[0]}: the kernel keeps the file behind it: {error.strerror}") from error


def is_behind(file: str, device: Path) -> bool:
    """Return True if the loop device, or the one below it, is backed by this path (even if deleted)."""
    for _ in range(_MOST_NESTED):
        found = loop.backing_of(device)
        if not found.startswith(_NODES):
            return bool(file) and found in (file, f"{file} (deleted)")
        device = Path(found)
    return False


# Opens the loop device to change. While it is open, no use can begin that would not survive the change.
@contextmanager
def _told(directory: Path, device: Path) -> Iterator[int]:
    below = Path(loop.backing_of(device))
    if str(below).startswith(_NODES) and loop.label_of(below) == label_below(directory):
        opened = _open(below)
    else:
        opened = _claimed(device)
    try:
        yield opened
    finally:
        os.close(opened)


# While it is open exclusively, no file system can be mounted from it.
def _claimed(device: Path) -> int:
    if not loop.in_use(device):
        return _open(device, os.O_EXCL)
    kind = detect_fs(device)[0]
    if kind != "erofs":
        raise DeviceError(
            f"{device}: in use, and a mounted {kind} would not survive the change (it does on a device that was "
            "attached with graduation on)"
        )
    return _open(device)


def _open(device: Path, flags: int = 0) -> int:
    try:
        return os.open(device, os.O_RDONLY | os.O_CLOEXEC | flags)
    except OSError as error:
        raise DeviceError(f"{device}: cannot open: {error.strerror}") from error
