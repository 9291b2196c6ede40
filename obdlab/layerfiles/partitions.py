"""The partitions of a disk image, and which of them holds the root file system. Nothing on the disk is trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.errors import FormatError, ObdlabError
from obdlab.formats.partitiontable import (
    GPT_SECTORS,
    LINUX,
    ROOT,
    SECTOR,
    Partition,
    parse_boot_record,
    parse_gpt_entries,
    parse_gpt_header,
)
from obdlab.formats.tar import TarWindow
from obdlab.layers.tarwrap import WrappedContent
from obdlab.system.superblock import SUPERBLOCK_END, kind_of
from obdlab.volumes.detect import FileTree

if TYPE_CHECKING:
    from obdlab.blob import Blob
    from obdlab.formats.partitiontable import MbrEntry

#: Logical partitions that are followed; Linux has at most 60 on a disk.
_MOST_LOGICAL = 60
_FIRST_LOGICAL = 5
_NOT_FOUND = "no partition holds a root file system"


def partitions_of(disk: Blob) -> list[Partition]:
    """Return the partitions of a disk by their numbers; [] without a partition table.

    Raises FormatError for a malformed table, or one with partitions outside of the disk, and the disk's errors.
    """
    entries = parse_boot_record(_read(disk, 0, SECTOR))
    if entries is None:
        return []
    found = _gpt(disk) if any(entry.is_protective for entry in entries) else _mbr(disk, entries)
    for each in found:
        if not 0 < each.begin < each.begin + each.size <= disk.size:
            raise FormatError(
                f"partition {each.number} is not inside of the disk",
                blob=disk.name,
                got=f"bytes {each.begin} to {each.begin + each.size}",
                wanted=f"at most {disk.size}",
            )
    return found


def find_root(disk: Blob, number: int = 0) -> Partition:
    """Return partition ``number``, or with 0 that of the root file system.

    The root is the only partition with a root's type; else the only one with the type of Linux file systems; else
    the only one of those whose file system has the directories of a root. A disk that has no partition table but a
    file system is one partition. Raises FormatError unless there is exactly one.
    """
    found = partitions_of(disk)
    if number:
        for each in found:
            if each.number == number:
                return each
        raise FormatError(f"no partition {number}", blob=disk.name, wanted=_told(found) or "a disk with partitions")
    if not found:
        if not kind_of(_read(disk, 0, SUPERBLOCK_END).ljust(SUPERBLOCK_END, b"\0")):
            raise FormatError("neither a partition table nor a file system", blob=disk.name)
        return Partition(0, 0, disk.size, ROOT, "")
    linux = [each for each in found if each.kind in (LINUX, ROOT)]
    for chosen in ([each for each in linux if each.kind == ROOT], linux):
        if len(chosen) == 1:
            return chosen[0]
    chosen = [each for each in linux if _is_root(disk, each)]
    if len(chosen) != 1:
        what = "more than one partition may hold the root file system" if chosen else _NOT_FOUND
        raise FormatError(what, blob=disk.name, got=_told(found), wanted="the number of one")
    return chosen[0]


def _mbr(disk: Blob, entries: list[MbrEntry]) -> list[Partition]:
    found = [entry.partition(entry.place + 1, 0) for entry in entries if not entry.is_extended]
    extended = [entry for entry in entries if entry.is_extended]
    return found + (_logical(disk, extended[0].begin) if extended else [])


# A chain of boot records: the first entry of each is a logical partition, relative to the record, the second one the
# place of the next record, relative to the extended partition.
def _logical(disk: Blob, base: int) -> list[Partition]:
    found: list[Partition] = []
    at, seen = base, set[int]()
    while True:
        if at in seen or len(seen) == _MOST_LOGICAL:
            raise FormatError("chain of logical partitions has no end", blob=disk.name, offset=at * SECTOR)
        seen.add(at)
        entries = parse_boot_record(_read(disk, at * SECTOR, SECTOR))
        if entries is None:
            raise FormatError("logical partition without a boot record", blob=disk.name, offset=at * SECTOR)
        number = _FIRST_LOGICAL + len(found)
        found += [entry.partition(number, at) for entry in entries[:1] if not entry.is_extended]
        following = [entry for entry in entries if entry.is_extended]
        if not following:
            return found
        at = base + following[0].begin


def _gpt(disk: Blob) -> list[Partition]:
    # The second header is in the last sector. Disks have sectors of either size; a file has no size of its own.
    places = [(sector, at) for sector in GPT_SECTORS for at in (sector, disk.size - sector)]
    first: FormatError | None = None
    for sector, at in places:
        try:
            header = parse_gpt_header(_read(disk, at, sector), sector=sector, blob=disk.name, offset=at)
            data = _read(disk, header.entries_at * sector, header.count * header.entry_size)
            if len(data) < header.count * header.entry_size:
                raise FormatError("GPT's entries are outside of the disk", blob=disk.name, offset=at + 72)
            return parse_gpt_entries(header, data, blob=disk.name)
        except FormatError as error:
            first = first or error
    assert first is not None
    raise first


def _is_root(disk: Blob, partition: Partition) -> bool:
    try:
        tree = FileTree(window_of(disk, partition))
        names = tree.entries(tree.root)
    except ObdlabError:
        return False
    return b"etc" in names and (b"usr" in names or b"bin" in names)


def window_of(disk: Blob, partition: Partition) -> WrappedContent:
    """Return a partition's bytes as a blob."""
    return WrappedContent(disk, TarWindow(partition.begin, partition.size))


def _told(found: list[Partition]) -> str:
    return ", ".join(f"{each.number}: {each.size >> 20} MiB of type {each.type}" for each in found)


def _read(disk: Blob, offset: int, length: int) -> bytes:
    if not 0 <= offset <= disk.size:
        return b""
    return disk.read_at(offset, min(length, disk.size - offset))
