"""Sizes of kernel structures, as the kernel's headers have them."""

from __future__ import annotations

import ctypes
import errno
import subprocess
from pathlib import Path

import pytest

from obdlab.system import abi
from tests import capabilities

SIZES = {
    "fuse_in_header": abi.FUSE_IN_HEADER.size,
    "fuse_out_header": abi.FUSE_OUT_HEADER.size,
    "fuse_read_in": abi.FUSE_TRANSFER_IN.size,
    "fuse_write_in": abi.FUSE_TRANSFER_IN.size,
    "fuse_init_out": abi.FUSE_INIT_OUT.size,
    "fuse_attr": abi.FUSE_ATTR.size,
    "fuse_entry_out": abi.FUSE_ENTRY_OUT.size + abi.FUSE_ATTR.size,
    "fuse_attr_out": abi.FUSE_ATTR_OUT.size + abi.FUSE_ATTR.size,
    "fuse_open_out": abi.FUSE_OPEN_OUT.size,
    "fuse_write_out": abi.FUSE_WRITE_OUT.size,
    "fuse_statfs_out": abi.FUSE_STATFS_OUT.size,
    "fuse_fallocate_in": abi.FUSE_FALLOCATE_IN.size,
    "fuse_dirent": abi.FUSE_DIRENT.size,
    "loop_info64": ctypes.sizeof(abi.LoopInfo64),
    "loop_config": ctypes.sizeof(abi.LoopConfig),
}


def test_sizes() -> None:
    assert SIZES == {
        "fuse_in_header": 40,
        "fuse_out_header": 16,
        "fuse_read_in": 40,
        "fuse_write_in": 40,
        "fuse_init_out": 64,
        "fuse_attr": 88,
        "fuse_entry_out": 128,
        "fuse_attr_out": 104,
        "fuse_open_out": 16,
        "fuse_write_out": 8,
        "fuse_statfs_out": 80,
        "fuse_fallocate_in": 32,
        "fuse_dirent": 24,
        "loop_info64": 232,
        "loop_config": 304,
    }


def test_a_transfer_is_read_from_header_and_body_at_once() -> None:
    header = abi.FUSE_IN_HEADER.pack(80, 15, 77, 2, 0, 0, 0, 0, 0)
    body = abi.FUSE_TRANSFER_IN.pack(5, 1 << 40, 4096, 1, 2, 3, 0)
    assert abi.FUSE_TRANSFER.unpack_from(header + body) == (80, 15, 77, 1 << 40, 4096)
    assert len(header + body) == abi.FUSE_WRITE_DATA


def test_sizes_by_the_c_compiler(tmp_path: Path) -> None:
    capabilities.require_tools("cc")
    if not Path("/usr/include/linux/fuse.h").exists():
        capabilities.missing("tools", "no headers of the kernel")
    lines = "".join(f'printf("{name} %zu\\n", sizeof(struct {name}));' for name in SIZES)
    source = tmp_path / "sizes.c"
    source.write_text(
        "#include <stdio.h>\n#include <linux/fuse.h>\n#include <linux/loop.h>\n" + "int main(void){" + lines + "}\n"
    )
    subprocess.run(["cc", "-o", tmp_path / "sizes", source], check=True)
    out = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout
    assert {name: int(size) for name, size in map(str.split, out.splitlines())} == SIZES


def test_errors_carry_errno_and_target(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        abi.umount2(tmp_path / "nowhere")
    assert caught.value.errno in (errno.ENOENT, errno.EPERM)
    assert str(tmp_path / "nowhere") in str(caught.value)
    with pytest.raises(OSError):
        abi.prctl(-1, 0)
