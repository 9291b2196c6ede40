"""A blob as a SCSI disk, at the limits of each command: SPC-4 and SBC-3 say what the answers are."""

from __future__ import annotations

import struct

import pytest

from obdlab.blob import MemoryBlob
from obdlab.call import Call
from obdlab.devices.tcmu import scsi
from obdlab.devices.tcmu.disk import ScsiDisk
from obdlab.devices.tcmu.scsi import ScsiError, Sense, Transfer, Unit
from tests.devices.blobs import MemoryWritable, Short

MIB = 1 << 20
SERIAL = "0123456789abcdef0123456789abcdef"


def disk(blob: MemoryBlob | MemoryWritable | None = None, **options: object) -> ScsiDisk:
    usual = {"serial": SERIAL, "description": "d"}
    return ScsiDisk(blob or MemoryWritable(MIB), **(usual | options))  # type: ignore[arg-type]


def sense_of(unit: ScsiDisk, cdb: bytes, data: bytes = b"") -> Sense | None:
    try:
        unit.write(cdb, data) if cdb[0] in scsi.WRITES else unit.execute(cdb, data)
    except ScsiError as error:
        return error.sense
    return None


@pytest.mark.parametrize(
    ("cdb", "wanted"),
    [
        (struct.pack(">BBIBHB", 0x28, 0x08, 1, 0, 2, 0), Transfer(1, 2, True)),
        (struct.pack(">BBIBHB", 0x28, 0xF7, 1, 0xFF, 2, 0xFF), Transfer(1, 2, False)),
        (struct.pack(">BBIIBB", 0xA8, 0x08, 1, 2, 0, 0), Transfer(1, 2, True)),
        (struct.pack(">BBIIBB", 0xA8, 0xF7, 1, 2, 0xFF, 0xFF), Transfer(1, 2, False)),
        (struct.pack(">BBQIBB", 0x88, 0x08, 1, 2, 0, 0), Transfer(1, 2, True)),
        (struct.pack(">BBQIBB", 0x88, 0xF7, 1, 2, 0xFF, 0xFF), Transfer(1, 2, False)),
        (bytes((0x08, 0xE8, 0, 1, 2, 0)), Transfer(0x080001, 2, False)),  # bits above the address are reserved
        (bytes((0x08, 0, 0, 1, 0, 0)), Transfer(1, 256, False)),
    ],
)
def test_what_a_transfer_names(cdb: bytes, wanted: Transfer) -> None:
    assert scsi.transfer_of(cdb) == wanted


def test_the_command_of_a_read() -> None:
    assert scsi.read_10(0x01020304, 0x0506) == bytes.fromhex("28 00 01020304 00 0506 00")
    assert scsi.transfer_of(scsi.read_10(7, 8)) == Transfer(7, 8)


@pytest.mark.parametrize("room", [0, 1, 4, 36, 37])
def test_answers_to_inquiry_end_with_the_room_for_them(room: int) -> None:
    whole = disk().execute(struct.pack(">BBBHB", 0x12, 1, 0x80, 255, 0), b"")
    assert len(whole) == 37
    assert disk().execute(struct.pack(">BBBHB", 0x12, 1, 0x80, room, 0), b"") == whole[:room]
    assert len(disk().execute(struct.pack(">BBBHB", 0x12, 0, 0, room, 0), b"")) == min(room, 36)


@pytest.mark.parametrize(
    ("serial", "digits"),
    [
        ("0123456789abcdef0123456789abcdef", "0123456789abcdef012345678"),
        ("ABC-12 xyz9", "ABC129" + "0" * 19),
        ("", "0" * 25),
    ],
)
def test_a_serial_becomes_25_digits_of_a_name(serial: str, digits: str) -> None:
    page = disk(serial=serial).execute(struct.pack(">BBBHB", 0x12, 1, 0x83, 255, 0), b"")
    at = 4 + 4 + 8 + len(serial) + 1
    assert page[at : at + 20] == bytes((1, 3, 0, 16)) + bytes.fromhex("6001405" + digits)


def test_a_description_ends_where_its_length_does() -> None:
    page = scsi.inquiry(
        struct.pack(">BBBHB", 0x12, 1, 0x83, 1000, 0), Unit(1, 512, read_only=True, serial="", description="x" * 300)
    )
    assert page.endswith(bytes((2, 0, 0, 252)) + b"x" * 251 + b"\0")


@pytest.mark.parametrize(("block_size", "blocks"), [(512, 8), (4096, 1), (8192, 1)])
def test_discards_are_aligned_to_4096_bytes(block_size: int, blocks: int) -> None:
    limits = disk(block_size=block_size).execute(struct.pack(">BBBHB", 0x12, 1, 0xB0, 64, 0), b"")
    assert struct.unpack_from(">I", limits, 28)[0] == blocks


