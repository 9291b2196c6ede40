"""Freezing a mounted file system, so that the device below it holds one consistent state."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# linux/fs.h
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878


@contextmanager
def frozen(mountpoint: Path) -> Iterator[None]:
    """Write a file system's changes to its device and hold writers back, for the block. Raises DeviceError.

    One that another program has frozen is left to that program.
    """
    try:
        descriptor = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(f"{mountpoint}: cannot be frozen ({error.strerror})") from error
    try:
        mine = True
        try:
            fcntl.ioctl(descriptor, _FIFREEZE, 0)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise DeviceError(f"{mountpoint}: cannot be frozen ({error.strerror})") from error
            mine = False
        try:
            yield
        finally:
            if mine:
                fcntl.ioctl(descriptor, _FITHAW, 0)
    finally:
        os.close(descriptor)


def thaw(mountpoint: Path) -> bool:
    """Thaw what a killed process left frozen. Return False if it was not frozen. Raises OSError."""
    descriptor = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _FITHAW, 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    finally:
        os.close(descriptor)
    return True
