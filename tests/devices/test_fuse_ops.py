"""Answers about the served file, byte for byte as the kernel's fuse.h has them."""

from __future__ import annotations

import stat
import struct

from obdlab.blob import MemoryBlob
from obdlab.devices.fuse_ops import FuseFile
from obdlab.system import abi
from obdlab.system.abi import FuseOpcode
from tests.devices.simulated import request

FILE = FuseFile(MemoryBlob(bytes(9000)), read_only=True)
FOREVER_S = 1 << 30
#: Inode numbers of the directory and of the file.
ROOT, DISK = 1, 2


def answer(opcode: int, body: bytes = b"") -> bytes:
    found = FILE.answer(opcode, memoryview(request(opcode, body)))
    assert isinstance(found, bytes), found
    return found


def listing(offset: int = 0, size: int = 4096) -> list[tuple[int, int, int, bytes]]:
    """Return (inode, position of the next entry, type, name) of each entry."""
    found, rest = [], answer(FuseOpcode.READDIR, abi.FUSE_TRANSFER_IN.pack(0, offset, size, 0, 0, 0, 0))
    assert len(rest) <= size
    while rest:
        inode, position, length, kind = struct.unpack_from("=QQII", rest)
        found.append((inode, position, kind, rest[24 : 24 + length]))
        rest = rest[24 + -(-length // 8) * 8 :]
    return found


def test_the_file_is_found_by_name_and_kept_for_ever() -> None:
    attributes = struct.pack(
        "=QQQQQQIIIIIIIIII", DISK, 9000, 18, 0, 0, 0, 0, 0, 0, stat.S_IFREG | 0o400, 1, 0, 0, 0, 4096, 0
    )
    # Inode, generation; for how long entry and attributes are valid: seconds of each, then nanoseconds of each.
    entry = struct.pack("=QQQQII", DISK, 0, FOREVER_S, FOREVER_S, 0, 0)
    assert answer(FuseOpcode.LOOKUP, b"disk\0") == entry + attributes


def test_the_file_system_is_full_and_has_one_file() -> None:
    # Blocks, free, available; files, free; block size, longest name, fragment size.
    assert answer(FuseOpcode.STATFS) == struct.pack("=QQQQQIII28x", 3, 0, 0, 1, 0, 4096, 255, 4096)


def test_the_listing_goes_on_where_it_stopped() -> None:
    directory, file = stat.S_IFDIR >> 12, stat.S_IFREG >> 12
    whole = [(ROOT, 1, directory, b"."), (ROOT, 2, directory, b".."), (DISK, 3, file, b"disk")]
    assert listing() == whole
    assert listing(size=95) == whole[:2]
    assert listing(offset=2) == whole[2:]
    assert listing(offset=3) == []
