"""Partition tables of disks: MBR with logical partitions, and GPT (UEFI specification, chapter 5).

Functions take the bytes of one structure. ``obdlab.layerfiles.partitions`` reads them from a disk.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from dataclasses import dataclass

from obdlab.errors import FormatError

SECTOR = 512
#: The sizes of sectors that GPT disks have.
GPT_SECTORS = (512, 4096)
#: Most entries that a GPT may have, and most bytes of one; disks have 128 of 128 bytes.
MOST_ENTRIES, _MOST_ENTRY = 1024, 4096
_SIGNATURE = b"\x55\xaa"
_ENTRIES_AT = 446
# status, first head/sector/cylinder, type, last head/sector/cylinder, first sector, sectors
_MBR_ENTRY = struct.Struct("<B3sB3sII")
_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE
_GPT_MAGIC = b"EFI PART"
# magic, revision, header size, header CRC, reserved, own place, other header's, first and last usable sector, disk,
# place of the entries, their count, their size, their CRC
_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_CRC_AT = 16

LINUX, ROOT, OTHER = "linux", "root", "other"
_MBR_LINUX = 0x83
#: Types of GPT partitions (Discoverable Partitions Specification): Linux data, and root file systems by architecture.
_GPT_KINDS = {
    "0fc63daf-8483-4772-8e79-3d69d8477de4": LINUX,
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": ROOT,  # x86-64
    "44479540-f297-41b2-9af7-d131d5f0458a": ROOT,  # x86
    "b921b045-1df0-41c3-af44-4c6f280d3fae": ROOT,  # ARM 64
    "69dad710-2ce4-4e3c-b16c-21a1d49abed3": ROOT,  # ARM 32
    "72ec70a6-cf74-40e6-bd49-4bda08e8f224": ROOT,  # RISC-V 64
    "5eead9a9-fe09-4a1e-a1d7-520d00531306": ROOT,  # S390X
    "c31c45e6-3f39-412e-80fb-4809c4980599": ROOT,  # PPC64le
}


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition by its number, as Linux counts. ``begin`` and ``size`` in bytes; ``kind``: LINUX, ROOT or OTHER."""

    number: int
    begin: int
    size: int
    kind: str
    type: str


@dataclass(frozen=True, slots=True)
class MbrEntry:
    """A used entry of a boot record. Places in sectors; the record's place decides from where they count."""

    place: int
    type: int
    begin: int
    count: int

    @property
    def is_extended(self) -> bool:
        """True if it holds logical partitions."""
        return self.type in _EXTENDED

    @property
    def is_protective(self) -> bool:
        """True if the disk has a GPT."""
        return self.type == _PROTECTIVE

    def partition(self, number: int, base: int) -> Partition:
        """Return it as a partition that begins ``base`` sectors further on."""
        kind = LINUX if self.type == _MBR_LINUX else OTHER
        return Partition(number, (base + self.begin) * SECTOR, self.count * SECTOR, kind, f"{self.type:#04x}")


@dataclass(frozen=True, slots=True)
class GptHeader:
    """The header of a GPT. ``entries_at`` is a sector, ``entry_size`` in bytes."""

    sector: int
    entries_at: int
    count: int
    entry_size: int
    entries_crc: int


def parse_boot_record(data: bytes) -> list[MbrEntry] | None:
    """Return the used entries of a boot record's sector; None if it is not one."""
    if len(data) < SECTOR or data[SECTOR - 2 : SECTOR] != _SIGNATURE:
        return None
    found = []
    for place in range(4):
        _, _, kind, _, begin, count = _MBR_ENTRY.unpack_from(data, _ENTRIES_AT + place * _MBR_ENTRY.size)
        if kind and count:
            found.append(MbrEntry(place, kind, begin, count))
    return found


def parse_gpt_header(data: bytes, *, sector: int, blob: str, offset: int) -> GptHeader:
    """Parse a header of a disk with sectors of ``sector`` bytes. Raises FormatError."""
    if len(data) < _GPT_HEADER.size or not data.startswith(_GPT_MAGIC):
        raise FormatError("no GPT header", blob=blob, offset=offset, got=data[:8].hex(), wanted=_GPT_MAGIC.hex())
    _, _, size, crc, _, _, _, _, _, _, entries_at, count, entry_size, entries_crc = _GPT_HEADER.unpack_from(data)
    if not _GPT_HEADER.size <= size <= min(sector, len(data)):
        raise FormatError("GPT header of a wrong size", blob=blob, offset=offset + 12, got=size)
    if zlib.crc32(data[:_CRC_AT] + bytes(4) + data[_CRC_AT + 4 : size]) != crc:
        raise FormatError("GPT header has a wrong checksum", blob=blob, offset=offset + _CRC_AT, got=f"{crc:#x}")
    if count > MOST_ENTRIES or not _GPT_ENTRY.size <= entry_size <= _MOST_ENTRY or entry_size % 8:
        raise FormatError(
            "GPT with too many or misshapen entries",
            blob=blob,
            offset=offset + 80,
            got=f"{count} of {entry_size} bytes",
            wanted=f"at most {MOST_ENTRIES} of {_GPT_ENTRY.size} to {_MOST_ENTRY}",
        )
    return GptHeader(sector, entries_at, count, entry_size, entries_crc)


def parse_gpt_entries(header: GptHeader, data: bytes, *, blob: str) -> list[Partition]:
    """Parse the entries of a GPT. Raises FormatError if their checksum is wrong, or one ends before it begins."""
    if zlib.crc32(data) != header.entries_crc:
        raise FormatError("GPT's entries have a wrong checksum", blob=blob, offset=header.entries_at * header.sector)
    found = []
    for place in range(header.count):
        kind, _, first, last, _, _ = _GPT_ENTRY.unpack_from(data, place * header.entry_size)
        if kind == bytes(16):
            continue
        if last < first:
            raise FormatError(
                "GPT partition ends before it begins", blob=blob, got=f"{place + 1}: sectors {first} to {last}"
            )
        name = str(uuid.UUID(bytes_le=kind))
        size = (last - first + 1) * header.sector
        found.append(Partition(place + 1, first * header.sector, size, _GPT_KINDS.get(name, OTHER), name))
    return found