@pytest.mark.parametrize(
    ("blocks", "last"), [(1, 0), (0xFFFFFFFF, 0xFFFFFFFE), (0x100000000, 0xFFFFFFFF), (0x100000001, 0xFFFFFFFF)]
)
def test_a_last_block_beyond_32_bits_is_told_by_the_longer_command(blocks: int, last: int) -> None:
    unit = Unit(blocks, 4096, read_only=True, serial="", description="")
    assert scsi.read_capacity_10(unit) == struct.pack(">II", last, 4096)
    long = scsi.read_capacity_16(struct.pack(">BBQIBB", 0x9E, 0xF0, 0, 255, 0, 0), unit)
    assert long == struct.pack(">QIBBBB16x", blocks - 1, 4096, 0, 0, 0xC0, 0)
    assert scsi.read_capacity_16(struct.pack(">BBQIBB", 0x9E, 0x10, 0, 12, 0, 0), unit) == long[:12]


def mode_sense(page: int, subpage: int = 0, room: int = 255, *, ten: bool) -> bytes:
    if ten:
        return struct.pack(">BBBBxxxHB", 0x5A, 0, page, subpage, room, 0)
    return bytes((0x1A, 0, page, subpage, room, 0))


@pytest.mark.parametrize("ten", [False, True])
@pytest.mark.parametrize(
    ("page", "subpage", "sense"),
    [
        (0x08, 0x00, None),
        (0x08, 0xFF, Sense.INVALID_CDB),
        (0x08, 0x01, Sense.INVALID_CDB),
        (0x3F, 0x00, None),
        (0x3F, 0xFF, None),
        (0x3F, 0x01, Sense.INVALID_CDB),
        (0x01, 0x00, None),
        (0x0A, 0x00, None),
        (0x00, 0x00, Sense.INVALID_CDB),
        (0x02, 0x00, Sense.INVALID_CDB),
    ],
)
def test_pages_and_subpages(ten: bool, page: int, subpage: int, sense: Sense | None) -> None:
    assert sense_of(disk(), mode_sense(page, subpage, ten=ten)) is sense
    assert sense_of(disk(), mode_sense(page | 0xC0, subpage, ten=ten)) is sense  # saved values are the present ones


@pytest.mark.parametrize(("ten", "header"), [(False, 4), (True, 8)])
def test_a_mode_answer_has_room_for_its_header_at_least(ten: bool, header: int) -> None:
    whole = disk().execute(mode_sense(8, ten=ten), b"")
    assert disk().execute(mode_sense(8, room=header, ten=ten), b"") == whole[:header]
    assert disk().execute(mode_sense(8, room=header + 3, ten=ten), b"") == whole[: header + 3]
    assert sense_of(disk(), mode_sense(8, room=header - 1, ten=ten)) is Sense.INVALID_CDB
    assert sense_of(disk(), mode_sense(8, room=1, ten=ten)) is Sense.INVALID_CDB
    assert disk().execute(mode_sense(8, room=0, ten=ten), b"") == b""


def mode_select(length: int, flags: int = 0x10, *, ten: bool) -> bytes:
    return struct.pack(">BBxxxxxHB", 0x55, flags, length, 0) if ten else bytes((0x15, flags, 0, 0, length, 0))


CACHING = bytes((0x08, 0x12, 0x04)) + bytes(17)
CONTROL = bytes((0x0A, 0x0A, 0x02, 0, 0, 0x40, 0, 0, 0xFF, 0xFF, 0, 0))
RECOVERY = bytes((0x01, 0x0A)) + bytes(10)


@pytest.mark.parametrize(("ten", "header"), [(False, 4), (True, 8)])
@pytest.mark.parametrize(
    ("page", "sense"),
    [
        (CACHING, None),
        (CONTROL, None),
        (RECOVERY, None),
        (bytes((0x88,)) + CACHING[1:], Sense.INVALID_PARAMETER),  # the bit "can be saved" is reserved here
        (CACHING[:-1], Sense.INVALID_PARAMETER),
        (CACHING + b"\0", Sense.INVALID_PARAMETER),
        (CACHING[:2], Sense.INVALID_PARAMETER),
        (CACHING[:1], Sense.LIST_LENGTH),
        (b"", Sense.LIST_LENGTH),
        (b"\x02\x0e" + bytes(14), Sense.INVALID_PARAMETER),
    ],
)
def test_only_present_values_can_be_selected(ten: bool, header: int, page: bytes, sense: Sense | None) -> None:
    data = bytes(header) + page
    assert sense_of(disk(), mode_select(len(data), ten=ten), data) is sense


