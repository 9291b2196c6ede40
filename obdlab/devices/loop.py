"""Loop devices: a file as a block device, by ioctl.

See the kernel's ``linux/loop.h`` and ``drivers/block/loop.c``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from obdlab.devices import abi
from obdlab.errors import DeviceError

_CONTROL = "/dev/loop-control"
_SYS_BLOCK = Path("/sys/block")
#: Another process may take the free device between asking for it and configuring it.
_RACE_PAUSE_S = 0.002


def attach(
    file: Path,
    *,
    read_only: bool,
    sector_size: int = abi.SECTOR,
    direct_io: bool = True,
    readahead_kib: int = 128,
    timeout_s: float = 10.0,
) -> Path:
    """Make ``file`` a loop device; return its node, such as ``/dev/loop3``. Raises DeviceError.

    Any number of processes may attach at the same time: a device lost to another one is given up for the next.
    """
    deadline = time.monotonic() + timeout_s
    try:
        backing = os.open(file, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(f"{file}: cannot open for a loop device: {error.strerror}") from error
    try:
        device = _configure_a_free_one(backing, file, read_only, sector_size, direct_io, deadline)
    finally:
        os.close(backing)
    _set_readahead(device, readahead_kib)
    return device


def _configure_a_free_one(
    backing: int, file: Path, read_only: bool, sector_size: int, direct_io: bool, deadline: float
) -> Path:
    config = abi.LoopConfig(fd=backing, block_size=sector_size)
    config.info.lo_flags = (abi.LO_FLAGS_READ_ONLY if read_only else 0) | (abi.LO_FLAGS_DIRECT_IO if direct_io else 0)
    config.info.lo_file_name = os.fsencode(file)[-63:]
    while True:
        device = _free_device()
        try:
            _ioctl_config(device, config, read_only)
        except OSError as error:
            lost_race = error.errno in (errno.EBUSY, errno.ENXIO, errno.ENOENT, errno.EAGAIN)
            if not lost_race or time.monotonic() > deadline:
                raise DeviceError(f"{device}: cannot attach {file}: {error.strerror}") from error
            time.sleep(_RACE_PAUSE_S)
        else:
            return device


def _free_device() -> Path:
    try:
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(f"cannot open {_CONTROL}: {error.strerror}") from error
    try:
        number = fcntl.ioctl(control, abi.LOOP_CTL_GET_FREE)
    except OSError as error:
        raise DeviceError(f"{_CONTROL}: no free loop device: {error.strerror}") from error
    finally:
        os.close(control)
    device = Path(f"/dev/loop{number}")
    if not device.exists():  # a /dev without devtmpfs, as in some containers
        os.mknod(device, 0o60660, os.makedev(abi.LOOP_MAJOR, number))
    return device


def _ioctl_config(device: Path, config: abi.LoopConfig, read_only: bool) -> None:
    fd = os.open(device, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, abi.LOOP_CONFIGURE, config)
    finally:
        os.close(fd)


def _set_readahead(device: Path, readahead_kib: int) -> None:
    try:
        (_SYS_BLOCK / device.name / "queue" / "read_ahead_kb").write_text(str(readahead_kib))
    except OSError:  # a read-only /sys: the kernel's default works too
        pass


def backing_file(device: Path) -> str:
    """Return the path the kernel shows for the device's backing file, or '' if it has none."""
    try:
        return (_SYS_BLOCK / device.name / "loop" / "backing_file").read_text().rstrip("\n")
    except OSError:
        return ""


def devices_of(file: Path) -> list[Path]:
    """Return the loop devices whose backing file is ``file`` (as it was named when attached)."""
    found = []
    for directory in _SYS_BLOCK.glob("loop*"):
        device = Path("/dev") / directory.name
        if backing_file(device) in (str(file), f"{file} (deleted)"):
            found.append(device)
    return sorted(found)


def in_use(device: Path) -> bool:
    """Tell whether a file system of any mount namespace, or another kernel user, holds the device."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        return error.errno == errno.EBUSY
    os.close(fd)
    return False


def detach(device: Path, *, file: Path | None = None, timeout_s: float = 10.0) -> None:
    """Take the loop device away and wait until it is gone. A device without a backing file is fine.

    With ``file`` given, a device that has meanwhile been attached to another file is left alone. Raises DeviceError
    if it stays in use.
    """
    deadline = time.monotonic() + timeout_s

    def ours() -> bool:
        now = backing_file(device)
        return bool(now) and (file is None or now in (str(file), f"{file} (deleted)"))

    while ours():
        try:
            _clear(device)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):
                return
            if error.errno not in (errno.EBUSY, errno.EAGAIN):
                raise DeviceError(f"{device}: cannot detach: {error.strerror}") from error
        if not ours():
            return
        if time.monotonic() > deadline:
            raise DeviceError(f"{device}: still in use {timeout_s:g} s after it was told to detach")
        time.sleep(0.01)


def _clear(device: Path) -> None:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, abi.LOOP_CLR_FD)
    finally:
        os.close(fd)
