"""A Blob as one file, ``disk``, on a FUSE file system, served by a loop on /dev/fuse without a FUSE library.

A library would call back once per file operation and copy. One file needs about ten request kinds, and a trivial read
served this way runs at twice the rate of the fastest Python binding. The wire is described by the kernel's
``linux/fuse.h``; see ``obdlab.system.abi``.

The file system is mounted nowhere: only the server opens the file, and the file system ends with the last holder of
that file. So no other mount namespace can copy a mount and keep it alive, and no mount can be left behind.

The serving process must not fault in pages of its own mount (mmap): the fault would hold the interpreter lock, which
the answering thread needs. System calls are safe; they release the lock.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
import time
from functools import cache
from typing import TYPE_CHECKING

from obdlab.blob import MemoryBlob, WritableBlob
from obdlab.devices.crew import Crew, Member
from obdlab.devices.device import DeviceStatistics
from obdlab.devices.fuse_ops import DISK_ID, DISK_NAME, MAX_BACKGROUND, FuseFile, errno_of
from obdlab.devices.load import LOOK_EVERY, Load
from obdlab.devices.spinning import Spinning
from obdlab.errors import DeviceError
from obdlab.system import abi

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Blob

log = logging.getLogger(__name__)

__all__ = [
    "DISK_NAME",
    "DeviceStatistics",
    "FuseServer",
    "can_send_again",
    "has_ended",
    "open_connection",
    "send_again",
]

#: The kernel's limit of requests handed out at a time: requests waiting for a source never block the others.
MAX_THREADS = MAX_BACKGROUND
_PROBE_S = 5.0
_READ = int(abi.FuseOpcode.READ)
_WRITE = int(abi.FuseOpcode.WRITE)
_UNANSWERED = frozenset(
    {abi.FuseOpcode.FORGET, abi.FuseOpcode.BATCH_FORGET, abi.FuseOpcode.INTERRUPT}  # the kernel expects no answer
)
#: The kernel withdrew a request while it was handed over or answered: nothing to do.
_WITHDRAWN = (errno.ENOENT, errno.EINTR, errno.EAGAIN)
#: The file system has ended; ECONNABORTED if it ended while a request was being handed over.
_GONE = (errno.ENODEV, errno.ECONNABORTED)


def open_connection() -> int:
    """Open /dev/fuse and return the descriptor, a connection not yet mounted. Raises DeviceError."""
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(f"cannot open /dev/fuse: {error.strerror}") from error


def has_ended(connection: int) -> bool:
    """Return True if the file system of a mounted connection is gone."""
    poller = select.poll()
    poller.register(connection, 0)
    return bool(poller.poll(0))


def send_again(connection: int) -> None:
    """Have the kernel hand out again all requests that were taken and not answered (FUSE_NOTIFY_RESEND).

    The processes that took them must be dead, or the requests safe to answer twice: the first answer counts. Raises
    DeviceError if the kernel is older than 6.9. Does nothing once the file system is gone.
    """
    header = abi.FUSE_OUT_HEADER
    try:
        os.write(connection, header.pack(header.size, abi.FUSE_NOTIFY_RESEND, 0))
    except OSError as error:
        if error.errno not in (*_GONE, errno.EPERM):  # EPERM: never mounted, or gone
            raise DeviceError(f"the kernel does not hand out requests again: {error.strerror}") from error


@cache
def can_send_again() -> bool:
    """Return True if the kernel supports :func:`send_again`, tested by a probe. Raises DeviceError without FUSE.

    The kernel is asked once: forked processes know the answer from their parent.
    """
    probe = FuseServer(MemoryBlob(bytes(abi.SECTOR)), name="probe")
    root = probe.start()
    try:
        os.close(probe.open_disk(root))
    finally:
        os.close(root)
        probe.wait(_PROBE_S)
    return probe.can_send_again


class FuseServer:
    """Serves ``blob`` as a file. Writable if the blob is, unless ``read_only``.

    A failed read is answered with EIO and logged with its cause; no other bytes ever replace the blob's. At most
    ``max_threads`` requests wait for slow sources at a time. ``on_busy`` is called now and then while serving takes
    most of one processor: another process that serves the same connection would help.
    """

    def __init__(
        self,
        blob: Blob,
        *,
        name: str = "",
        read_only: bool = False,
        max_threads: int = MAX_THREADS,
        on_busy: Callable[[], None] | None = None,
    ) -> None:
        self.name = name or blob.name
        self.read_only = read_only or not isinstance(blob, WritableBlob)
        self.last_error = ""
        self._blob = blob
        self._file = FuseFile(blob, read_only=self.read_only)
        self._crew = Crew(self._turn, limit=max_threads, name="fuse")
        self._fd = -1
        self._on_busy = on_busy
        self._load = Load()
        self._spinning = Spinning()

    def start(self, connection: int | None = None) -> int:
        """Begin to serve; return a descriptor of the directory that holds the file.

        ``connection`` comes from the caller's :func:`open_connection` if other processes are to go on with it after
        this one; :meth:`wait` closes it. Serving ends once that directory and every file opened through it are
        closed. Raises DeviceError if the kernel refuses.
        """
        self._fd = open_connection() if connection is None else connection
        options: dict[str, str | None] = {
            "source": "obdlab",
            "subtype": "obdlab",
            "fd": str(self._fd),
            "rootmode": f"{stat.S_IFDIR:o}",
            "user_id": str(os.geteuid()),
            "group_id": str(os.getegid()),
            "allow_other": None,  # the loop device's kernel threads read the file
            "max_read": str(self._file.max_transfer),
        }
        attributes = abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV | abi.MOUNT_ATTR_NOATIME
        if self.read_only:
            options["ro"] = None
            attributes |= abi.MOUNT_ATTR_RDONLY
        try:
            directory = abi.mount_detached("fuse", options, attributes)
        except OSError as error:
            os.close(self._fd)
            raise DeviceError(f"cannot mount FUSE: {error.strerror}") from error
        self._crew.start()
        return directory

    def join(self, connection: int) -> None:
        """Serve a connection that another process started, after that process or beside it."""
        self._fd = connection
        self._file.can_send_again = True  # a connection is joined only where the kernel can send again
        self._crew.start()

    @property
    def can_send_again(self) -> bool:
        """Whether the kernel hands out unanswered requests again; known once the file has been opened."""
        return self._file.can_send_again

    def open_disk(self, directory: int) -> int:
        """Open the served file, given what :meth:`start` returned. Raises DeviceError."""
        flags = os.O_RDONLY if self.read_only else os.O_RDWR
        try:
            return os.open(DISK_NAME, flags | os.O_CLOEXEC, dir_fd=directory)
        except OSError as error:
            raise DeviceError(f"{self.name}: cannot open the served file: {error.strerror}") from error

    def forget_size(self) -> None:
        """Have the kernel ask for the file's size before its next use. Raises DeviceError."""
        header, body = abi.FUSE_OUT_HEADER, abi.FUSE_NOTIFY_INVAL_INODE_OUT
        notice = header.pack(header.size + body.size, abi.FUSE_NOTIFY_INVAL_INODE, 0) + body.pack(DISK_ID, -1, 0)
        try:
            os.write(self._fd, notice)
        except OSError as error:
            raise DeviceError(f"{self.name}: cannot tell the kernel of a new size: {error.strerror}") from error

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until no process holds the file and every request is answered. Return False on timeout."""
        if not self._crew.wait(timeout_s):
            return False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        return True

    def statistics(self) -> DeviceStatistics:
        """Return the counters."""
        return self._crew.statistics(self.last_error)

    # Takes requests while this thread leads; returns False when the file system is gone. Looks names up once: this
    # loop sets the device's IOPS.
    def _turn(self, member: Member) -> bool:
        if not member.buffer:
            # Touch every page: otherwise the kernel faults pages in while it hands a request over, and if the server
            # is killed then, the request fails instead of going to the next server.
            member.buffer = bytearray(b"\0") * self._file.buffer_size
        fd, buffer = self._fd, member.buffer
        buffers = [buffer]
        readv, unpack, clock = os.readv, abi.FUSE_TRANSFER.unpack_from, time.monotonic_ns
        read = self._read
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poll = poller.poll
        left, busy, spin = LOOK_EVERY, 0, 0
        while True:
            left -= 1
            if not left:
                spin = self._look(busy)
                left, busy = LOOK_EVERY, 0
            if spin:
                until = clock() + spin
                while not poll(0) and clock() < until:
                    pass
            try:
                length = readv(fd, buffers)
            except OSError as error:
                if error.errno in _WITHDRAWN:
                    continue
                if error.errno not in _GONE:
                    log.error("%s: reading /dev/fuse: %s", self.name, error)
                return False
            _, opcode, unique, offset, size = unpack(buffer)
            member.since_ns = started = clock()
            if opcode == _READ:
                read(member, unique, offset, size)
                taken = clock() - started
                member.read_ns += taken
                member.read_times[taken.bit_length()] += 1
            elif opcode == _WRITE:
                self._write(member, unique, offset, size)
                taken = clock() - started
                member.write_ns += taken
                member.write_times[taken.bit_length()] += 1
            else:
                self._other(member, opcode, unique, length)
                taken = clock() - started
            member.since_ns = 0
            busy += taken
            if taken > member.slowest_ns:
                member.slowest_ns = taken
            if not member.leading:
                return True

    # Returns how long to spin for each of the next requests before sleeping.
    def _look(self, busy_ns: int) -> int:
        if self._on_busy is not None and self._load.is_high(LOOK_EVERY, busy_ns):
            self._on_busy()
        self._spinning.look(LOOK_EVERY, busy_ns)
        return self._spinning.limit_ns

    def _read(self, member: Member, unique: int, offset: int, size: int) -> None:
        blob = self._blob
        try:
            if offset + size > blob.size:
                offset = min(offset, blob.size)
                size = blob.size - offset
            data = blob.read_at(offset, size, member.call)
            if len(data) != size:
                raise RuntimeError(f"read_at returned {len(data)} of {size} bytes")
        except Exception as error:
            self._fail(member, unique, f"read of {size} bytes at offset {offset}", error)
            return
        member.reads += 1
        member.read_bytes += size
        self._reply(unique, data)

    def _write(self, member: Member, unique: int, offset: int, size: int) -> None:
        start = abi.FUSE_WRITE_DATA
        # If the write waits, the next leader must not receive requests into its data.
        member.needs_buffer = True
        try:
            self._file.write(offset, memoryview(member.buffer)[start : start + size], member.call)
        except Exception as error:
            self._fail(member, unique, f"write of {size} bytes at offset {offset}", error)
            return
        finally:
            member.needs_buffer = False
        member.writes += 1
        member.written_bytes += size
        self._reply(unique, abi.FUSE_WRITE_OUT.pack(size, 0))

    def _other(self, member: Member, opcode: int, unique: int, length: int) -> None:
        if opcode in _UNANSWERED:
            return
        try:
            answer = self._file.answer(opcode, memoryview(member.buffer)[:length], member.call)
        except Exception as error:
            self._fail(member, unique, f"FUSE request {opcode}", error)
            return
        if isinstance(answer, int):
            self._reply_error(unique, answer)
        else:
            self._reply(unique, answer)

    def _fail(self, member: Member, unique: int, what: str, error: Exception) -> None:
        code, expected = errno_of(error)
        member.errors += 1
        cause = str(error) if expected else f"{type(error).__name__}: {error}"
        self.last_error = f"{what}: {cause}"
        log.error("%s: %s", self.name, self.last_error, exc_info=None if expected else error, extra={"cause": error})
        self._reply_error(unique, code)

    def _reply(self, unique: int, data: bytes) -> None:
        header = abi.FUSE_OUT_HEADER
        try:
            os.writev(self._fd, (header.pack(header.size + len(data), 0, unique), data))
        except OSError as error:
            self._unanswerable(error)

    def _reply_error(self, unique: int, code: int) -> None:
        header = abi.FUSE_OUT_HEADER
        try:
            os.write(self._fd, header.pack(header.size, -code, unique))
        except OSError as error:
            self._unanswerable(error)

    def _unanswerable(self, error: OSError) -> None:
        if error.errno not in (*_WITHDRAWN, *_GONE):
            log.error("%s: answering the kernel: %s", self.name, error)
