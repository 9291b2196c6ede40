"""The kernel's side of a TCMU ring, in plain memory: what target_core_user.c does with mailbox, entries and data."""

from __future__ import annotations

import heapq
import mmap
import os
import select
import socket
import struct
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.devices.tcmu import ring
from obdlab.devices.tcmu.disk import ScsiDisk
from obdlab.devices.tcmu.server import TcmuServer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.blob import Blob

PAGE = 4096


@dataclass
class Answer:
    """How a command was answered; ``data`` is all there was room for."""

    status: int
    sense: tuple[int, int] | None
    data: bytes
    read_length: int | None


class KernelRing:
    """A ring of ``ring_size`` bytes behind the mailbox, and ``data_pages`` pages of data."""

    def __init__(self, ring_size: int = 64 << 10, data_pages: int = 512) -> None:
        self.offset, self.ring_size = ring.MAILBOX_SIZE, ring_size
        self.data = -(-(self.offset + ring_size) // PAGE) * PAGE
        self.memory = mmap.mmap(-1, self.data + data_pages * PAGE)
        ring.MAILBOX.pack_into(self.memory, 0, ring.VERSION, ring.FLAG_OUT_OF_ORDER | 2, self.offset, ring_size, 0)
        # The kernel's ring begins behind the mailbox and ends where the data does: in these there is a gap.
        self.free = [self.data + PAGE * n for n in range(data_pages)]  # a heap: the lowest is given out first
        self.head = self.cleaned = 0
        self.next_id = 1
        self.outstanding: dict[int, tuple[list[tuple[int, int]], bool]] = {}
        self.kernel, user = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        user.setblocking(False)
        self.event = user.detach()

    def close(self) -> None:
        self.kernel.close()
        os.close(self.event)

    def entry(self, op: int, length: int) -> int:
        """Make room for an entry, padding at the end of the ring; return where it is."""
        if self.head + length > self.ring_size:
            struct.pack_into("=I", self.memory, self.offset + self.head, (self.ring_size - self.head) | ring.OP_PAD)
            self.head = 0
        at = self.offset + self.head
        self.memory[at : at + length] = bytes(length)
        struct.pack_into("=I", self.memory, at, length | op)
        self.head = (self.head + length) % self.ring_size
        return at

    def put(
        self,
        cdb: bytes,
        data: bytes = b"",
        room: int = 0,
        *,
        scattered: bool = False,
        iovecs: Sequence[tuple[int, int]] | None = None,
        cdb_at: int | None = None,
    ) -> int:
        """Place a command with data out or room for data in; return its number. :meth:`publish` hands it over."""
        size = len(data) or room
        pages = [heapq.heappop(self.free) for _ in range(-(-size // PAGE))]
        pieces = [(page, min(PAGE, size - PAGE * n)) for n, page in enumerate(pages)]
        if not scattered:
            pieces = _merged(pieces)
        done = 0
        for begin, length in pieces:
            self.memory[begin : begin + length] = data[done : done + length].ljust(length, b"\xee")
            done += length
        shown = pieces if iovecs is None else list(iovecs)
        fixed = ring.IOVECS_AT + 16 * len(shown)
        length = max(ring.ENTRY_LEAST, fixed + -(-len(cdb) // 8) * 8)
        at = self.entry(ring.OP_COMMAND, length)
        cmd_id = self.next_id
        self.next_id = self.next_id % 65534 + 1
        struct.pack_into("=H", self.memory, at + 4, cmd_id)
        struct.pack_into("=IIIxxxxQ", self.memory, at + 8, len(shown), 0, 0, at + fixed if cdb_at is None else cdb_at)
        for n, piece in enumerate(shown):
            struct.pack_into("=QQ", self.memory, at + ring.IOVECS_AT + 16 * n, *piece)
        self.memory[at + fixed : at + fixed + len(cdb)] = cdb
        self.outstanding[cmd_id] = (pieces, bool(room))
        return cmd_id

    def publish(self) -> None:
        struct.pack_into("=I", self.memory, ring.HEAD_AT, self.head)
        self.kernel.send(b"\1\0\0\0")

    def forget_events(self) -> None:
        """Take what was sent either way off the sockets."""
        for descriptor in (self.kernel.fileno(), self.event):
            while select.select([descriptor], [], [], 0)[0]:
                os.read(descriptor, 4)

    def answers(self) -> dict[int, Answer]:
        """Collect what was answered since the last call, as the kernel does when it is told to look."""
        found = {}
        (tail,) = struct.unpack_from("=I", self.memory, ring.TAIL_AT)
        while self.cleaned != tail:
            at = self.offset + self.cleaned
            length_op, cmd_id, _, uflags = struct.unpack_from("=IHBB", self.memory, at)
            self.cleaned = (self.cleaned + (length_op & ~7)) % self.ring_size
            if length_op & 7 != ring.OP_COMMAND:
                continue
            pieces, wants_data = self.outstanding.pop(cmd_id)  # KeyError: the kernel would call the ring broken
            content = b"".join(self.memory[begin : begin + length] for begin, length in pieces)
            for begin, length in pieces:
                for n in range(-(-length // PAGE)):
                    heapq.heappush(self.free, begin + PAGE * n)
            status, sense = self.memory[at + 8], self.memory[at + 16 : at + 16 + 18]
            short = struct.unpack_from("=I", self.memory, at + 12)[0] if uflags & ring.UFLAG_READ_LENGTH else None
            code = (sense[2], sense[12] << 8 | sense[13]) if status == 2 else None
            found[cmd_id] = Answer(status, code, content if wants_data else b"", short)
        return found

    def wait(self, numbers: Sequence[int], timeout_s: float = 30.0) -> dict[int, Answer]:
        """Wait for the answers to these commands."""
        found: dict[int, Answer] = {}
        deadline = time.monotonic() + timeout_s
        while not set(numbers) <= found.keys():
            assert select.select([self.kernel], [], [], max(0, deadline - time.monotonic()))[0], "no answer in time"
            self.kernel.recv(4)
            found |= self.answers()
        return found

    def do(self, cdb: bytes, data: bytes = b"", room: int = 0, **options: object) -> Answer:
        """Have one command done."""
        number = self.put(cdb, data, room, **options)  # type: ignore[arg-type]
        self.publish()
        return self.wait([number])[number]


def _merged(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, length in pieces:
        if merged and sum(merged[-1]) == begin:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((begin, length))
    return merged


@contextmanager
def served(blob: Blob, **options: object) -> Iterator[tuple[KernelRing, TcmuServer]]:
    """Serve a blob on a simulated ring; at the end nothing may be left unanswered."""
    kernel = KernelRing()
    disk = ScsiDisk(blob, serial="0123456789abcdef", description="overlaybd//config", **options)  # type: ignore[arg-type]
    server = TcmuServer(kernel.memory, kernel.event, disk, name="simulated")
    server.start()
    try:
        yield kernel, server
    finally:
        server.end()
        assert server.wait(30)
        kernel.close()


def read_10(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, lba, 0, blocks, 0)


def write_10(lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIBHB", 0x2A, flags, lba, 0, blocks, 0)


def read_16(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBQIBB", 0x88, 0, lba, blocks, 0, 0)
