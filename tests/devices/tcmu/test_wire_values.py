"""Numbers that SCSI and the kernel's ring give their meaning: those of the standards and headers."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from obdlab.blob import MemoryBlob
from obdlab.devices.tcmu import ring, scsi, uio
from obdlab.devices.tcmu.disk import ScsiDisk
from obdlab.devices.tcmu.scsi import ScsiError, Sense, Transfer
from obdlab.devices.tcmu.server import _sense_of
from obdlab.errors import DeviceError, OutOfRangeError, SourceError
from tests.devices.blobs import MemoryWritable

MIB = 1 << 20
SERIAL = "0123456789abcdef0123456789abcdef"


def vital_product_data(page: int, blob: MemoryBlob | MemoryWritable | None = None) -> bytes:
    unit = ScsiDisk(blob or MemoryWritable(MIB), serial=SERIAL, description="d")
    return bytes(unit.execute(struct.pack(">BBBHB", 0x12, 1, page, 255, 0), b""))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("TEST_UNIT_READY", 0x00),
        ("READ_6", 0x08),
        ("WRITE_6", 0x0A),
        ("INQUIRY", 0x12),
        ("MODE_SELECT_6", 0x15),
        ("MODE_SENSE_6", 0x1A),
        ("READ_CAPACITY_10", 0x25),
        ("READ_10", 0x28),
        ("WRITE_10", 0x2A),
        ("SYNCHRONIZE_CACHE_10", 0x35),
        ("WRITE_SAME_10", 0x41),
        ("UNMAP", 0x42),
        ("MODE_SELECT_10", 0x55),
        ("MODE_SENSE_10", 0x5A),
        ("READ_16", 0x88),
        ("WRITE_16", 0x8A),
        ("SYNCHRONIZE_CACHE_16", 0x91),
        ("WRITE_SAME_16", 0x93),
        ("SERVICE_ACTION_IN_16", 0x9E),
        ("READ_12", 0xA8),
        ("WRITE_12", 0xAA),
    ],
)
def test_operation_codes(name: str, code: int) -> None:
    assert scsi.Op[name] == code


def test_statuses() -> None:
    assert (scsi.GOOD, scsi.CHECK_CONDITION, scsi.BUSY, scsi.TASK_SET_FULL) == (0x00, 0x02, 0x08, 0x28)


@pytest.mark.parametrize(
    ("sense", "key", "code", "qualifier"),
    [
        (Sense.READ_ERROR, 3, 0x11, 0x00),
        (Sense.WRITE_ERROR, 3, 0x0C, 0x00),
        (Sense.HARDWARE_ERROR, 4, 0x44, 0x00),
        (Sense.LIST_LENGTH, 5, 0x1A, 0x00),
        (Sense.INVALID_COMMAND, 5, 0x20, 0x00),
        (Sense.OUT_OF_RANGE, 5, 0x21, 0x00),
        (Sense.INVALID_CDB, 5, 0x24, 0x00),
        (Sense.INVALID_PARAMETER, 5, 0x26, 0x00),
        (Sense.INCOMPATIBLE_FORMAT, 5, 0x30, 0x05),
        (Sense.CAPACITY_CHANGED, 6, 0x2A, 0x09),
    ],
)
def test_sense_data(sense: Sense, key: int, code: int, qualifier: int) -> None:
    assert sense.to_bytes() == bytes((0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, qualifier, 0, 0, 0, 0))


def test_identification_is_three_designators() -> None:
    vendor = b"LIO-ORG " + SERIAL.encode() + b"\0"
    naa = bytes.fromhex("60014050123456789abcdef012345678")
    wanted = bytes((2, 1, 0, len(vendor))) + vendor + bytes((1, 3, 0, 16)) + naa + bytes((2, 0, 0, 2)) + b"d\0"
    assert vital_product_data(0x83) == bytes((0, 0x83, 0, len(wanted))) + wanted


def test_block_limits() -> None:
    limits = struct.pack(">BB14xIIIIQ20x", 1, 0, 0xFFFFFFFF, 255, 8, 0x80000000, 0xFFFFFFFF)
    assert vital_product_data(0xB0) == b"\0\xb0\0\x3c" + limits
    assert vital_product_data(0xB0, MemoryBlob(bytes(MIB))) == b"\0\xb0\0\x3c\1" + bytes(59)
    assert vital_product_data(0xB1) == b"\0\xb1\0\x3c" + bytes(60)


@pytest.mark.parametrize("writable", [True, False])
def test_mode_pages_byte_by_byte(writable: bool) -> None:
    unit = ScsiDisk(MemoryWritable(MIB) if writable else MemoryBlob(bytes(MIB)), serial=SERIAL, description="d")
    recovery = bytes((0x01, 0x0A)) + bytes(10)
    caching = bytes((0x08, 0x12, 0x04 if writable else 0)) + bytes(17)
    control = bytes((0x0A, 0x0A, 0x02, 0, 0, 0x40, 0, 0, 0xFF, 0xFF, 0, 0))
    pages = recovery + caching + control
    specific = 0x10 if writable else 0x80
    assert unit.execute(bytes((0x1A, 0, 0x3F, 0, 255, 0)), b"") == bytes((3 + len(pages), 0, specific, 0)) + pages
    ten = bytes((0x5A, 0, 0x3F, 0, 0, 0, 0, 0, 255, 0))
    assert unit.execute(ten, b"") == bytes((0, 6 + len(pages), 0, specific, 0, 0, 0, 0)) + pages


def test_only_an_anchor_is_refused_of_unmaps_flags() -> None:
    body = struct.pack(">HHxxxxQIxxxx", 22, 16, 8, 8)
    for flags in (0x00, 0x02, 0xFE):
        assert scsi.unmap_ranges(struct.pack(">BB5xHB", 0x42, flags, len(body), 0), body) == [Transfer(8, 8)]
    with pytest.raises(ScsiError, match="anchored"):
        scsi.unmap_ranges(struct.pack(">BB5xHB", 0x42, 0x01, len(body), 0), body)


def test_an_unmap_has_as_many_ranges_as_its_length_says() -> None:
    ranges = struct.pack(">QIxxxxQIxxxx", 8, 8, 32, 1)

    def unmapped(size: int) -> list[Transfer]:
        body = struct.pack(">HHxxxx", 6 + size, size) + ranges
        return scsi.unmap_ranges(struct.pack(">BB5xHB", 0x42, 0, len(body), 0), body)

    assert unmapped(0) == []
    assert unmapped(16) == [Transfer(8, 8)]
    assert unmapped(32) == [Transfer(8, 8), Transfer(32, 1)]
    for size in (8, 48):  # half a range, and one more than there are
        with pytest.raises(ScsiError, match=f"descriptors of {size} bytes in a list of 40"):
            unmapped(size)


def test_an_error_past_the_end_names_the_blocks() -> None:
    body = struct.pack(">HHxxxxQIxxxx", 22, 16, 2047, 2)
    with pytest.raises(ScsiError, match=r"blocks \[2047, 2049\) past the end \(2048\)") as caught:
        ScsiDisk(MemoryWritable(MIB), serial=SERIAL, description="d").execute(
            struct.pack(">BB5xHB", 0x42, 0, len(body), 0), body
        )
    assert caught.value.sense is Sense.OUT_OF_RANGE


def test_a_read_says_how_long_it_was_by_the_kernels_flag() -> None:
    assert ring.UFLAG_READ_LENGTH == 2  # TCMU_UFLAG_READ_LEN


class Uio:
    """The directory of UIO devices."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, number: int, name: str) -> None:
        (self.root / f"uio{number}" / "maps/map0").mkdir(parents=True)
        (self.root / f"uio{number}" / "name").write_text(name + "\n")
        (self.root / f"uio{number}" / "maps/map0/size").write_text("0x2000\n")


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Uio:
    monkeypatch.setattr(uio, "_SYS_UIO", tmp_path)
    return Uio(tmp_path)


