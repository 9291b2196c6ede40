"""Making ublk devices, starting and stopping them: commands to /dev/ublk-control (``linux/ublk_cmd.h``)."""

from __future__ import annotations

import ctypes
import errno
import os
from struct import Struct

from obdlab.contrib.ublk.uring import Ring
from obdlab.errors import DeviceError

CONTROL = "/dev/ublk-control"

# Numbers of _IOWR('u', n, struct ublksrv_ctrl_cmd).
ADD, DELETE, START, STOP, SET_PARAMS, START_RECOVERY, END_RECOVERY = 0x04, 0x05, 0x06, 0x07, 0x08, 0x10, 0x11
INFO, DELETE_ASYNC = 0x02, 0x14
FETCH, COMMIT_AND_FETCH = 0x20, 0x21

F_USER_RECOVERY, F_USER_RECOVERY_REISSUE, F_USER_COPY = 1 << 3, 1 << 4, 1 << 7
ATTR_READ_ONLY, ATTR_VOLATILE_CACHE = 1, 4
PARAM_BASIC, PARAM_DISCARD = 1, 2
OP_READ, OP_WRITE, OP_FLUSH, OP_DISCARD, OP_WRITE_ZEROES = 0, 1, 2, 3, 5
#: Start of the data of (queue 0's) requests in the character device, and each request's share as a power of two.
DATA_AT, DATA_BITS = 0x80000000, 25
ABORTED = -errno.ENODEV

#: struct ublksrv_ctrl_cmd: dev_id, queue_id, len, addr, data, dev_path_len, pad, reserved
_CONTROL_COMMAND = Struct("=IHHQQHHI")
#: struct ublksrv_ctrl_dev_info: nr_hw_queues, queue_depth, state, pad, max_io_buf_bytes, dev_id, ublksrv_pid, pad,
#: flags, ublksrv_flags, owner_uid, owner_gid, (16 reserved)
_INFO = Struct("=HHHHIIiIQQII16x")
#: struct ublk_params: len, types; basic: attrs, logical_bs_shift, physical_bs_shift, io_opt_shift, io_min_shift,
#: max_sectors, chunk_sectors, dev_sectors, virt_boundary_mask; discard: alignment, granularity, max_discard_sectors,
#: max_write_zeroes_sectors, max_discard_segments, reserved
_PARAMS = Struct("=II IBBBBIIQQ IIIIHH")
#: struct ublksrv_io_cmd: q_id, tag, result, addr
IO_COMMAND = Struct("=HHiQ")
#: struct ublksrv_io_desc: op_flags, nr_sectors, start_sector, addr
IO_DESCRIPTOR = Struct("=IIQQ")
_NO_QUEUE = 0xFFFF
_ANY_ID = 0xFFFFFFFF


def operation(number: int, size: int) -> int:
    """Return a command's ioctl number: ``size`` bytes, read and written except for two read-only commands."""
    direction = 2 if number in (INFO, DELETE_ASYNC) else 3
    return direction << 30 | size << 16 | ord("u") << 8 | number


def add(*, depth: int, max_bytes: int, mark: int) -> int:
    """Make a device with one queue; return its number. The driver keeps the 64-bit ``mark``. Raises DeviceError."""
    flags = F_USER_RECOVERY | F_USER_RECOVERY_REISSUE | F_USER_COPY
    info = ctypes.create_string_buffer(
        _INFO.pack(1, depth, 0, 0, max_bytes, _ANY_ID, 0, 0, flags, mark, 0, 0), _INFO.size
    )
    _control(ADD, _ANY_ID, buffer=info)
    values = _INFO.unpack(info.raw)
    number = int(values[5])
    if values[8] & flags != flags:
        delete(number)
        raise DeviceError(f"{CONTROL}: this kernel's ublk lacks user copy or recovery (Linux 6.4 has both)")
    return number


def mark_of(number: int) -> int:
    """Return the mark that a device was made with. Raises DeviceError, also if the device is missing."""
    info = ctypes.create_string_buffer(_INFO.size)
    _control(INFO, number, buffer=info)
    return int(_INFO.unpack(info.raw)[9])


def set_params(number: int, *, size: int, sector_size: int, max_bytes: int, read_only: bool) -> None:
    """Set the device's size and properties. Raises DeviceError."""
    shift, sectors = sector_size.bit_length() - 1, 0 if read_only else 0xFFFFFFFF // 4096 * 8
    params = _PARAMS.pack(
        _PARAMS.size, PARAM_BASIC | (0 if read_only else PARAM_DISCARD),
        ATTR_READ_ONLY if read_only else ATTR_VOLATILE_CACHE, shift, 12, 12, shift, max_bytes >> 9, 0, size >> 9, 0,
        0, sector_size, sectors, sectors, 1, 0,
    )  # fmt: skip
    _control(SET_PARAMS, number, buffer=ctypes.create_string_buffer(params, len(params)))


def start(number: int) -> None:
    """Make the block device, once its server has fetched its requests. Raises DeviceError."""
    _control(START, number, data=os.getpid())


def start_recovery(number: int) -> None:
    """Announce another server for a device whose server died. Raises DeviceError."""
    _control(START_RECOVERY, number)


def end_recovery(number: int) -> None:
    """Announce that the new server has fetched; the driver hands out requests under way again. Raises DeviceError."""
    _control(END_RECOVERY, number, data=os.getpid())


def stop(number: int) -> None:
    """Take the block device away; the driver aborts its server's requests. Raises DeviceError."""
    _control(STOP, number)


def delete(number: int) -> None:
    """Remove a device; it goes once its server has closed it. Raises DeviceError."""
    try:
        _control(DELETE_ASYNC, number)
    except UblkError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        _control(DELETE, number)  # before Linux 6.9: waits for the server


def _control(number: int, device: int, *, buffer: ctypes.Array[ctypes.c_char] | None = None, data: int = 0) -> None:
    try:
        fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(f"cannot open {CONTROL}: {error.strerror}") from error
    try:
        ring = Ring(2)
        try:
            size, address = (len(buffer), ctypes.addressof(buffer)) if buffer is not None else (0, 0)
            payload = _CONTROL_COMMAND.pack(device, _NO_QUEUE, size, address, data, 0, 0, 0)
            ring.command(fd, operation(number, _CONTROL_COMMAND.size), payload, 0)
            ring.enter()
            ((_, result),) = ring.completions()
        finally:
            ring.close()
    except OSError as error:
        raise DeviceError(f"{CONTROL}: command {number:#x}: {error.strerror}") from error
    finally:
        os.close(fd)
    if result < 0:
        raise UblkError(number, device, -result)


class UblkError(DeviceError, code="ublk"):
    """The driver refused a command; ``errno`` says why."""

    def __init__(self, number: int, device: int, code: int) -> None:
        self.errno = code
        super().__init__(f"ublk device {device}: command {number:#x}: {os.strerror(code)}")
