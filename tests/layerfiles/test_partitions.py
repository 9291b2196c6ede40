"""Partition tables: against the kernel's reading of them, malformed ones, and the root's choice."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import obdlab
from obdlab.blob import MemoryBlob
from obdlab.cli.main import main
from obdlab.errors import FormatError
from obdlab.layerfiles.partitions import find_root, partitions_of
from obdlab.volumes.detect import FileTree
from tests.layerfiles.partitioned import boot_record, gpt_disk, gpt_header, mbr_disk

MIB = 2048  # sectors

DISKS = {
    "mbr": mbr_disk(64 * MIB, [(MIB, 8 * MIB, 0x83), (9 * MIB, 4 * MIB, 0x82), (13 * MIB, 4 * MIB, 0x0B)]),
    "logical": mbr_disk(
        64 * MIB, [(MIB, 8 * MIB, 0x83)], [(21 * MIB, 4 * MIB), (30 * MIB, 2 * MIB), (40 * MIB, MIB)], 20 * MIB
    ),
    "gpt": gpt_disk(
        64 * MIB, [(MIB, 2 * MIB - 1, "other"), (2 * MIB, 50 * MIB - 1, "linux"), (51 * MIB, 51 * MIB, "root")]
    ),
}


@pytest.mark.tools("partx")
@pytest.mark.parametrize("name", DISKS)
def test_partitions_are_those_of_util_linux(name: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(DISKS[name])
    command = ["partx", "--show", "--noheadings", "--output", "NR,START,SECTORS", disk]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {
        number: (begin * 512, sectors * 512)
        for number, begin, sectors in (map(int, line.split()) for line in told.splitlines())
    }
    if name == "logical":
        del found[2]  # the room for the logical ones
    assert {each.number: (each.begin, each.size) for each in partitions_of(MemoryBlob(DISKS[name]))} == found
    assert len(found) >= 3


def test_sectors_of_4_kib_and_the_second_header() -> None:
    (part,) = partitions_of(MemoryBlob(gpt_disk(64, [(10, 19, "root")], sector=4096)))
    assert (part.begin, part.size) == (40960, 40960)
    disk = bytearray(gpt_disk(512, [(64, 127, "root")]))
    disk[512 + 24] ^= 1  # the first header's checksum no longer fits
    assert find_root(MemoryBlob(disk)).begin == 64 * 512
    disk[-512 + 24] ^= 1
    with pytest.raises(FormatError, match="GPT header has a wrong checksum"):
        partitions_of(MemoryBlob(disk))


def _with_header(header: bytes) -> bytes:
    disk = bytearray(512 * 512)
    disk[:512] = boot_record([(1, 511, 0xEE)])
    disk[512 : 512 + len(header)] = header
    return bytes(disk)


def _endless(sectors: int) -> bytes:
    disk = bytearray(mbr_disk(sectors, [], [(301, 5)], 300))
    disk[300 * 512 : 301 * 512] = boot_record([(1, 5, 0x83), (0, 9, 0x05)])
    return bytes(disk)


def _long_chain() -> bytes:
    return mbr_disk(1000, [], [(101 + 2 * number, 1) for number in range(100)], 100)


@pytest.mark.parametrize(
    ("disk", "complaint"),
    [
        (bytes(1 << 20), "neither a partition table nor a file system"),
        (b"", "neither a partition table nor a file system"),
        (mbr_disk(512, [(100, 500, 0x83)]), "partition 1 is not inside of the disk"),
        (mbr_disk(512, [(0, 100, 0x83)]), "partition 1 is not inside of the disk"),
        (mbr_disk(512, [(0xFFFFFFFF, 0xFFFFFFFF, 0x83)]), "partition 1 is not inside of the disk"),
        (_endless(512), "chain of logical partitions has no end"),
        (_long_chain(), "chain of logical partitions has no end"),
        (mbr_disk(512, [(9, 9, 0x05)]), "logical partition without a boot record"),
        (mbr_disk(512, [(1000, 9, 0x05)]), "logical partition without a boot record"),
        (boot_record([(1, 9, 0xEE)]) + bytes(10240), "no GPT header"),
        (gpt_disk(512, [(64, 63, "root")]), "GPT partition ends before it begins"),
        (gpt_disk(512, [(64, 2**64 - 1, "root")]), "partition 1 is not inside of the disk"),
        (_with_header(gpt_header(1, 2, 2, b"", 512, 4, 2**32 - 1)), "GPT with too many or misshapen entries"),
        (_with_header(gpt_header(1, 2, 2, b"", 512, 4, size=8)), "GPT with too many or misshapen entries"),
        (_with_header(gpt_header(1, 2, 2**63, b"", 512, 4)), "GPT's entries are outside of the disk"),
        (_with_header(gpt_header(1, 2, 2, b"x", 512, 4)), "GPT's entries have a wrong checksum"),
        (mbr_disk(512, [(64, 64, 0x82)]), "no partition holds a root file system"),
        (mbr_disk(512, [(64, 64, 0x83), (128, 64, 0x83)]), "no partition holds a root file system"),
    ],
)
def test_what_is_refused(disk: bytes, complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint):
        find_root(MemoryBlob(disk))


def _file_system(path: Path, tree: Path, mib: int) -> bytes:
    path.unlink(missing_ok=True)
    subprocess.run(["mkfs.ext4", "-q", "-d", tree, path, f"{mib}M"], check=True, capture_output=True)
    return path.read_bytes()


@pytest.mark.tools("mkfs.ext4")
@pytest.mark.parametrize("table", ["mbr", "gpt", "none"])
def test_the_root_of_a_virtual_machine_becomes_an_image(table: str, tmp_path: Path) -> None:
    root, data = tmp_path / "root", tmp_path / "data"
    for directory in (root / "etc", root / "usr", data / "files"):
        directory.mkdir(parents=True)
    (root / "etc/issue").write_text("a machine\n")
    roots = [_file_system(tmp_path / "fs", tree, mib) for tree, mib in ((data, 4), (root, 8))]
    # A partition need not begin at a multiple of 4 KiB.
    places = [MIB, 6 * MIB + 1]
    if table == "none":
        disk = bytearray(roots[1])
    elif table == "mbr":
        parts = [(at, len(each) // 512, 0x83) for at, each in zip(places, roots, strict=True)]
        disk = bytearray(mbr_disk(16 * MIB, parts))
    else:
        disk = bytearray(
            gpt_disk(
                16 * MIB, [(at, at + len(each) // 512 - 1, "linux") for at, each in zip(places, roots, strict=True)]
            )
        )
    if table != "none":
        for at, each in zip(places, roots, strict=True):
            disk[at * 512 : at * 512 + len(each)] = each
    source, layer = tmp_path / "disk.raw", tmp_path / "layer.obd"
    source.write_bytes(disk)
    assert main(["layer", "import", "--rootfs", "--quiet", str(source), str(layer)]) == 0
    with obdlab.open_stack([layer]) as image:
        assert image[:] == roots[1]
        tree = FileTree(image)
        assert b"".join(tree.content(tree.find(b"/etc/issue"))) == b"a machine\n"
    if table == "none":
        return
    assert main(["layer", "import", "--partition", "1", "--quiet", "--force", str(source), str(layer)]) == 0
    with obdlab.open_stack([layer]) as image:
        assert image[:] == roots[0]
    assert main(["layer", "import", "--partition", "7", "--quiet", "--force", str(source), str(layer)]) == 1