@pytest.mark.parametrize(("ten", "header"), [(False, 4), (True, 8)])
def test_what_else_a_selection_may_say(ten: bool, header: int) -> None:
    data = bytes(header) + CACHING
    assert sense_of(disk(), mode_select(len(data), ten=ten), data + b"more") is None
    assert sense_of(disk(), mode_select(len(data), ten=ten), data[:-1]) is Sense.LIST_LENGTH
    for flags, sense in ((0x00, Sense.INVALID_CDB), (0x11, Sense.INVALID_CDB), (0x01, Sense.INVALID_CDB)):
        assert sense_of(disk(), mode_select(len(data), flags, ten=ten), data) is sense
        assert sense_of(disk(), mode_select(0, flags, ten=ten)) is sense
    assert sense_of(disk(), mode_select(len(data), 0xFE, ten=ten), data) is None
    descriptor = bytes(header - 1) + b"\x08" + CACHING  # the length of block descriptors
    assert sense_of(disk(), mode_select(len(descriptor), ten=ten), descriptor) is Sense.INVALID_PARAMETER
    other = b"\xff" * (header - 2) + bytes(2) + CACHING  # the rest of the header is not looked at
    assert sense_of(disk(), mode_select(len(other), ten=ten), other) is None


@pytest.mark.parametrize(("length", "sense"), [(511, Sense.INVALID_PARAMETER), (512, Sense.LIST_LENGTH)])
def test_a_selection_is_shorter_than_512_bytes(length: int, sense: Sense) -> None:
    assert sense_of(disk(), mode_select(length, ten=True), bytes(8) + b"\x02" + bytes(600)) is sense


def unmap(count: int, blocks: int = 0, length: int | None = None) -> tuple[bytes, bytes]:
    body = struct.pack(">QIxxxx", 0, blocks) * count
    data = struct.pack(">HHxxxx", 6 + len(body), len(body)) + body
    return struct.pack(">BBxxxxxHB", 0x42, 0, len(data) if length is None else length, 0), data


@pytest.mark.parametrize(("count", "sense"), [(0, None), (1, None), (255, None), (256, Sense.INVALID_PARAMETER)])
def test_an_unmap_has_255_ranges_at_most(count: int, sense: Sense | None) -> None:
    assert sense_of(disk(), *unmap(count)) is sense


@pytest.mark.parametrize(
    ("length", "sense"),
    [(0, None), (1, Sense.LIST_LENGTH), (7, Sense.LIST_LENGTH), (8, Sense.INVALID_PARAMETER), (24, None)],
)
def test_a_list_of_ranges_has_a_header(length: int, sense: Sense | None) -> None:
    assert sense_of(disk(), *unmap(1, length=length)) is sense
    assert sense_of(disk(), *unmap(0, length=min(length, 9))) in (None, Sense.LIST_LENGTH)


@pytest.mark.parametrize(("lba", "blocks", "inside"), [(0, 8, True), (7, 1, True), (8, 0, True), (7, 2, False)])
def test_blocks_end_with_the_unit(lba: int, blocks: int, inside: bool) -> None:
    unit = Unit(8, 512, read_only=True, serial="", description="")
    if inside:
        scsi.check_inside(Transfer(lba, blocks), unit)
        return
    with pytest.raises(ScsiError):
        scsi.check_inside(Transfer(lba, blocks), unit)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_unit_says_what_the_blob_is(read_only: bool) -> None:
    unit = disk(read_only=read_only, block_size=4096).unit
    assert unit == Unit(256, 4096, read_only, SERIAL, "d", write_cache=not read_only)
    assert disk(MemoryBlob(bytes(MIB))).read_only is True


