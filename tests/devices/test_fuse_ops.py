"""Answers about the served file, byte for byte as the kernel's fuse.h has them."""

from __future__ import annotations

import errno
import stat
import struct

import pytest

from obdlab.blob import MemoryBlob
from obdlab.call import UNBOUND, Call
from obdlab.devices.fuse_ops import FuseFile, errno_of
from obdlab.errors import SourceError
from obdlab.system import abi
from obdlab.system.abi import FuseOpcode
from tests.devices.blobs import MemoryWritable
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


def answer_of(file: FuseFile, opcode: int, body: bytes, call: Call = UNBOUND, node: int = DISK) -> bytes | int:
    return file.answer(opcode, memoryview(request(opcode, body, node=node)), call)


#: Flags of INIT that the server asks for, by bit: asynchronous reads, big writes, asynchronous direct I/O, parallel
#: operations of directories, max_pages, flags2; and in flags2 FUSE_HAS_RESEND.
WANTED = 1 << 0 | 1 << 5 | 1 << 15 | 1 << 18 | 1 << 22 | 1 << 30
RESEND = 1 << 7


def init(file: FuseFile, minor: int, flags: int, flags2: int = 0, major: int = 7) -> bytes | int:
    return answer_of(file, FuseOpcode.INIT, struct.pack("=IIIII44x", major, minor, 131072, flags, flags2), node=0)


def init_answer(minor: int, flags: int, flags2: int, max_write: int) -> bytes:
    """Return what the server answers: versions, readahead, flags, limits."""
    limits = struct.pack("=HHIIHH", 256, 192, max_write, 1, 256, 0)
    return struct.pack("=IIII", 7, minor, 131072, flags) + limits + struct.pack("=I28x", flags2)


@pytest.mark.parametrize(("writable", "max_write"), [(True, 1 << 20), (False, 4096)])
def test_a_new_kernel_gets_all_that_is_wanted_and_no_more(writable: bool, max_write: int) -> None:
    file = FuseFile(MemoryWritable(8192) if writable else MemoryBlob(bytes(8192)), read_only=False)
    assert init(file, 41, 0xFFFFFFFF, 0xFFFFFFFF) == init_answer(36, WANTED, RESEND, max_write)
    assert file.can_send_again
    assert file.buffer_size == max(8192, 80 + max_write)
    assert file.max_transfer == 1 << 20


@pytest.mark.parametrize(
    ("minor", "flags", "flags2", "agreed", "agreed2"),
    [
        (36, WANTED, RESEND, WANTED, RESEND),
        (36, WANTED, 0, WANTED, 0),
        (35, WANTED, RESEND, WANTED, 0),  # flags2 came with 7.36
        (36, WANTED & ~(1 << 30), RESEND, WANTED & ~(1 << 30), 0),
        (28, 1 << 0 | 1 << 3, 0, 1 << 0, 0),
    ],
)
def test_flags_are_those_of_both_sides(minor: int, flags: int, flags2: int, agreed: int, agreed2: int) -> None:
    file = FuseFile(MemoryBlob(bytes(8192)), read_only=True)
    file.can_send_again = not agreed2
    assert init(file, minor, flags, flags2) == init_answer(minor, agreed, agreed2, 4096)
    assert file.can_send_again is bool(agreed2)


@pytest.mark.parametrize(("major", "minor"), [(7, 27), (6, 40), (8, 0), (8, 40)])
def test_a_kernel_of_another_protocol_is_refused(major: int, minor: int) -> None:
    assert init(FuseFile(MemoryBlob(bytes(8192)), read_only=True), minor, WANTED, major=major) == errno.EPROTO


def attributes(file: FuseFile, node: int) -> tuple[int, ...]:
    """Return inode, size, sectors, mode, links and block size, and check that all else is zero."""
    found = answer_of(file, FuseOpcode.GETATTR, bytes(16), node=node)
    assert isinstance(found, bytes)
    valid = struct.unpack_from("=QII", found)
    assert valid == (FOREVER_S, 0, 0)
    values = struct.unpack("=QQQQQQIIIIIIIIII", found[16:])
    assert not any(values[3:9] + values[11:14] + values[15:])
    return (*values[:3], *values[9:11], values[14])


def test_attributes_of_the_directory_and_the_file() -> None:
    read_only, writable = (
        FuseFile(MemoryBlob(bytes(513)), read_only=True),
        FuseFile(MemoryWritable(512), read_only=False),
    )
    assert attributes(read_only, ROOT) == (ROOT, 0, 0, stat.S_IFDIR | 0o500, 2, 4096)
    assert attributes(read_only, DISK) == (DISK, 513, 2, stat.S_IFREG | 0o400, 1, 4096)
    assert attributes(writable, DISK) == (DISK, 512, 1, stat.S_IFREG | 0o600, 1, 4096)
    assert attributes(FuseFile(MemoryWritable(512), read_only=True), DISK)[3] == stat.S_IFREG | 0o400


@pytest.mark.parametrize(("name", "node"), [(b"other\0", ROOT), (b"disk\0", DISK), (b"disk2\0", ROOT), (b"\0", ROOT)])
def test_no_other_file_is_there(name: bytes, node: int) -> None:
    assert answer_of(FILE, FuseOpcode.LOOKUP, name, node=node) == errno.ENOENT


