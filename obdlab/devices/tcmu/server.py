"""Serving one TCMU device: commands from its ring, answered by a SCSI disk.

The kernel hands over a batch of commands with one event (a UIO device's read and poll), and collects answers after a
write to the device. One thread leads, takes a batch and answers it. Before one of its commands waits for a slow
source (:attr:`obdlab.call.Call.on_wait`), another thread takes the lead and with it the rest of the batch.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import time
from collections import deque
from operator import itemgetter
from typing import TYPE_CHECKING

from obdlab.devices.crew import Crew, Member
from obdlab.devices.tcmu import scsi
from obdlab.devices.tcmu.ring import Command, Iovecs, Read, Ring, RingError
from obdlab.devices.tcmu.scsi import ScsiError, Sense
from obdlab.errors import ObdlabError, OutOfRangeError
from obdlab.system.pauses import wait_until

if TYPE_CHECKING:
    from mmap import mmap

    from obdlab.devices.device import DeviceStatistics
    from obdlab.devices.tcmu.disk import ScsiDisk

log = logging.getLogger(__name__)

#: The kernel is notified of finished commands at the latest after this many bytes of data: their users wait.
_NOTIFY_BYTES = 256 << 10
#: A shorter answer is copied in less time than a view of the ring takes.
_INTO_FROM = 16 << 10
_EVENT = bytes(4)
_clock = time.monotonic_ns
_DRAIN_PAUSE_S = 0.01


class TcmuServer:
    """Serves ``disk`` over the ring in ``memory``; ``event`` is the descriptor of the UIO device (non-blocking).

    A failed command is answered with sense data and logged with its cause under ``name``; no other bytes ever replace
    the disk's. At most ``max_threads`` commands wait for slow sources at a time. The caller keeps both open until
    :meth:`wait` has returned True. Raises RingError if the memory holds no ring.
    """

    def __init__(
        self, memory: mmap | bytearray, event: int, disk: ScsiDisk, *, name: str, max_threads: int = 256
    ) -> None:
        self.name = name
        self.last_error = ""
        self._disk = disk
        self._block_size = disk.block_size
        self._memory = memory
        self._ring = Ring(memory)
        self._finish = self._ring.finished.append
        self._event = event
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(event, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._taken: deque[Command | Read] = deque()
        self._unnotified = 0
        self._ending = False
        self._crew = Crew(self._turn, limit=max_threads, name="tcmu")

    def start(self) -> None:
        """Begin to serve."""
        self._crew.start()

    def end(self) -> None:
        """Take no more commands; answer those taken."""
        self._ending = True
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the device is gone or :meth:`end` was called, and all is answered. Return False on timeout."""
        if not self._crew.wait(timeout_s):
            return False
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
        return True

    def drained(self, timeout_s: float) -> bool:
        """Wait until the ring is empty. Return False on timeout."""
        return wait_until(lambda: self._ring.is_empty, timeout_s, look_s=_DRAIN_PAUSE_S)

    def statistics(self) -> DeviceStatistics:
        """Return the counters."""
        return self._crew.statistics(self.last_error)

    # Takes commands while this thread leads; returns False when there will be no more. This loop sets the device's
    # IOPS.
    def _turn(self, member: Member) -> bool:
        taken = self._taken
        try:
            while True:
                try:
                    command = taken.popleft()
                except IndexError:
                    if not self._receive():
                        return False
                    continue
                if len(command) == 5:
                    self._read(member, command)
                else:
                    self._serve(member, command)
                if not member.leading:
                    self._notify()
                    return True
        except RingError as error:
            self.last_error = str(error)
            log.error("%s: %s", self.name, error)
            return False

    # One event may stand for many commands; commands already in the ring send none.
    def _receive(self) -> bool:
        if self._unnotified:
            self._notify()
        self._taken.extend(self._ring.take())
        if self._taken:
            return True
        if self._ending:
            return False
        self._poll.poll()
        try:
            os.read(self._event, 4)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENODEV):  # the device was removed
                log.error("%s: waiting for commands: %s", self.name, error)
            return False
        return True

    def _notify(self) -> None:
        self._unnotified = 0
        self._ring.publish()
        try:
            os.write(self._event, _EVENT)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENODEV):
                log.error("%s: telling the kernel of answers: %s", self.name, error)

    # A read whose buffer differs from the requested length takes the general path.
    def _read(self, member: Member, command: Read) -> None:
        number, lba, blocks, begin, room = command
        block_size = self._block_size
        member.since_ns = started = _clock()
        length = blocks * block_size
        if length != room:
            self._serve(member, (number, scsi.read_10(lba, blocks), ((begin, room),)))
            return
        try:
            if length < _INTO_FROM:
                data = self._disk.blob.read_at(lba * block_size, length, member.call)
                if len(data) != length:
                    raise RuntimeError(f"read_at returned {len(data)} of {length} bytes")
                self._memory[begin : begin + length] = data
            else:
                # Released here: frames of an error would keep them, and the mapping could not be closed.
                with memoryview(self._memory) as ring, ring[begin : begin + length] as out:
                    self._disk.blob.read_into(lba * block_size, out, member.call)
        except Exception as error:
            sense = self._fail(member, scsi.read_10(lba, blocks), error)
            self._ring.complete(number, scsi.CHECK_CONDITION, sense)
        else:
            self._finish(number)
            taken = _clock() - started
            member.reads += 1
            member.read_bytes += length
            member.read_ns += taken
            member.read_times[taken.bit_length()] += 1
            if taken > member.slowest_ns:
                member.slowest_ns = taken
        member.since_ns = 0
        self._unnotified = unnotified = self._unnotified + length + 1
        if unnotified > _NOTIFY_BYTES:
            self._notify()

    def _serve(self, member: Member, command: Command) -> None:
        cmd_id, cdb, iovecs = command
        member.since_ns = started = time.monotonic_ns()
        status, sense, valid = scsi.GOOD, b"", -1
        try:
            if iovecs is None:
                raise ScsiError(Sense.HARDWARE_ERROR, "data outside the shared memory")
            if not cdb:
                raise ScsiError(Sense.INVALID_COMMAND, "a command of unknown length")
            valid = self._other(member, started, cdb, iovecs)
        except Exception as error:
            status, sense = scsi.CHECK_CONDITION, self._fail(member, cdb, error)
        self._ring.complete(cmd_id, status, sense, valid)
        member.since_ns = 0
        self._unnotified += 1
        if self._unnotified > _NOTIFY_BYTES:
            self._notify()

    # Returns the number of bytes answered if the buffer has room for more, else -1.
    def _other(self, member: Member, started: int, cdb: bytes, iovecs: Iovecs) -> int:
        op = cdb[0]
        if op in scsi.READS:
            transfer = scsi.transfer_of(cdb)
            data = self._disk.read(transfer.lba, transfer.blocks, _size_of(iovecs), member.call)
            self._unnotified += len(data)
            self._count_read(member, started, len(data))
        elif op in scsi.WRITES:
            content = self._gather(iovecs)
            self._disk.write(cdb, content, member.call)
            taken = time.monotonic_ns() - started
            member.writes += 1
            member.written_bytes += len(content)
            member.write_ns += taken
            member.write_times[taken.bit_length()] += 1
            member.slowest_ns = max(member.slowest_ns, taken)
            self._unnotified += len(content)
            return -1
        else:
            data = self._disk.execute(cdb, bytes(self._gather(iovecs)), member.call)
        return self._scatter(data, iovecs)

    @staticmethod
    def _count_read(member: Member, started: int, length: int) -> None:
        taken = time.monotonic_ns() - started
        member.reads += 1
        member.read_bytes += length
        member.read_ns += taken
        member.read_times[taken.bit_length()] += 1
        if taken > member.slowest_ns:
            member.slowest_ns = taken

    def _gather(self, iovecs: Iovecs) -> memoryview | bytes:
        whole = memoryview(self._memory)
        if len(iovecs) == 1:
            begin, length = iovecs[0]
            return whole[begin : begin + length]
        return b"".join(whole[begin : begin + length] for begin, length in iovecs)

    # Clear the rest of the buffer: it may hold another command's data.
    def _scatter(self, data: bytes, iovecs: Iovecs) -> int:
        done = 0
        memory = self._memory
        if len(data) == _size_of(iovecs):
            view = memoryview(data)
            for begin, length in iovecs:
                memory[begin : begin + length] = view[done : done + length]
                done += length
            return -1
        for begin, length in iovecs:
            memory[begin : begin + length] = data[done : done + length].ljust(length, b"\0")
            done += length
        return -1 if len(data) >= done else len(data)

    def _fail(self, member: Member, cdb: bytes, error: Exception) -> bytes:
        what = _description(cdb, self._disk)
        sense, expected = _sense_of(error, cdb)
        if isinstance(error, ScsiError) and cdb[:1] not in _TRANSFERS:
            # Initiators probe for pages and commands by asking for them.
            log.info("%s: %s: %s", self.name, what, error)
            return sense.to_bytes()
        member.errors += 1
        cause = str(error) if expected else f"{type(error).__name__}: {error}"
        self.last_error = f"{what}: {cause}"
        log.error("%s: %s", self.name, self.last_error, exc_info=None if expected else error, extra={"cause": error})
        return sense.to_bytes()


def _size_of(iovecs: Iovecs) -> int:
    return sum(map(itemgetter(1), iovecs))


_TRANSFERS = frozenset(bytes((op,)) for op in scsi.READS | scsi.WRITES)


def _description(cdb: bytes, disk: ScsiDisk) -> str:
    if cdb[:1] not in _TRANSFERS:
        return f"SCSI command {cdb.hex(' ') or 'without a CDB'}"
    transfer, size = scsi.transfer_of(cdb), disk.block_size
    what = "read" if cdb[0] in scsi.READS else "write"
    return f"{what} of {transfer.blocks * size} bytes at offset {transfer.lba * size}"


# Returns the sense for an error, and whether the error is an expected one (not a bug).
def _sense_of(error: Exception, cdb: bytes) -> tuple[Sense, bool]:
    if isinstance(error, ScsiError):
        return error.sense, True
    if isinstance(error, OutOfRangeError):
        return Sense.OUT_OF_RANGE, True
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return Sense.INCOMPATIBLE_FORMAT, True
    sense = Sense.READ_ERROR if cdb[0] in scsi.READS else Sense.WRITE_ERROR
    return sense, isinstance(error, ObdlabError | OSError)
