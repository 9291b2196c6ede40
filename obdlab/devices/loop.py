"""Loop devices: a file as a block device, by ioctl.

See the kernel's ``linux/loop.h`` and ``drivers/block/loop.c``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

from obdlab.errors import DeviceError
from obdlab.system import abi
from obdlab.system.attributes import write_attribute

_CONTROL = "/dev/loop-control"
_SYS_BLOCK = Path("/sys/block")
#: Another process may take the free device before this one configures it.
_RACE_PAUSE_S = 0.002


def attach(
    backing: int,
    *,
    label: str,
    read_only: bool,
    sector_size: int = abi.SECTOR,
    direct_io: bool = True,
    readahead_kib: int = 128,
    timeout_s: float = 10.0,
) -> Path:
    """Make an open file a loop device; return its node, such as ``/dev/loop3``. Raises DeviceError.

    :func:`labelled` and :func:`detach` find the device by its ``label`` (63 bytes at most). Any number of processes
    may attach at the same time: a device lost to another process is given up for the next.
    """
    flags = (abi.LO_FLAGS_READ_ONLY if read_only else 0) | (abi.LO_FLAGS_DIRECT_IO if direct_io else 0)
    device, opened = _attach(backing, label, flags, sector_size, timeout_s)
    os.close(opened)
    set_readahead(device, readahead_kib)
    return device


def attach_while_open(
    backing: int, *, label: str, sector_size: int = abi.SECTOR, timeout_s: float = 10.0
) -> tuple[Path, int]:
    """Make an open file a read-only loop device that goes with its last user, so that it cannot be left behind.

    Returns its node, and an open descriptor of it, which counts as a user. Raises DeviceError as :func:`attach`.
    """
    flags = abi.LO_FLAGS_READ_ONLY | abi.LO_FLAGS_DIRECT_IO | abi.LO_FLAGS_AUTOCLEAR
    return _attach(backing, label, flags, sector_size, timeout_s)


def _attach(backing: int, label: str, flags: int, sector_size: int, timeout_s: float) -> tuple[Path, int]:
    deadline = time.monotonic() + timeout_s
    config = abi.LoopConfig(fd=backing, block_size=sector_size)
    config.info.lo_flags = flags
    config.info.lo_file_name = os.fsencode(label)
    while True:
        device = _free_device()
        try:
            return device, _configure(device, config, flags)
        except OSError as error:
            lost_race = error.errno in (errno.EBUSY, errno.ENXIO, errno.ENOENT, errno.EAGAIN)
            if not lost_race or time.monotonic() > deadline:
                raise DeviceError(f"{device}: cannot attach {label}: {error.strerror}") from error
            time.sleep(_RACE_PAUSE_S)


# Gives the kernel's error number, 0 for none.
_CHANGE = """
import fcntl, sys
try:
    fcntl.ioctl(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
except OSError as error:
    print(error.errno)
else:
    print(0)
"""


def change_backing(device: int, backing: int) -> None:
    """Have an open read-only loop device go on with another file of the same size. Raises OSError.

    Reads under way come from the old file; the others wait for them. The kernel takes this for a change of media: it
    shuts a mounted ext4 or xfs down; EROFS goes on, and so does a loop device on top.

    A process of its own makes the call, with these two descriptors alone. The call waits for reads under way, no
    signal ends it, and the caller may be the server that answers those reads: killed meanwhile, it could neither
    answer nor end, its keeper could not replace it, and every reader hung.
    """
    words = [sys.executable, "-I", "-S", "-c", _CHANGE, *map(str, (device, abi.LOOP_CHANGE_FD, backing))]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=(device, backing), cwd="/", check=False
    )
    text = done.stdout.strip()
    code = int(text) if text.isdigit() else errno.EIO
    if code:
        raise OSError(code, os.strerror(code))


def backing_of(device: Path) -> str:
    """Return the path of the file behind a loop device, as the kernel shows it; '' if it is not attached."""
    try:
        return (_SYS_BLOCK / device.name / "loop" / "backing_file").read_text().removesuffix("\n")
    except OSError:
        return ""


def update_size(device: Path) -> None:
    """Have the device take on its backing file's present size. Raises DeviceError."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _label(fd)  # refreshes the file's attributes; older kernels set the capacity from those they know
            fcntl.ioctl(fd, abi.LOOP_SET_CAPACITY)
        finally:
            os.close(fd)
    except OSError as error:
        raise DeviceError(f"{device}: cannot take on the new size: {error.strerror}") from error


def check_size(device: Path, size: int, name: str) -> None:
    """Raise DeviceError if the device is larger than ``size``, that of the blob ``name`` to be put behind it."""
    try:
        present = int((_SYS_BLOCK / device.name / "size").read_text()) * abi.SECTOR
    except OSError as error:
        raise DeviceError(f"{device}: no such device: {error.strerror}") from error
    if present > size:
        raise DeviceError(f"{name}: smaller than its device {device} (got {size} bytes, wanted {present})")


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
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.mknod(device, 0o60660, os.makedev(abi.LOOP_MAJOR, number))
    return device


def _configure(device: Path, config: abi.LoopConfig, flags: int) -> int:
    mode = os.O_RDONLY if flags & abi.LO_FLAGS_READ_ONLY else os.O_RDWR
    fd = os.open(device, mode | os.O_CLOEXEC)
    try:
        if mode == os.O_RDWR:  # `blockdev --setro` by an earlier user outlives the device's detaching
            fcntl.ioctl(fd, abi.BLKROSET, bytes(4))
        fcntl.ioctl(fd, abi.LOOP_CONFIGURE, config)
    except BaseException:
        os.close(fd)
        raise
    return fd


def set_readahead(device: Path, readahead_kib: int) -> None:
    """Set the kernel's readahead of any block device. Where /sys is read-only its default stays."""
    try:
        write_attribute(_SYS_BLOCK / device.name / "queue" / "read_ahead_kb", str(readahead_kib))
    except OSError:
        pass


def label_of(device: Path) -> str:
    """Return the label the device was attached with, or '' if it is not attached."""
    if not (_SYS_BLOCK / device.name / "loop").exists():
        return ""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _label(fd)
        finally:
            os.close(fd)
    except OSError:  # gone meanwhile, or its backing file does not answer: not ours, whose attributes are cached
        return ""


def _label(fd: int) -> str:
    status = abi.LoopInfo64()
    fcntl.ioctl(fd, abi.LOOP_GET_STATUS64, status)
    return os.fsdecode(status.lo_file_name)


def labelled(prefix: str) -> list[Path]:
    """Return the attached devices whose label begins with ``prefix``."""
    nodes = (Path("/dev") / directory.name for directory in _SYS_BLOCK.glob("loop*"))
    return sorted(node for node in nodes if label_of(node).startswith(prefix))


def in_use(device: Path) -> bool:
    """Return True if a file system of any mount namespace, or another kernel user, holds the device."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        return error.errno == errno.EBUSY
    os.close(fd)
    return False


def detach(device: Path, *, label: str, timeout_s: float = 10.0) -> None:
    """Take the loop device of this label away and wait until it is gone.

    Leaves a device alone that is not attached, or that has another label by now. Raises DeviceError if it stays in
    use.
    """
    deadline = time.monotonic() + timeout_s
    while label_of(device) == label:
        try:
            _clear(device, label)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):
                return
            if error.errno not in (errno.EBUSY, errno.EAGAIN):
                raise DeviceError(f"{device}: cannot detach: {error.strerror}") from error
        if label_of(device) != label:
            return
        if time.monotonic() > deadline:
            raise DeviceError(f"{device}: still in use {timeout_s:g} s after it was told to detach")
        time.sleep(0.01)


def detach_when_unused(device: Path, *, label: str) -> None:
    """Have the kernel take the device away when its last user closes it; at once if it has no user."""
    if label_of(device) == label:
        try:
            _clear(device, label)
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.ENOENT):
                raise DeviceError(f"{device}: cannot detach: {error.strerror}") from error


# While the device is open here no other process can take it away and attach another file to it, so the label is still
# right when the device is cleared.
def _clear(device: Path, label: str) -> None:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _label(fd) == label:
            fcntl.ioctl(fd, abi.LOOP_CLR_FD)
    finally:
        os.close(fd)
