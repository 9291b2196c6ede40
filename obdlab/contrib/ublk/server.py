"""Serves a ublk device: one thread talks to the driver, a crew answers requests.

The driver takes answers only from the thread that fetched the requests. So the driver thread does nothing else: it
hands new requests to the crew and finished ones to the driver, many at a time. The answering crew member itself reads
and writes the data at the character device (user copy).
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import time
from collections import deque
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING

from obdlab.blob import WritableBlob
from obdlab.contrib.ublk import control
from obdlab.contrib.ublk.uring import Ring
from obdlab.devices.crew import Crew, Member
from obdlab.devices.fuse_ops import errno_of

if TYPE_CHECKING:
    from obdlab.blob import Blob
    from obdlab.devices.device import DeviceStatistics

log = logging.getLogger(__name__)

_WAKE = 1 << 32
_OP_MASK = 0xFF
_SECTOR = 512


class UblkServer:
    """Serves ``blob`` over ``device``, the open character device of ``depth`` requests. Writable if the blob is.

    A request that fails is answered with an errno and logged with its cause under ``name``.
    """

    def __init__(
        self, device: int, blob: Blob, *, depth: int, name: str, read_only: bool = False, max_threads: int = 256
    ) -> None:
        self.name = name
        self.last_error = ""
        self._device = device
        self._blob = blob
        self._writable = blob if isinstance(blob, WritableBlob) and not read_only else None
        self._depth = depth
        size = -(-depth * control.IO_DESCRIPTOR.size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._descriptors = mmap.mmap(device, size, prot=mmap.PROT_READ)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._requests: SimpleQueue[int | None] = SimpleQueue()
        self._done: deque[tuple[int, int]] = deque()
        self._crew = Crew(self._turn, limit=max_threads, name="ublk")
        self._fetched = threading.Event()
        self._failure: OSError | None = None
        self._driver = threading.Thread(target=self._drive, name="ublk-driver", daemon=True)

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self._writable is None

    def start(self) -> None:
        """Begin to serve. Returns once all requests are fetched, so that the driver can hand them out.

        Raises OSError if the driver refuses.
        """
        self._crew.start()
        self._driver.start()
        self._fetched.wait()
        if self._failure is not None:
            raise self._failure

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the device was stopped and all is answered. Return False on timeout."""
        if not self._crew.wait(timeout_s):
            return False
        self._driver.join()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
            self._descriptors.close()
        return True

    def statistics(self) -> DeviceStatistics:
        """Return the counters."""
        return self._crew.statistics(self.last_error)

    # The driver thread: submits and completes, until every request was aborted.
    def _drive(self) -> None:
        try:
            ring = Ring(2 * self._depth)
            try:
                self._exchange(ring)
            finally:
                ring.close()
        except OSError as error:
            self._failure = error
            log.error("%s: %s", self.name, error)
        finally:
            self._fetched.set()
            self._requests.put(None)

    def _exchange(self, ring: Ring) -> None:
        fetch = control.operation(control.FETCH, control.IO_COMMAND.size)
        commit = control.operation(control.COMMIT_AND_FETCH, control.IO_COMMAND.size)
        pack, device, done = control.IO_COMMAND.pack, self._device, self._done
        for tag in range(self._depth):
            ring.command(device, fetch, pack(0, tag, 0, 0), tag)
        ring.poll(self._wake, _WAKE)
        alive = self._depth
        ring.submit()
        self._fetched.set()
        while alive:
            ring.enter()
            for tag, result in ring.completions():
                if tag == _WAKE:
                    with suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                    ring.poll(self._wake, _WAKE)
                elif result == 0:
                    self._requests.put(tag)
                else:
                    alive -= 1
                    if result != control.ABORTED:
                        log.error("%s: request %d: %s", self.name, tag, os.strerror(-result))
            while done:
                tag, answer = done.popleft()
                ring.command(device, commit, pack(0, tag, answer, 0), tag)

    # Answers requests while this thread leads; returns False when there will be no more.
    def _turn(self, member: Member) -> bool:
        requests = self._requests
        while True:
            tag = requests.get()
            if tag is None:
                return False
            self._done.append((tag, self._serve(member, tag)))
            if not member.leading:
                os.eventfd_write(self._wake, 1)
                return True
            if requests.empty():
                os.eventfd_write(self._wake, 1)

    def _serve(self, member: Member, tag: int) -> int:
        flags, sectors, first, _ = control.IO_DESCRIPTOR.unpack_from(
            self._descriptors, tag * control.IO_DESCRIPTOR.size
        )
        op, offset, length = flags & _OP_MASK, first * _SECTOR, int(sectors * _SECTOR)
        member.since_ns = started = time.monotonic_ns()
        try:
            if op == control.OP_READ:
                data = self._blob.read_at(offset, length, member.call)
                if len(data) != length:
                    raise RuntimeError(f"read_at returned {len(data)} of {length} bytes")
                os.pwrite(self._device, data, control.DATA_AT + (tag << control.DATA_BITS))
                self._count(member, started, "read", length)
                return length
            return self._change(member, op, offset, length, tag, started)
        except Exception as error:
            return -self._fail(member, op, offset, length, error)
        finally:
            member.since_ns = 0

    def _change(self, member: Member, op: int, offset: int, length: int, tag: int, started: int) -> int:
        blob = self._writable
        if op == control.OP_FLUSH:
            if blob is not None:
                member.call.about_to_wait()
                blob.flush()
            return 0
        if blob is None:
            raise OSError(errno.EROFS, "the device is read-only")
        if op == control.OP_WRITE:
            data = os.pread(self._device, length, control.DATA_AT + (tag << control.DATA_BITS))
            if len(data) != length:
                raise OSError(errno.EIO, f"the driver gave {len(data)} of {length} bytes to write")
            blob.write_at(offset, data, member.call)
            self._count(member, started, "write", length)
            return length
        if op in (control.OP_DISCARD, control.OP_WRITE_ZEROES):
            blob.discard(offset, length, member.call)
            return 0
        raise OSError(errno.EOPNOTSUPP, f"no such request ({op})")

    @staticmethod
    def _count(member: Member, started: int, what: str, length: int) -> None:
        taken = time.monotonic_ns() - started
        member.slowest_ns = max(member.slowest_ns, taken)
        if what == "read":
            member.reads += 1
            member.read_bytes += length
            member.read_ns += taken
            member.read_times[taken.bit_length()] += 1
        else:
            member.writes += 1
            member.written_bytes += length
            member.write_ns += taken
            member.write_times[taken.bit_length()] += 1

    def _fail(self, member: Member, op: int, offset: int, length: int, error: Exception) -> int:
        code, expected = errno_of(error)
        member.errors += 1
        what = {control.OP_READ: "read", control.OP_WRITE: "write"}.get(op, f"ublk request {op}")
        cause = str(error) if expected else f"{type(error).__name__}: {error}"
        self.last_error = f"{what} of {length} bytes at offset {offset}: {cause}"
        log.error("%s: %s", self.name, self.last_error, exc_info=None if expected else error, extra={"cause": error})
        return code