def write(op: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return {
        0x0A: struct.pack(">IBB", op << 24 | lba, blocks, 0),
        0x2A: struct.pack(">BBIBHB", op, flags, lba, 0, blocks, 0),
        0xAA: struct.pack(">BBIIBB", op, flags, lba, blocks, 0, 0),
        0x8A: struct.pack(">BBQIBB", op, flags, lba, blocks, 0, 0),
    }[op]


@pytest.mark.parametrize("op", [0x0A, 0x2A, 0xAA, 0x8A], ids=hex)
def test_a_write_takes_its_blocks_and_leaves_the_rest(op: int) -> None:
    blob = MemoryWritable(8192)
    disk(blob).write(write(op, 3, 2), b"a" * 1024 + b"rest")
    disk(blob).write(write(op, 15, 1), b"z" * 512)
    assert blob.data == bytes(1536) + b"a" * 1024 + bytes(5120) + b"z" * 512
    assert blob.flushes == 0
    assert sense_of(disk(blob), write(op, 15, 2), bytes(1024)) is Sense.OUT_OF_RANGE
    assert sense_of(disk(blob), write(op, 3, 2), bytes(1023)) is Sense.INVALID_CDB
    assert sense_of(disk(MemoryBlob(bytes(8192))), write(op, 3, 2), bytes(1024)) is Sense.INCOMPATIBLE_FORMAT


@pytest.mark.parametrize(("op", "flushes"), [(0x2A, 1), (0xAA, 1), (0x8A, 1)], ids=str)
def test_a_write_to_stable_storage_flushes_and_may_wait(op: int, flushes: int) -> None:
    blob, waits = MemoryWritable(8192), []
    call = Call(on_wait=lambda: waits.append(bytes(blob.data[:1])))
    disk(blob).write(write(op, 0, 1, 0x08), b"x" * 512, call)
    assert (blob.flushes, waits) == (flushes, [b"x"])


def test_a_write_of_no_blocks_writes_nothing() -> None:
    blob = MemoryWritable(8192)
    disk(blob).write(write(0x2A, 16, 0), b"data")
    assert blob.data == bytes(8192)


def test_a_read_of_too_few_bytes_is_a_bug() -> None:
    with pytest.raises(RuntimeError, match="read_at returned 4095 of 4096 bytes"):
        disk(Short(bytes(MIB))).read(0, 8, 4096)


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize("mib", [1, 2.5], ids=str)
def test_one_block_is_written_over_many(block_size: int, mib: float) -> None:
    size = int(mib * MIB)
    blob = MemoryWritable(size + 2 * block_size)
    lengths: list[int] = []
    write_at = blob.write_at
    blob.write_at = lambda offset, data, _: lengths.append(len(data)) or write_at(offset, data)  # type: ignore[method-assign,func-returns-value,return-value]
    block = bytes(range(1, 129)) * (block_size // 128)
    cdb = struct.pack(">BBQIBB", 0x93, 0, 1, size // block_size, 0, 0)
    disk(blob, block_size=block_size).execute(cdb, block + b"rest")
    assert blob.data == bytes(block_size) + block * (size // block_size) + bytes(block_size)
    assert lengths == [MIB] * (size // MIB) + [size % MIB] * bool(size % MIB)


@pytest.mark.parametrize(
    ("flags", "sixteen", "data", "sense"),
    [
        (0x10, True, bytes(512), Sense.INVALID_CDB),  # anchored
        (0x18, False, bytes(512), Sense.INVALID_CDB),
        (0x01, True, b"", None),  # no data comes with it
        (0x09, True, b"", None),
        (0x01, False, b"", Sense.INVALID_CDB),  # reserved in the shorter command
        (0x01, False, bytes(512), None),
        (0x08, True, b"", Sense.INVALID_CDB),
        (0xE6, True, bytes(512), None),
    ],
)
def test_flags_of_a_repeated_block(flags: int, sixteen: bool, data: bytes, sense: Sense | None) -> None:
    blob = MemoryWritable(8192)
    blob.data[:] = b"x" * 8192
    cdb = (
        struct.pack(">BBQIBB", 0x93, flags, 1, 2, 0, 0)
        if sixteen
        else struct.pack(">BBIBHB", 0x41, flags, 1, 0, 2, 0)
    )
    assert sense_of(disk(blob), cdb, data) is sense
    assert blob.data == b"x" * 512 + (b"x" if sense else b"\0") * 1024 + b"x" * 6656


def test_a_flush_may_wait_and_a_read_only_disk_has_none() -> None:
    blob, waits = MemoryWritable(8192), []
    call = Call(on_wait=lambda: waits.append(blob.flushes))
    disk(blob).execute(bytes((0x35, *bytes(9))), b"", call)
    disk(blob, read_only=True).execute(bytes((0x91, *bytes(15))), b"", call)
    assert (blob.flushes, waits) == (1, [0])


def test_a_disk_is_ready_and_has_blocks_of_512_bytes() -> None:
    assert disk().execute(bytes(6), b"") == b""
    assert disk().block_size == 512


def test_an_unknown_command_is_named() -> None:
    with pytest.raises(ScsiError, match=r"no such command \(0xa3\)"):
        disk().execute(bytes((0xA3, *bytes(11))), b"")


@pytest.mark.parametrize(("read_only", "features"), [(True, 0x04), (False, 0xE4)])
def test_provisioning_is_told_without_its_kind(read_only: bool, features: int) -> None:
    page = disk(read_only=read_only).execute(struct.pack(">BBBHB", 0x12, 1, 0xB2, 255, 0), b"")
    assert page == bytes((0, 0xB2, 0, 4, 0, features, 0, 0))


def test_an_unknown_service_action_is_named() -> None:
    with pytest.raises(ScsiError, match=r"SERVICE ACTION IN\(16\): no action 0x13"):
        disk().execute(struct.pack(">BBQIBB", 0x9E, 0xF3, 0, 32, 0, 0), b"")
