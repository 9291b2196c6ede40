"""What a stranger's file system may ask of the kernel: that of any mkfs by default, and little else."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.blob import MemoryBlob
from obdlab.errors import DeviceError, FormatError
from obdlab.image.open import open_stack
from obdlab.layers.stack import WritableStack
from obdlab.layers.upper import SparseUpper
from obdlab.system import mount, superblock
from obdlab.volumes.detect import open_volume
from obdlab.volumes.ext4.mkfs import make_filesystem
from tests import capabilities

if TYPE_CHECKING:
    from collections.abc import Sequence

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
MIB = 1 << 20


def made(path: Path, command: Sequence[str], size: int = 64 * MIB) -> Path:
    capabilities.require_tools(command[0])
    with path.open("wb") as file:
        file.truncate(size)
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        capabilities.missing("tools", f"{' '.join(command)}: {done.stderr.strip()}")
    return path


def head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(superblock.SUPERBLOCK_END)


def trouble(path: Path) -> str:
    head = head_of(path)
    return superblock.trouble_of(superblock.kind_of(head), head)


@pytest.mark.parametrize(
    "command",
    [
        ("mkfs.ext4", "-q"),
        (
            "mkfs.ext4",
            "-q",
            "-O",
            "^has_journal,sparse_super,flex_bg",
            "-G",
            "1",
            "-E",
            "discard",
            "-F",
        ),  # the original's
        ("mkfs.ext4", "-q", "-b", "1024", "-O", "meta_bg,^resize_inode"),
        ("mkfs.ext4", "-q", "-O", "project,sparse_super2,stable_inodes,uninit_bg,^metadata_csum"),
        ("mkfs.ext3", "-q"),
        ("mkfs.ext2", "-q"),
        ("mkfs.xfs", "-q", "-f"),
    ],
)
def test_what_people_make_passes(tmp_path: Path, command: Sequence[str]) -> None:
    assert trouble(made(tmp_path / "disk", command, 512 * MIB)) == ""


def test_what_we_make_passes(tmp_path: Path) -> None:
    upper = SparseUpper.create(tmp_path / "data", 64 * MIB)
    with WritableStack(None, upper) as disk:
        make_filesystem(disk)
        head = bytes(disk.read_at(0, superblock.SUPERBLOCK_END))
    assert superblock.kind_of(head) == "ext4"
    assert superblock.trouble_of("ext4", head) == ""


def test_what_the_original_makes_passes() -> None:
    with open_stack([GOLDEN / "layer1.obd", GOLDEN / "layer2.obd"]) as disk:
        head = bytes(disk.read_at(0, superblock.SUPERBLOCK_END))
    assert superblock.trouble_of(superblock.kind_of(head), head) == ""


@pytest.mark.parametrize("options", [(), ("-zlz4hc",), ("--chunksize=4096",)])
def test_erofs_passes(tmp_path: Path, options: Sequence[str]) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"abc" * 100000)
    capabilities.require_tools("mkfs.erofs")
    command = ["mkfs.erofs", "--quiet", *options, str(tmp_path / "disk"), str(tmp_path / "tree")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert trouble(tmp_path / "disk") == ""


@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        ("inline_data", "inline_data"),
        ("bigalloc", "bigalloc"),
        ("quota", "quota"),
        ("mmp", "mmp"),
        ("encrypt", "encrypt"),
        ("casefold", "casefold"),
        ("verity", "verity"),
        ("ea_inode", "ea_inode"),
        ("large_dir", "large_dir"),
        ("fast_commit", "fast_commit"),
        ("inline_data,quota", "inline_data, quota"),
    ],
)
def test_what_strangers_are_refused(tmp_path: Path, features: str, wanted: str) -> None:
    assert trouble(made(tmp_path / "disk", ("mkfs.ext4", "-q", "-O", features))) == wanted


def ext4(**fields: tuple[int, bytes]) -> bytes:
    head = bytearray(superblock.SUPERBLOCK_END)
    struct.pack_into("<H", head, 1024 + 0x38, 0xEF53)
    for offset, data in fields.values():
        head[1024 + offset : 1024 + offset + len(data)] = data
    return bytes(head)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        (ext4(journal=(0x60, u32(0x8))), "journal_dev"),
        (ext4(device=(0xE4, u32(0x800))), "a journal on another device"),
        (ext4(options=(0x200, b"errors=panic")), "mount options 'errors=panic' in the superblock"),
        (ext4(options=(0x200, b"\xff" * 64)), "mount options"),
        (ext4(unknown=(0x5C, u32(1 << 31))), "compatible feature 0x80000000"),
        (ext4(unknown=(0x60, u32(1 << 30))), "incompatible feature 0x40000000"),
        (ext4(unknown=(0x64, u32(1 << 29))), "read-only compatible feature 0x20000000"),
    ],
)
def test_ext4_that_no_mkfs_makes(head: bytes, wanted: str) -> None:
    assert wanted in superblock.trouble_of(superblock.kind_of(head), head)


def erofs(features: int = 0, devices: int = 0) -> bytes:
    head = bytearray(superblock.SUPERBLOCK_END)
    struct.pack_into("<I", head, 1024, 0xE0F5E1E2)
    struct.pack_into("<IHH", head, 1024 + 80, features, 0, devices)
    return bytes(head)


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        (erofs(0x5), ""),
        (erofs(0x8), "device table"),
        (erofs(devices=1), "further devices"),
        (erofs(0x20), "fragments or deduplication"),
        (erofs(0x2), "other compression"),
        (erofs(0x180), "48-bit addresses, metadata box"),
        (erofs(0x1000), "incompatible feature 0x1000"),
    ],
)
def test_erofs(head: bytes, wanted: str) -> None:
    got = superblock.trouble_of("erofs", head)
    assert wanted in got
    assert bool(wanted) == bool(got)


def xfs(
    *, log_start: int = 4, realtime: int = 0, version: int = 5, features: tuple[int, int, int] = (0, 0, 0)
) -> bytes:
    head = bytearray(superblock.SUPERBLOCK_END)
    head[:4] = b"XFSB"
    struct.pack_into(">Q", head, 16, realtime)
    struct.pack_into(">Q", head, 48, log_start)
    struct.pack_into(">H", head, 100, 0xB4A0 | version)
    struct.pack_into(">III", head, 212, *features)
    return bytes(head)


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        (xfs(), ""),
        (xfs(version=4), ""),
        (xfs(log_start=0), "a log on another device"),
        (xfs(realtime=1), "a realtime device"),
        (xfs(features=(0x100, 0, 0)), "read-only compatible feature 0x100"),
        (xfs(features=(0, 0x100, 0)), "incompatible feature 0x100"),
        (xfs(features=(0, 0, 2)), "log incompatible feature 0x2"),
    ],
)
def test_xfs(head: bytes, wanted: str) -> None:
    got = superblock.trouble_of("xfs", head)
    assert wanted in got
    assert bool(wanted) == bool(got)


def test_a_refused_file_system_never_reaches_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").write_bytes(ext4(options=(0x200, b"errors=panic")))
    monkeypatch.setattr(mount.abi, "mount", lambda *_: pytest.fail("the kernel was asked"))
    with pytest.raises(DeviceError, match="not given to the kernel: it has mount options"):
        mount.mount(tmp_path / "disk", tmp_path, read_only=True)


def test_a_disk_with_two_magic_numbers_is_one_file_system_for_mounts_and_for_tools() -> None:
    disk = bytearray(1 << 20)
    struct.pack_into("<I", disk, 1024, 0xE0F5E1E2)
    assert superblock.kind_of(bytes(disk[:4096])) == "erofs"
    struct.pack_into("<H", disk, 1024 + 0x38, 0xEF53)
    assert superblock.kind_of(bytes(disk[:4096])) == "ext4"
    with pytest.raises(FormatError, match="ext4"):
        open_volume(MemoryBlob(bytes(disk)))
