"""What the kernel says to a TCMU handler, as bytes: for tests that change them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from obdlab.devices.tcmu import ring
from tests.devices.tcmu.simulated import PAGE, KernelRing, read_10, read_16, write_10

if TYPE_CHECKING:
    from obdlab.devices.tcmu.ring import Command, Iovecs, Read

FAMILY = 30
NAME = "tcm-user/999999999/dev_128/overlaybd//var/config.v1.json"
_CDB_LENGTHS = (6, 10, 10, 24, 16, 12, 16, 16)


def data_of(command: Command | Read) -> Iovecs:
    """Return where a command's data is in the mapping."""
    return (command[3:],) if len(command) == 5 else command[2] or ()


def is_data(memory: bytes | bytearray, begin: int, length: int) -> bool:
    """Tell whether a stretch lies in the data area, behind the ring that the mailbox tells of."""
    _, _, offset, size, _ = ring.MAILBOX.unpack_from(memory)
    return bool(offset + size <= begin and begin + length <= len(memory))


def ring_seeds() -> list[bytes]:
    """Return shared memories in which some commands wait."""
    kernel = KernelRing(ring_size=2 * PAGE, data_pages=16)
    kernel.put(read_10(0, 8), room=4096)
    kernel.put(write_10(8, 8), bytes(4096))
    kernel.entry(ring.OP_TASK_MANAGEMENT, 40)
    kernel.put(read_16(0, 16), room=8192, scattered=True)
    kernel.put(bytes((0x12, 0, 0, 0, 96, 0)), room=96)
    kernel.publish()
    memory = bytes(kernel.memory)
    kernel.close()
    return [memory]


def length_of(command: bytes) -> int:
    """Return how long a CDB that begins so is."""
    return _CDB_LENGTHS[command[0] >> 5] if command else 0


def scsi_seeds() -> list[bytes]:
    """Return commands, each in 16 bytes, and what comes with them."""
    ranges = struct.pack(">HH4xQI4x", 22, 16, 8, 8)
    select = bytes((0, 0, 0, 0, 0x08, 0x12, 0x04, *bytes(17)))
    commands = {
        bytes(6): b"",
        bytes((0x12, 1, 0x83, 0, 255, 0)): b"",
        bytes((0x1A, 0, 0x3F, 0, 255, 0)): b"",
        bytes((0x5A, 0, 0x3F, 0xFF, 0, 0, 0, 1, 0, 0)): b"",
        bytes((0x15, 0x10, 0, 0, 24, 0)): select,
        bytes((0x25, *bytes(9))): b"",
        bytes((0x9E, 0x10, *bytes(8), 0, 0, 0, 32, 0, 0)): b"",
        bytes((0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0)): ranges,
        struct.pack(">BBIBHB", 0x41, 0x08, 8, 0, 8, 0): bytes(512),
        struct.pack(">BBQIBB", 0x93, 0x08, 8, 8, 0, 0): b"pattern!" * 64,
        bytes((0x35, *bytes(9))): b"",
        read_10(0, 8): b"",
        read_16(0, 8): b"",
        write_10(0, 1, 0x08): b"x" * 512,
        bytes((0x0A, 0, 0, 8, 1, 0)): b"x" * 512,
    }
    return [cdb.ljust(16, b"\0") + data for cdb, data in commands.items()]


def attribute(kind: int, content: bytes) -> bytes:
    """Return a netlink attribute."""
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(-len(content) % 4)


def message(command: int, attributes: bytes, family: int = FAMILY) -> bytes:
    """Return a generic netlink message."""
    return struct.pack("=IHHIIBBH", 20 + len(attributes), family, 0, 0, 0, command, 2, 0) + attributes


def event() -> bytes:
    """Return the attributes of an event, all that there are."""
    return (
        attribute(1, NAME.encode() + b"\0") + attribute(2, struct.pack("=I", 3)) + attribute(8, struct.pack("=I", 77))
    )


def event_seeds() -> list[bytes]:
    """Return what comes over the socket at a time."""
    return [message(1, event()), message(2, event()) + message(3, event())]
