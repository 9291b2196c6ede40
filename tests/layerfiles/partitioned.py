"""Disks with partition tables, written field by field."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence

TYPES = {
    "linux": "0fc63daf-8483-4772-8e79-3d69d8477de4",
    "root": "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
    "other": "c12a7328-f81f-11d2-ba4b-00a0c93ec93b",  # an EFI system partition
}
_ENTRY, _COUNT = 128, 128


def boot_record(entries: Sequence[tuple[int, int, int]]) -> bytes:
    """A boot record of (first sector, sectors, type)."""
    packed = b"".join(struct.pack("<B3sB3sII", 0, b"", kind, b"", begin, count) for begin, count, kind in entries)
    return (bytes(446) + packed).ljust(510, b"\0") + b"\x55\xaa"


def mbr_disk(
    sectors: int, primary: Sequence[tuple[int, int, int]], logical: Sequence[tuple[int, int]] = (), base: int = 0
) -> bytes:
    """A disk with an MBR. ``logical``: (first sector, sectors), each with its record in the sector before it."""
    disk = bytearray(sectors * 512)
    extended = [(base, sectors - base, 0x05)] if logical else []
    disk[:512] = boot_record([*primary, *extended])
    places = [base, *(begin - 1 for begin, _ in logical[1:])] if logical else []
    for number, ((begin, count), place) in enumerate(zip(logical, places, strict=True)):
        entries = [(begin - place, count, 0x83)]
        if number + 1 < len(logical):
            entries.append((places[number + 1] - base, 1 + logical[number + 1][1], 0x05))
        disk[place * 512 : place * 512 + 512] = boot_record(entries)
    return bytes(disk)


def gpt_disk(sectors: int, parts: Sequence[tuple[int, int, str]], sector: int = 512) -> bytes:
    """A disk with a GPT at both ends. ``parts``: (first sector, last sector, name in TYPES)."""
    disk = bytearray(sectors * sector)
    disk[:512] = boot_record([(1, min(sectors - 1, 0xFFFFFFFF), 0xEE)])
    entries = b"".join(
        uuid.UUID(TYPES[kind]).bytes_le
        + uuid.UUID(int=number + 1).bytes_le
        + struct.pack("<QQQ72s", first, last, 0, b"")
        for number, (first, last, kind) in enumerate(parts)
    ).ljust(_ENTRY * _COUNT, b"\0")
    room = -(-len(entries) // sector)
    for own, other, at in ((1, sectors - 1, 2), (sectors - 1, 1, sectors - 1 - room)):
        disk[own * sector : own * sector + 92] = gpt_header(own, other, at, entries, sectors, room)
        disk[at * sector : at * sector + len(entries)] = entries
    return bytes(disk)


def gpt_header(
    own: int, other: int, at: int, entries: bytes, sectors: int, room: int, count: int = _COUNT, size: int = _ENTRY
) -> bytes:
    """A header with right checksums."""

    def packed(crc: int) -> bytes:
        places = (own, other, 2 + room, sectors - 2 - room)
        numbers = (at, count, size, zlib.crc32(entries))
        return struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, crc, 0, *places, b"\1" * 16, *numbers)

    return packed(zlib.crc32(packed(0)))