def test_the_size_cannot_be_set_and_times_are_passed_over() -> None:
    size, times = 1 << 3, 1 << 4 | 1 << 5
    assert answer_of(FILE, FuseOpcode.SETATTR, struct.pack("=I84x", size)) == errno.EPERM
    assert answer_of(FILE, FuseOpcode.SETATTR, struct.pack("=I84x", size | times)) == errno.EPERM
    wanted = answer_of(FILE, FuseOpcode.GETATTR, bytes(16))
    assert answer_of(FILE, FuseOpcode.SETATTR, struct.pack("=I84x", times)) == wanted


def test_the_file_is_opened_past_the_page_cache_and_the_directory_as_usual() -> None:
    direct, parallel_writes = 1 << 0, 1 << 6
    assert answer(FuseOpcode.OPEN, bytes(8)) == struct.pack("=QIi", 0, direct | parallel_writes, 0)
    assert answer(FuseOpcode.OPENDIR, bytes(8)) == struct.pack("=QIi", 0, 0, 0)


@pytest.mark.parametrize("opcode", [FuseOpcode.RELEASE, FuseOpcode.RELEASEDIR, FuseOpcode.DESTROY, FuseOpcode.FSYNC])
def test_what_is_over_is_acknowledged(opcode: int) -> None:
    assert answer(opcode, bytes(24)) == b""


@pytest.mark.parametrize("opcode", [5, 6, 8, 9, 22, 39, 46, 4096])
def test_other_requests_are_not_known(opcode: int) -> None:
    assert answer_of(FILE, opcode, bytes(64)) == errno.ENOSYS


def test_a_flush_of_the_file_flushes_the_blob_and_may_wait() -> None:
    blob, waits = MemoryWritable(8192), []
    call = Call(on_wait=lambda: waits.append(blob.flushes))
    assert answer_of(FuseFile(blob, read_only=False), FuseOpcode.FSYNC, bytes(16), call) == b""
    assert answer_of(FuseFile(blob, read_only=True), FuseOpcode.FSYNC, bytes(16), call) == b""
    assert (blob.flushes, waits) == (1, [0])


def allocate(file: FuseFile, offset: int, length: int, mode: int) -> bytes | int:
    return answer_of(file, FuseOpcode.FALLOCATE, struct.pack("=QQQII", 0, offset, length, mode, 0))


@pytest.mark.parametrize("mode", [0x02, 0x03, 0x10, 0x11, 0x12], ids=hex)
def test_holes_and_zeros_become_discards(mode: int) -> None:
    blob = MemoryWritable(8192)
    blob.data[:] = b"x" * 8192
    assert allocate(FuseFile(blob, read_only=False), 512, 1024, mode) == b""
    assert blob.data == b"x" * 512 + bytes(1024) + b"x" * 6656


@pytest.mark.parametrize("mode", [0x00, 0x01, 0x08, 0x0A, 0x20, 0x42], ids=hex)
def test_other_ways_to_allocate_are_refused(mode: int) -> None:
    blob = MemoryWritable(8192)
    blob.data[:] = b"x" * 8192
    assert allocate(FuseFile(blob, read_only=False), 0, 8192, mode) == errno.EOPNOTSUPP
    assert blob.data == b"x" * 8192


def test_a_discard_ends_with_the_blob() -> None:
    blob = MemoryWritable(8192)
    blob.data[:] = b"x" * 8192
    file = FuseFile(blob, read_only=False)
    for offset in (8192, 9000):
        assert allocate(file, offset, 4096, 0x03) == b""
    assert blob.data == b"x" * 8192
    assert allocate(file, 8191, 4096, 0x03) == b""
    assert blob.data == b"x" * 8191 + b"\0"


def test_a_read_only_file_is_not_changed() -> None:
    blob = MemoryWritable(8192)
    file = FuseFile(blob, read_only=True)
    for change in (lambda: allocate(file, 0, 512, 0x03), lambda: file.write(0, memoryview(b"x"))):
        with pytest.raises(OSError, match="the device is read-only") as caught:
            change()
        assert caught.value.errno == errno.EROFS
    assert blob.data == bytes(8192)


def test_a_write_goes_where_it_says() -> None:
    blob = MemoryWritable(8192)
    FuseFile(blob, read_only=False).write(4095, memoryview(b"xyz"))
    assert blob.data == bytes(4095) + b"xyz" + bytes(4094)


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC, True),
        (OSError(errno.EDQUOT, "quota"), errno.EDQUOT, True),
        (OSError(errno.EROFS, "read-only"), errno.EROFS, True),
        (OSError(errno.EOPNOTSUPP, "no"), errno.EOPNOTSUPP, True),
        (OSError(errno.ENOENT, "gone"), errno.EIO, True),
        (SourceError("down"), errno.EIO, True),
        (ValueError("a bug"), errno.EIO, False),
    ],
    ids=repr,
)
def test_errors_that_the_user_can_act_on_keep_their_number(error: Exception, code: int, expected: bool) -> None:
    assert errno_of(error) == (code, expected)
