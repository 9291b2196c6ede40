"""SCSI commands against a blob, without a kernel: what is answered, what is refused and how."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob
from obdlab.devices.tcmu import scsi
from obdlab.devices.tcmu.disk import ScsiDisk
from obdlab.devices.tcmu.scsi import ScsiError, Sense
from obdlab.errors import ObdlabError
from tests.devices.blobs import MemoryWritable

MIB = 1 << 20
SERIAL = "0123456789abcdef0123456789abcdef"


def disk(blob=None, **options) -> ScsiDisk:  # type: ignore[no-untyped-def]
    return ScsiDisk(blob or MemoryWritable(MIB), serial=SERIAL, description="overlaybd//etc/config", **options)


def inquiry(page: int | None = None, room: int = 255) -> bytes:
    return struct.pack(">BBBHB", 0x12, page is not None, page or 0, room, 0)


def refused(unit: ScsiDisk, cdb: bytes, data: bytes = b"") -> Sense:
    with pytest.raises(ScsiError) as caught:
        unit.execute(cdb, data)
    return caught.value.sense


def test_sense_is_fixed_format() -> None:
    data = Sense.OUT_OF_RANGE.to_bytes()
    assert (len(data), data[0], data[2], data[7], data[12:14]) == (18, 0x70, 5, 0x0A, b"\x21\x00")


def test_inquiry_is_the_originals() -> None:
    answer = disk().execute(inquiry(), b"")
    assert answer == b"\0\0\x05\x02\x1f\x08\0\x02LIO-ORG TCMU device     0002"
    assert len(disk().execute(inquiry(room=5), b"")) == 5
    assert refused(disk(), struct.pack(">BBBHB", 0x12, 0, 0x80, 255, 0)) is Sense.INVALID_CDB
    assert refused(disk(), inquiry(0x99)) is Sense.INVALID_CDB


def test_vital_product_data() -> None:
    unit = disk()
    assert unit.execute(inquiry(0), b"") == bytes.fromhex("00000006 0080 83b0 b1b2")
    assert unit.execute(inquiry(0x80), b"") == b"\0\x80\0\x21" + SERIAL.encode() + b"\0"
    identification = unit.execute(inquiry(0x83), b"")
    assert bytes.fromhex("60014050123456789abcdef012345678") in identification
    assert b"overlaybd//etc/config\0" in identification
    assert struct.unpack(">H", identification[2:4])[0] == len(identification) - 4
    limits = unit.execute(inquiry(0xB0), b"")
    assert len(limits) == 64
    assert struct.unpack(">IIII", limits[20:36])[0] > 0  # UNMAP is there, so Linux uses it
    assert unit.execute(inquiry(0xB2), b"")[5] == 0xE4
    read_only = disk(MemoryBlob(bytes(MIB)))
    assert read_only.execute(inquiry(0xB2), b"")[5] == 0x04
    assert not any(read_only.execute(inquiry(0xB0), b"")[20:])


def test_capacity() -> None:
    assert disk().execute(bytes((0x25, *bytes(9))), b"") == struct.pack(">II", 2047, 512)
    long = struct.pack(">BBQIBB", 0x9E, 0x10, 0, 32, 0, 0)
    answer = disk(block_size=4096).execute(long, b"")
    assert (len(answer), answer[:12], answer[14]) == (32, struct.pack(">QI", 255, 4096), 0xC0)
    assert refused(disk(), struct.pack(">BBQIBB", 0x9E, 0x11, 0, 32, 0, 0)) is Sense.INVALID_COMMAND
    huge = scsi.Unit(1 << 33, 512, read_only=True, serial="", description="")
    assert scsi.read_capacity_10(huge)[:4] == b"\xff\xff\xff\xff"


@pytest.mark.parametrize("ten", [False, True])
def test_mode_pages(ten: bool) -> None:
    def sense(page: int, room: int = 255) -> bytes:
        if ten:
            return struct.pack(">BBBBxxxHB", 0x5A, 0, page, 0, room, 0)
        return bytes((0x1A, 0, page, 0, room, 0))

    def select(length: int, flags: int = 0x10) -> bytes:
        return struct.pack(">BBxxxxxHB", 0x55, flags, length, 0) if ten else bytes((0x15, flags, 0, 0, length, 0))

    header = 8 if ten else 4
    unit, read_only = disk(), disk(MemoryBlob(bytes(MIB)))
    everything = unit.execute(sense(0x3F), b"")
    assert len(everything) == header + 12 + 20 + 12
    assert unit.execute(sense(8), b"")[header:][2] == 0x04  # what is written is on the disk only when flushed
    assert read_only.execute(sense(8), b"")[header:][2] == 0
    assert read_only.execute(sense(0x3F), b"")[3 if ten else 2] == 0x80
    assert unit.execute(sense(8, 0), b"") == b""
    assert refused(unit, sense(8, header - 1)) is Sense.INVALID_CDB
    assert refused(unit, sense(0x1C)) is Sense.INVALID_CDB
    caching = bytes(header) + everything[header + 12 : header + 32]
    assert unit.execute(select(len(caching)), caching) == b""
    assert unit.execute(select(0), b"") == b""
    assert refused(unit, select(len(caching), 0x11), caching) is Sense.INVALID_CDB
    assert refused(unit, select(len(caching) + 1), caching) is Sense.LIST_LENGTH
    assert refused(unit, select(header + 1), caching) is Sense.LIST_LENGTH
    changed = caching[: header + 2] + b"\0" + caching[header + 3 :]
    assert refused(unit, select(len(changed)), changed) is Sense.INVALID_PARAMETER


def unmap(*ranges: tuple[int, int]) -> tuple[bytes, bytes]:
    body = b"".join(struct.pack(">QIxxxx", *each) for each in ranges)
    data = struct.pack(">HHxxxx", 6 + len(body), len(body)) + body
    return struct.pack(">BBxxxxxHB", 0x42, 0, len(data), 0), data


def test_unmap() -> None:
    blob = MemoryWritable(MIB)
    blob.data[:] = b"x" * MIB
    unit = disk(blob)
    unit.execute(*unmap((0, 8), (2040, 8), (100, 0)))
    assert blob.data == bytes(4096) + b"x" * (MIB - 8192) + bytes(4096)
    before = bytes(blob.data)
    assert refused(unit, *unmap((16, 8), (2048, 1))) is Sense.OUT_OF_RANGE
    assert blob.data == before
    cdb, data = unmap((0, 8))
    assert refused(unit, cdb, data[:-1]) is Sense.LIST_LENGTH
    assert refused(unit, cdb, data[:2] + b"\0\x11" + data[4:]) is Sense.INVALID_PARAMETER
    assert refused(disk(MemoryBlob(before)), cdb, data) is Sense.INCOMPATIBLE_FORMAT


@pytest.mark.parametrize("sixteen", [False, True])
def test_write_same(sixteen: bool) -> None:
    def command(lba: int, blocks: int, flags: int = 0) -> bytes:
        if sixteen:
            return struct.pack(">BBQIBB", 0x93, flags, lba, blocks, 0, 0)
        return struct.pack(">BBIBHB", 0x41, flags, lba, 0, blocks, 0)

    blob = MemoryWritable(MIB)
    blob.data[:] = b"x" * MIB
    unit, block = disk(blob), b"pattern!" * 64
    unit.execute(command(8, 16), block)
    assert blob.data[4096:12288] == block * 16
    unit.execute(command(8, 8, 0x08), bytes(512))
    assert blob.data[4096:12288] == bytes(4096) + block * 8
    unit.execute(command(0, 8, 0x08), block)  # blocks that are no zeros cannot be unmapped
    assert blob.data[:4096] == block * 8
    assert refused(unit, command(0, 0, 0x08), bytes(512)) is Sense.INVALID_CDB
    assert refused(unit, command(2047, 2), bytes(512)) is Sense.OUT_OF_RANGE
    assert refused(unit, command(0, 1), bytes(511)) is Sense.INVALID_CDB
    assert refused(disk(MemoryBlob(bytes(MIB))), command(0, 1, 8), bytes(512)) is Sense.INCOMPATIBLE_FORMAT
    if sixteen:
        unit.execute(command(0, 8, 0x01), b"")
        assert blob.data[:4096] == bytes(4096)


def test_synchronize_cache() -> None:
    blob = MemoryWritable(MIB)
    assert disk(blob).execute(bytes((0x35, *bytes(9))), b"") == b""
    assert disk(blob).execute(bytes((0x91, *bytes(15))), b"") == b""
    assert blob.flushes == 2
    assert disk(MemoryBlob(bytes(MIB))).execute(bytes((0x35, *bytes(9))), b"") == b""


def test_writes() -> None:
    blob = MemoryWritable(MIB)
    unit = disk(blob)
    unit.write(struct.pack(">BBIBHB", 0x2A, 0, 2, 0, 1, 0), b"a" * 512)
    assert (blob.data[1024:1536], blob.flushes) == (b"a" * 512, 0)
    unit.write(struct.pack(">BBIBHB", 0x2A, 0x08, 2, 0, 1, 0), b"b" * 512)
    assert (blob.data[1024:1536], blob.flushes) == (b"b" * 512, 1)
    for cdb, data, sense in (
        (struct.pack(">BBIBHB", 0x2A, 0, 2047, 0, 2, 0), bytes(1024), Sense.OUT_OF_RANGE),
        (struct.pack(">BBIBHB", 0x2A, 0, 0, 0, 2, 0), bytes(1023), Sense.INVALID_CDB),
    ):
        with pytest.raises(ScsiError) as caught:
            unit.write(cdb, data)
        assert caught.value.sense is sense


@pytest.mark.parametrize(
    ("cdb", "wanted"),
    [
        (bytes.fromhex("08 1fffff 00 00"), (0x1FFFFF, 256)),
        (bytes.fromhex("0a 000007 03 00"), (7, 3)),
        (bytes.fromhex("28 00 01020304 00 0506 00"), (0x01020304, 0x0506)),
        (bytes.fromhex("a8 00 01020304 05060708 00 00"), (0x01020304, 0x05060708)),
        (bytes.fromhex("88 00 0102030405060708 090a0b0c 00 00"), (0x0102030405060708, 0x090A0B0C)),
    ],
)
def test_transfers(cdb: bytes, wanted: tuple[int, int]) -> None:
    assert scsi.transfer_of(cdb)[:2] == wanted


@pytest.mark.parametrize("op", [0x03, 0x1B, 0x5E, 0x89, 0xA3, 0xA4, 0xFF])
def test_other_commands_are_refused(op: int) -> None:
    assert refused(disk(), bytes((op, *bytes(15)))) is Sense.INVALID_COMMAND


_LENGTHS = {0: 6, 1: 10, 2: 10, 3: 24, 4: 16, 5: 12, 6: 16, 7: 16}


@given(st.binary(min_size=24, max_size=24), st.binary(max_size=64), st.booleans())
def test_any_command_is_answered_or_refused(cdb: bytes, data: bytes, writable: bool) -> None:
    cdb = cdb[: _LENGTHS[cdb[0] >> 5]]
    unit = disk(MemoryWritable(65536) if writable else MemoryBlob(bytes(65536)))
    try:
        if cdb[0] in scsi.WRITES:
            unit.write(cdb, data)
        elif cdb[0] in scsi.READS:
            transfer = scsi.transfer_of(cdb)
            assert len(unit.read(transfer.lba, transfer.blocks, 4096)) <= 4096
        else:
            assert len(unit.execute(cdb, data)) <= 512
    except ObdlabError:
        pass
