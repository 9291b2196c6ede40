"""The command ring that the kernel shares with a TCMU handler: mailbox version 2, entries in, completions out.

Layout of ``include/uapi/linux/target_core_user.h``; behaviour of ``Documentation/target/tcmu-design.rst``. All in the
machine's byte order. This module makes no system call: any writable buffer will do for memory.
"""

from __future__ import annotations

import threading
from collections import deque
from operator import add
from struct import Struct, unpack_from
from typing import TYPE_CHECKING

from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from mmap import mmap

VERSION = 2
FLAG_OUT_OF_ORDER = 1
FLAG_READ_LENGTH = 2

OP_PAD, OP_COMMAND, OP_TASK_MANAGEMENT = 0, 1, 2
_OP_MASK = 7
_LENGTH_MASK = 0xFFFFFFF8
UFLAG_UNKNOWN_OP = 1
UFLAG_READ_LENGTH = 2

#: struct tcmu_mailbox, its head: version, flags, cmdr_off, cmdr_size, cmd_head
MAILBOX = Struct("=HHIII")
HEAD_AT = 12
TAIL_AT = 64
MAILBOX_SIZE = 128
#: struct tcmu_cmd_entry up to its first iovec: len_op, cmd_id, (kflags), (uflags), iov_cnt, (iov_bidi_cnt,
#: iov_dif_cnt), cdb_off, (two reserved numbers), and that iovec: offset from the start of the mapping, length
ENTRY = Struct("=IHxxI12xQ16xQQ")
_UFLAGS_AT = 7
IOVECS_AT = 48
IOVEC = Struct("=QQ")
#: Offset of the CDB in an entry with one iovec, as the kernel lays it out.
_ONE_IOVEC = IOVECS_AT + IOVEC.size
#: Length of the smallest command entry: the response, with its 96 bytes of sense, overlays the request.
ENTRY_LEAST = 112
READ_LENGTH_AT = 12
SENSE_AT = 16
SENSE_SIZE = 96
#: Group of the operation code (its upper three bits) to the command's length; groups left out have no standard
#: length.
_CDB_LENGTHS = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}
_VARIABLE_LENGTH = 0x7F
_CDB_MOST = 16

_READ_10 = 0x28
#: READ(10): operation code, first block, number of blocks.
_CDB_READ_10 = Struct(">BxIxH")

_U32 = Struct("=I")
#: Part of an entry, from its number on: cmd_id, kflags, uflags, scsi_status
_ANSWER = Struct("=HBBB")
#: The same for a command that succeeded: all zeros but its number.
_GOOD = Struct("=H3x")


class RingError(DeviceError, code="ring"):
    """The shared memory does not hold the kernel's structures: nothing in it can be trusted any more."""


Iovecs = tuple[tuple[int, int], ...]
#: One SCSI command: its number; its CDB, empty if it lies outside the mapping or its length is unknown; (offset,
#: length) in the mapping of its data, or None if some of it lies outside the data area. A bare tuple, for speed.
Command = tuple[int, bytes, Iovecs | None]
#: A READ(10) with its data in one piece, by far the most common command, decoded at once: number, first logical
#: block, number of blocks, (offset, length) in the mapping. The tuple's length distinguishes it from a Command.
Read = tuple[int, int, int, int, int]


