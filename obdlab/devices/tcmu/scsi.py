"""The part of SCSI that a disk needs: decodes commands, builds inquiry and mode pages and sense data. Pure code.

SPC-4 (inquiry, mode pages, sense), SBC-3 (block commands, block limits, provisioning). The device describes itself as
overlaybd-tcmu does, except for the features which that claims and does not implement.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from struct import Struct
from typing import NamedTuple

from obdlab.errors import ObdlabError

GOOD, CHECK_CONDITION, BUSY, TASK_SET_FULL = 0x00, 0x02, 0x08, 0x28

#: Most logical blocks of one UNMAP, and most ranges in it.
UNMAP_MOST_BLOCKS = 0xFFFFFFFF
UNMAP_MOST_RANGES = 255
WRITE_SAME_MOST_BLOCKS = 0xFFFFFFFF
#: Smaller or unaligned discards free no space.
UNMAP_GRANULARITY = 4096


class Op(IntEnum):
    """Operation codes."""

    TEST_UNIT_READY = 0x00
    READ_6 = 0x08
    WRITE_6 = 0x0A
    INQUIRY = 0x12
    MODE_SELECT_6 = 0x15
    MODE_SENSE_6 = 0x1A
    READ_CAPACITY_10 = 0x25
    READ_10 = 0x28
    WRITE_10 = 0x2A
    SYNCHRONIZE_CACHE_10 = 0x35
    WRITE_SAME_10 = 0x41
    UNMAP = 0x42
    MODE_SELECT_10 = 0x55
    MODE_SENSE_10 = 0x5A
    READ_16 = 0x88
    WRITE_16 = 0x8A
    SYNCHRONIZE_CACHE_16 = 0x91
    WRITE_SAME_16 = 0x93
    SERVICE_ACTION_IN_16 = 0x9E
    READ_12 = 0xA8
    WRITE_12 = 0xAA


READ_CAPACITY_16 = 0x10
READS = frozenset({Op.READ_6, Op.READ_10, Op.READ_12, Op.READ_16})
WRITES = frozenset({Op.WRITE_6, Op.WRITE_10, Op.WRITE_12, Op.WRITE_16})


class Sense(Enum):
    """Why a command failed: sense key, additional sense code and its qualifier."""

    READ_ERROR = (0x3, 0x1100)
    WRITE_ERROR = (0x3, 0x0C00)
    HARDWARE_ERROR = (0x4, 0x4400)
    LIST_LENGTH = (0x5, 0x1A00)
    INVALID_COMMAND = (0x5, 0x2000)
    OUT_OF_RANGE = (0x5, 0x2100)
    INVALID_CDB = (0x5, 0x2400)
    INVALID_PARAMETER = (0x5, 0x2600)
    #: The answer of overlaybd-tcmu to writes on a read-only image.
    INCOMPATIBLE_FORMAT = (0x5, 0x3005)
    CAPACITY_CHANGED = (0x6, 0x2A09)

    def to_bytes(self) -> bytes:
        """Return it as fixed format sense data (SPC-4 4.5.3)."""
        key, code = self.value
        return bytes((0x70, 0, key, 0, 0, 0, 0, 0x0A, 0, 0, 0, 0, code >> 8, code & 0xFF, 0, 0, 0, 0))


class ScsiError(ObdlabError, code="scsi"):
    """A refused command; ``sense`` goes to the initiator."""

    def __init__(self, sense: Sense, reason: str) -> None:
        self.sense = sense
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Unit:
    """Properties of a logical unit. ``serial``: hexadecimal digits; ``description``: any text."""

    blocks: int
    block_size: int
    read_only: bool
    serial: str
    description: str
    write_cache: bool = False


class Transfer(NamedTuple):
    """A range of logical blocks, and whether it must be on stable storage before the answer (FUA)."""

    lba: int
    blocks: int
    force_unit_access: bool = False


_U16, _U32, _U64 = Struct(">H"), Struct(">I"), Struct(">Q")
#: 10-byte commands: first block, number of blocks.
CDB_10 = Struct(">xxIxHx")
_READ_10 = Struct(">BxIxHx")
_CDB_12 = Struct(">xxII")
_CDB_16 = Struct(">xxQI")
#: 6-byte commands hold the address in 21 bits, with the operation code above them.
_LBA_6 = 0x1FFFFF


def read_10(lba: int, blocks: int) -> bytes:
    """Return the READ(10) command for these blocks."""
    return _READ_10.pack(Op.READ_10, lba, blocks)


def transfer_of(cdb: bytes) -> Transfer:
    """Return the blocks that a command names; its length must fit its code."""
    size = len(cdb)
    fua = bool(cdb[1] & 0x08)
    if size == 10:
        lba, blocks = CDB_10.unpack_from(cdb)
        return Transfer(lba, blocks, fua)
    if size == 16:
        lba, blocks = _CDB_16.unpack_from(cdb)
        return Transfer(lba, blocks, fua)
    if size == 12:
        lba, blocks = _CDB_12.unpack_from(cdb)
        return Transfer(lba, blocks, fua)
    return Transfer(_U32.unpack_from(cdb)[0] & _LBA_6, cdb[4] or 256)


def inquiry(cdb: bytes, unit: Unit) -> bytes:
    """Answer INQUIRY: the standard data, or a page of vital product data. Raises ScsiError."""
    allocation = _U16.unpack_from(cdb, 3)[0]
    page = cdb[2]
    if not cdb[1] & 0x01:
        if page:
            raise ScsiError(Sense.INVALID_CDB, f"INQUIRY: page {page:#x} without EVPD")
        return _standard_inquiry()[:allocation]
    build = _VPD_PAGES.get(page)
    if build is None:
        raise ScsiError(Sense.INVALID_CDB, f"INQUIRY: no vital product data page {page:#x}")
    content = build(unit)
    return (bytes((0, page)) + _U16.pack(len(content)) + content)[:allocation]


def _standard_inquiry() -> bytes:
    # SPC-3, response format 2, 31 bytes follow, (nothing), command queueing
    head = bytes((0, 0, 0x05, 0x02, 31, 0x08, 0, 0x02))
    return head + b"LIO-ORG " + b"TCMU device".ljust(16) + b"0002"


def _supported_pages(_: Unit) -> bytes:
    return bytes(sorted(_VPD_PAGES))


def _unit_serial(unit: Unit) -> bytes:
    return unit.serial.encode() + b"\0"


# Three designators: T10 vendor, NAA "IEEE registered extended" (the serial's digits after the vendor's number), and
# the description as vendor specific text.
def _identification(unit: Unit) -> bytes:
    digits = "".join(character for character in unit.serial if character in "0123456789abcdefABCDEF")
    naa = bytes.fromhex("6001405" + digits[:25].ljust(25, "0"))
    return (
        _designator(2, 1, b"LIO-ORG " + unit.serial.encode() + b"\0")
        + _designator(1, 3, naa)
        + _designator(2, 0, unit.description.encode()[:251] + b"\0")
    )


def _designator(code_set: int, kind: int, content: bytes) -> bytes:
    return bytes((code_set, kind, 0, len(content))) + content


def _block_limits(unit: Unit) -> bytes:
    page = bytearray(0x3C)
    page[0] = 1  # a WRITE SAME of no blocks does nothing
    if not unit.read_only:
        _U32.pack_into(page, 16, UNMAP_MOST_BLOCKS)
        _U32.pack_into(page, 20, UNMAP_MOST_RANGES)
        _U32.pack_into(page, 24, max(1, UNMAP_GRANULARITY // unit.block_size))
        _U32.pack_into(page, 28, 0x80000000)  # the alignment is valid, and 0
        _U64.pack_into(page, 32, WRITE_SAME_MOST_BLOCKS)
    return bytes(page)


def _characteristics(_: Unit) -> bytes:
    return bytes(0x3C)


def _provisioning(unit: Unit) -> bytes:
    # Unprovisioned blocks read as zeros; UNMAP and both kinds of WRITE SAME unprovision.
    return bytes((0, 0x04 if unit.read_only else 0xE4, 0, 0))


_VPD_PAGES = {
    0x00: _supported_pages,
    0x80: _unit_serial,
    0x83: _identification,
    0xB0: _block_limits,
    0xB1: _characteristics,
    0xB2: _provisioning,
}


def read_capacity_10(unit: Unit) -> bytes:
    """Return the last block and the block size; a last block beyond 32 bits becomes FFFFFFFF."""
    return _U32.pack(min(unit.blocks - 1, 0xFFFFFFFF)) + _U32.pack(unit.block_size)


def read_capacity_16(cdb: bytes, unit: Unit) -> bytes:
    """Answer READ CAPACITY(16), of SERVICE ACTION IN(16). Raises ScsiError on other service actions."""
    if cdb[1] & 0x1F != READ_CAPACITY_16:
        raise ScsiError(Sense.INVALID_COMMAND, f"SERVICE ACTION IN(16): no action {cdb[1] & 0x1F:#x}")
    answer = bytearray(32)
    _U64.pack_into(answer, 0, unit.blocks - 1)
    _U32.pack_into(answer, 8, unit.block_size)
    answer[14] = 0xC0  # thin provisioning, and unprovisioned blocks read as zeros
    return bytes(answer[: _U32.unpack_from(cdb, 10)[0]])


def mode_sense(cdb: bytes, unit: Unit) -> bytes:
    """Answer MODE SENSE(6) or (10), without block descriptors. Raises ScsiError."""
    ten = cdb[0] == Op.MODE_SENSE_10
    allocation = _U16.unpack_from(cdb, 7)[0] if ten else cdb[4]
    if allocation == 0:
        return b""
    if allocation < (8 if ten else 4):
        raise ScsiError(Sense.INVALID_CDB, f"MODE SENSE: no room for the header (got {allocation} bytes)")
    pages = _mode_pages(cdb[2] & 0x3F, cdb[3], unit)
    # Write protection, and support of FUA.
    specific = (0x80 if unit.read_only else 0) | (0x10 if unit.write_cache else 0)
    if ten:
        return (_U16.pack(6 + len(pages)) + bytes((0, specific, 0, 0, 0, 0)) + pages)[:allocation]
    return (bytes((3 + len(pages), 0, specific, 0)) + pages)[:allocation]


def mode_select(cdb: bytes, data: bytes, unit: Unit) -> None:
    """Answer MODE SELECT(6) or (10): accept only the present values. Raises ScsiError."""
    ten = cdb[0] == Op.MODE_SELECT_10
    if not cdb[1] & 0x10 or cdb[1] & 0x01:
        raise ScsiError(Sense.INVALID_CDB, "MODE SELECT: wants the page format, and saves no pages")
    length = _U16.unpack_from(cdb, 7)[0] if ten else cdb[4]
    if length == 0:
        return
    header = 8 if ten else 4
    if length > len(data) or length < header + 2 or length >= 512:
        raise ScsiError(Sense.LIST_LENGTH, f"MODE SELECT: a list of {length} bytes ({len(data)} came)")
    pages = data[header:length]
    if any(data[header - 2 : header]) or pages != _mode_pages(pages[0] & 0x3F, 0, unit, Sense.INVALID_PARAMETER):
        raise ScsiError(Sense.INVALID_PARAMETER, "MODE SELECT: would change something")


def _mode_pages(page: int, subpage: int, unit: Unit, unknown: Sense = Sense.INVALID_CDB) -> bytes:
    recovery = bytes((0x01, 0x0A)) + bytes(10)
    caching = bytes((0x08, 0x12, 0x04 if unit.write_cache else 0)) + bytes(17)
    # Commands may be reordered; a busy timeout without limit.
    control = bytes((0x0A, 0x0A, 0x02, 0, 0, 0x40, 0, 0, 0xFF, 0xFF, 0, 0))
    pages = {0x01: recovery, 0x08: caching, 0x0A: control, 0x3F: recovery + caching + control}
    if page not in pages or subpage not in (0, 0xFF if page == 0x3F else 0):
        raise ScsiError(unknown, f"no mode page {page:#x}/{subpage:#x}")
    return pages[page]


def unmap_ranges(cdb: bytes, data: bytes) -> list[Transfer]:
    """Return the block ranges in an UNMAP's parameter list. Raises ScsiError."""
    length = _U16.unpack_from(cdb, 7)[0]
    if cdb[1] & 0x01:
        raise ScsiError(Sense.INVALID_CDB, "UNMAP: anchored blocks are not known")
    if length == 0:
        return []
    if length < 8 or length > len(data):
        raise ScsiError(Sense.LIST_LENGTH, f"UNMAP: a list of {length} bytes ({len(data)} came)")
    size = _U16.unpack_from(data, 2)[0]
    if size % 16 or size > length - 8:
        raise ScsiError(Sense.INVALID_PARAMETER, f"UNMAP: descriptors of {size} bytes in a list of {length}")
    if size // 16 > UNMAP_MOST_RANGES:
        raise ScsiError(Sense.INVALID_PARAMETER, f"UNMAP: too many ranges ({size // 16})")
    return [
        Transfer(_U64.unpack_from(data, at)[0], _U32.unpack_from(data, at + 8)[0]) for at in range(8, 8 + size, 16)
    ]


def check_inside(transfer: Transfer, unit: Unit) -> None:
    """Raise ScsiError unless all of the blocks are on the unit."""
    if transfer.lba + transfer.blocks > unit.blocks:
        end = transfer.lba + transfer.blocks
        raise ScsiError(Sense.OUT_OF_RANGE, f"blocks [{transfer.lba}, {end}) past the end ({unit.blocks})")