def test_devices_are_found_by_their_backstore(devices: Uio) -> None:
    devices.add(0, "some other driver")
    devices.add(3, "tcm-user/1/dev_a/obdlab/x")
    devices.add(12, "tcm-user/2/dev_b/obdlab/y")
    (devices.root / "uio5").mkdir()  # going
    assert {number: name.device for number, name in uio.devices().items()} == {3: "dev_a", 12: "dev_b"}
    core = Path("/sys/kernel/config/target/core")
    assert uio.number_of(core / "user_2" / "dev_b") == 12
    assert uio.number_of(core / "user_1" / "dev_a") == 3
    with pytest.raises(DeviceError, match="no UIO device"):
        uio.number_of(core / "user_1" / "dev_b")


def test_a_device_is_mapped_as_large_as_it_says(
    devices: Uio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices.add(3, "tcm-user/1/dev_a/obdlab/x")
    (tmp_path / "node").write_bytes(bytes(0x2000))
    opened = os.open
    monkeypatch.setattr(uio, "_make_node", lambda _: None)

    def open_node(path: Path, flags: int, *rest: int) -> int:
        return opened(tmp_path / "node" if path == Path("/dev/uio3") else path, flags, *rest)

    monkeypatch.setattr(os, "open", open_node)
    device = uio.UioDevice.open(3)
    assert len(device.memory) == 0x2000
    device.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(device.descriptor)
    for code, error in ((errno.EBUSY, uio.DeviceBusyError), (errno.EACCES, DeviceError)):

        def refuses(path: Path, flags: int, code: int = code) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "open", refuses)
        with pytest.raises(DeviceError) as caught:
            uio.UioDevice.open(3)
        assert type(caught.value) is error


@pytest.mark.parametrize("room", [0, 512, 4095, 4096, 9000])
def test_a_read_fills_its_buffer_and_no_more(room: int) -> None:
    data = bytes(range(256)) * (MIB // 256)
    unit = ScsiDisk(MemoryBlob(data), serial=SERIAL, description="d")
    assert unit.read(3, 8, room) == data[1536 : 1536 + min(4096, room)]


@pytest.mark.parametrize(
    ("error", "sense", "expected"),
    [
        (ScsiError(Sense.INVALID_CDB, "x"), Sense.INVALID_CDB, True),
        (OutOfRangeError("x"), Sense.OUT_OF_RANGE, True),
        (OSError(errno.EROFS, "x"), Sense.INCOMPATIBLE_FORMAT, True),
        (OSError(errno.EIO, "x"), None, True),
        (SourceError("x"), None, True),
        (ValueError("x"), None, False),
    ],
)
def test_the_sense_of_an_error_and_if_it_is_a_bug(error: Exception, sense: Sense | None, expected: bool) -> None:
    assert _sense_of(error, scsi.read_10(0, 1)) == (sense or Sense.READ_ERROR, expected)
    assert _sense_of(error, struct.pack(">BxIxHx", 0x2A, 0, 1)) == (sense or Sense.WRITE_ERROR, expected)