class Ring:
    """The ring in ``memory``. One thread at a time takes commands; any thread may complete them, in any order.

    Raises RingError if the mailbox is malformed, or if the kernel wants completions in order.
    """

    def __init__(self, memory: mmap | bytearray) -> None:
        self.memory = memory
        self._size = len(memory)
        if self._size < MAILBOX_SIZE:
            raise RingError(f"a mapping too small for a mailbox (got {self._size} bytes, wanted {MAILBOX_SIZE})")
        version, flags, self._offset, self._length, _ = MAILBOX.unpack_from(memory)
        if version != VERSION:
            raise RingError(f"mailbox version (got {version}, wanted {VERSION})")
        if not flags & FLAG_OUT_OF_ORDER:
            raise RingError(f"the kernel wants completions in order (mailbox flags {flags:#x})")
        self._data = self._offset + self._length
        if self._offset < MAILBOX_SIZE or not self._length or self._length % 8 or self._data > self._size:
            raise RingError(f"ring outside the mapping (got [{self._offset}, {self._data}), mapping {self._size})")
        self._read_length = bool(flags & FLAG_READ_LENGTH)
        self._lock = threading.Lock()
        #: Places of the entries whose commands were taken and not answered.
        self._places: deque[int] = deque()
        #: Append here the numbers of commands that succeeded with all of their data valid; :meth:`publish` puts the
        #: answers into the ring.
        self.finished: deque[int] = deque()
        #: Position of the next command to take; the kernel's tail, in the mailbox, follows with the completions.
        self._taken = self._position(TAIL_AT)

    @property
    def is_empty(self) -> bool:
        """Whether the kernel waits for no answer."""
        return bool(_U32.unpack_from(self.memory, HEAD_AT) == _U32.unpack_from(self.memory, TAIL_AT))

    def take(self) -> list[Command | Read]:
        """Return the commands added since the last call. Raises RingError."""
        memory, position, unpack, unpack_read = self.memory, self._taken, ENTRY.unpack_from, _CDB_READ_10.unpack_from
        offset, ring_length, data, size = self._offset, self._length, self._data, self._size
        head = self._position(HEAD_AT)
        commands: list[Command | Read] = []
        places = []
        left = (head - position) % ring_length
        while left:
            at = offset + position
            try:
                length_op, cmd_id, iovecs, cdb, first, first_length = unpack(memory, at)
            except Exception as error:
                raise RingError(f"an entry at {position} that reaches out of the mapping") from error
            length, op = length_op & _LENGTH_MASK, length_op & _OP_MASK
            left -= length
            if not length or left < 0 or length > ring_length - position:
                raise RingError(
                    f"an entry at {position} of {length} bytes, in a ring of {ring_length}, filled up to {head}"
                )
            if op == OP_COMMAND:
                if length < ENTRY_LEAST:
                    raise RingError(f"a command at {position} of {length} bytes (wanted {ENTRY_LEAST} at least)")
                if iovecs == 1 and data <= first and first + first_length <= size:
                    code, lba, blocks = unpack_read(memory, cdb) if cdb == at + _ONE_IOVEC else (0, 0, 0)
                    if code == _READ_10:
                        commands.append((cmd_id, lba, blocks, first, first_length))
                    else:
                        commands.append((cmd_id, self._cdb(cdb), ((first, first_length),)))
                else:
                    commands.append((cmd_id, self._cdb(cdb), self._iovecs(at, length, iovecs)))
                places.append(position)
            elif op not in (OP_PAD, OP_TASK_MANAGEMENT):
                memory[at + _UFLAGS_AT] |= UFLAG_UNKNOWN_OP
            position += length
            if position == ring_length:
                position = 0
        if position != self._taken:
            with self._lock:
                self._taken = position
                self._places.extend(places)
                if not self._places:
                    _U32.pack_into(memory, TAIL_AT, position)
        return commands

    def publish(self) -> None:
        """Answer the commands in :attr:`finished`. Raises as :meth:`complete`."""
        memory, places, finished = self.memory, self._places, self.finished
        if not finished:
            return
        offset, pack = self._offset + 4, _GOOD.pack_into
        with self._lock:
            while finished:
                cmd_id = finished.popleft()
                if not places:
                    raise RingError(f"an answer to command {cmd_id}, but none is outstanding")
                pack(memory, offset + places.popleft(), cmd_id)
            _U32.pack_into(memory, TAIL_AT, places[0] if places else self._taken)

    def complete(self, cmd_id: int, status: int, sense: bytes = b"", read_length: int = -1) -> None:
        """Answer one command; the kernel sees it at its next notification. ``read_length``: valid bytes of the data.

        The answer goes into the oldest outstanding entry, even another command's: the kernel goes by the number.
        Raises RingError if no command is outstanding.
        """
        memory, places = self.memory, self._places
        uflags = UFLAG_READ_LENGTH if read_length >= 0 and self._read_length else 0
        with self._lock:
            if not places:
                raise RingError(f"an answer to command {cmd_id}, but none is outstanding")
            at = self._offset + places.popleft()
            _ANSWER.pack_into(memory, at + 4, cmd_id, 0, uflags, status)
            if sense:
                memory[at + SENSE_AT : at + SENSE_AT + SENSE_SIZE] = sense.ljust(SENSE_SIZE, b"\0")
            if uflags:
                _U32.pack_into(memory, at + READ_LENGTH_AT, read_length)
            # Last: the kernel may look at any time. (x86 keeps the order of stores; Python has no barrier.) Padding
            # and task management between two commands need no answer.
            _U32.pack_into(memory, TAIL_AT, places[0] if places else self._taken)

    def _position(self, at: int) -> int:
        position = int(_U32.unpack_from(self.memory, at)[0])
        if position >= self._length or position % 8:
            raise RingError(
                f"a position outside the ring (got {position}, wanted a multiple of 8 below {self._length})"
            )
        return position

    def _iovecs(self, at: int, length: int, count: int) -> Iovecs | None:
        if count > (length - IOVECS_AT) // IOVEC.size:
            return None
        # Many at once: a request of 128 KiB may come with 32.
        numbers = unpack_from(f"={2 * count}Q", self.memory, at + IOVECS_AT)
        begins, sizes = numbers[::2], numbers[1::2]
        if count and (min(begins) < self._data or max(map(add, begins, sizes)) > self._size):
            return None
        return tuple(zip(begins, sizes, strict=True))

    def _cdb(self, at: int) -> bytes:
        cdb = bytes(self.memory[at : at + _CDB_MOST])
        if len(cdb) < _CDB_MOST:
            return b""
        if cdb[0] == _VARIABLE_LENGTH:
            return bytes(self.memory[at : at + 8 + cdb[7]])
        return cdb[: _CDB_LENGTHS.get(cdb[0] >> 5, 0)]
