"""The part of io_uring that ublk needs: commands to a device (128-byte entries), and a poll as a wake-up.

From ``include/uapi/linux/io_uring.h``. A ring belongs to one thread.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from struct import Struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_SYS_SETUP, _SYS_ENTER = 425, 426
_SETUP_SQE128 = 1 << 10
_FEAT_SINGLE_MMAP = 1
_ENTER_GETEVENTS = 1
_OFF_SQ_RING, _OFF_SQES = 0, 0x10000000
_OP_POLL_ADD, _OP_URING_CMD = 6, 46
_POLLIN = 1
_SQE_SIZE, _COMMAND_AT, _COMMAND_SIZE = 128, 48, 80

#: struct io_uring_params: sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, (12);
#: sq_off: head, tail, ring_mask, ring_entries, flags, dropped, array, (12); cq_off: head, tail, ring_mask,
#: ring_entries, overflow, cqes, (16)
_PARAMS = Struct("=7I12x7I12x6I16x")
#: struct io_uring_sqe, its head: opcode, flags, ioprio, fd, off (or cmd_op), addr, len, poll32_events, user_data
_SQE = Struct("=BBHiQQIIQ")
#: struct io_uring_cqe: user_data, res, flags
_CQE = Struct("=QiI")
_U32 = Struct("=I")

_libc = ctypes.CDLL(None, use_errno=True)


class Ring:
    """A ring with room for ``entries`` commands under way. Raises OSError if the kernel refuses."""

    def __init__(self, entries: int) -> None:
        params = ctypes.create_string_buffer(_PARAMS.size)
        _PARAMS.pack_into(params, 0, 0, 0, _SETUP_SQE128, *(0,) * 17)
        self._fd = _syscall(_SYS_SETUP, entries, ctypes.addressof(params))
        os.set_inheritable(self._fd, False)
        values = _PARAMS.unpack(params.raw)
        sq_entries, cq_entries, features = values[0], values[1], values[5]
        self._sq_head, self._sq_tail, mask_at, _, _, _, array = values[7:14]
        self._cq_head, self._cq_tail, cq_mask_at, _, _, self._cqes = values[14:20]
        if not features & _FEAT_SINGLE_MMAP:
            os.close(self._fd)
            raise OSError(errno.EOPNOTSUPP, "io_uring without a single mapping")
        size = max(array + 4 * sq_entries, self._cqes + _CQE.size * cq_entries)
        self._ring = mmap.mmap(self._fd, size, offset=_OFF_SQ_RING)
        self._entries = mmap.mmap(self._fd, sq_entries * _SQE_SIZE, offset=_OFF_SQES)
        self._mask, self._cq_mask = self._u32(mask_at), self._u32(cq_mask_at)
        for number in range(sq_entries):  # entry n is always in place n
            _U32.pack_into(self._ring, array + 4 * number, number)
        self._unsubmitted = 0

    def close(self) -> None:
        """Close the ring; the kernel cancels commands under way."""
        self._ring.close()
        self._entries.close()
        os.close(self._fd)

    def command(self, fd: int, operation: int, payload: bytes, user_data: int) -> None:
        """Prepare a command to a device (IORING_OP_URING_CMD); :meth:`enter` submits it."""
        at = self._next(_SQE.pack(_OP_URING_CMD, 0, 0, fd, operation, 0, 0, 0, user_data))
        self._entries[at + _COMMAND_AT : at + _COMMAND_AT + _COMMAND_SIZE] = payload.ljust(_COMMAND_SIZE, b"\0")
        self._publish()

    def poll(self, fd: int, user_data: int) -> None:
        """Prepare a single notification for when ``fd`` can be read."""
        at = self._next(_SQE.pack(_OP_POLL_ADD, 0, 0, fd, 0, 0, 0, _POLLIN, user_data))
        self._entries[at + _COMMAND_AT : at + _COMMAND_AT + _COMMAND_SIZE] = bytes(_COMMAND_SIZE)
        self._publish()

    def submit(self) -> None:
        """Submit the prepared entries. Raises OSError."""
        self._enter(0, 0)

    def enter(self) -> None:
        """Submit the prepared entries, and wait for a completion. Raises OSError."""
        self._enter(1, _ENTER_GETEVENTS)

    def _enter(self, least: int, flags: int) -> None:
        while True:
            try:
                self._unsubmitted -= _syscall(_SYS_ENTER, self._fd, self._unsubmitted, least, flags, 0, 0)
            except InterruptedError:
                continue
            if not self._unsubmitted:
                return

    def completions(self) -> Iterator[tuple[int, int]]:
        """Yield the completions: user data and result."""
        head, tail = self._u32(self._cq_head), self._u32(self._cq_tail)
        while head != tail:
            user_data, result, _ = _CQE.unpack_from(self._ring, self._cqes + _CQE.size * (head & self._cq_mask))
            head = head + 1 & 0xFFFFFFFF
            _U32.pack_into(self._ring, self._cq_head, head)
            yield user_data, result

    def _next(self, head: bytes) -> int:
        if self._unsubmitted > self._mask:
            raise OSError(errno.EBUSY, "io_uring: no room for another command")
        at = (self._u32(self._sq_tail) & self._mask) * _SQE_SIZE
        self._entries[at : at + _COMMAND_AT] = head.ljust(_COMMAND_AT, b"\0")
        return at

    def _publish(self) -> None:
        _U32.pack_into(self._ring, self._sq_tail, self._u32(self._sq_tail) + 1 & 0xFFFFFFFF)
        self._unsubmitted += 1

    def _u32(self, at: int) -> int:
        return int(_U32.unpack_from(self._ring, at)[0])


# Variadic: pass every number as wide as a register. ctypes lets other threads run meanwhile.
def _syscall(number: int, *arguments: int) -> int:
    answer: int = _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(each) for each in arguments))
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"io_uring: {os.strerror(code)}")
    return answer
