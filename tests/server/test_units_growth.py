"""Where the kernel lets a mounted ext4 grow, and so where ``obdlab layer resize --filesystem`` works."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from obdlab.devices import loop

pytestmark = pytest.mark.vm

MIB = 1 << 20


def grow(device: Path, capabilities: str) -> int:
    command = ["setpriv", "--no-new-privs", f"--bounding-set={capabilities}", "resize2fs", str(device)]
    return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode


def test_a_mounted_ext4_grows_by_sys_resource_alone(tmp_path: Path) -> None:
    file, target = tmp_path / "file", tmp_path / "mnt"
    target.mkdir()
    with file.open("wb") as made:
        made.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", file], check=True)
    os.truncate(file, 128 * MIB)
    fd = os.open(file, os.O_RDWR)
    label = f"growth:{os.getpid()}"
    device = loop.attach(fd, label=label, read_only=False)
    os.close(fd)
    try:
        subprocess.run(["mount", "-t", "ext4", device, target], check=True)
        try:
            before = os.statvfs(target).f_blocks
            assert grow(device, "-sys_resource") != 0
            assert os.statvfs(target).f_blocks == before
            assert grow(device, "-all,+sys_resource") == 0
            assert os.statvfs(target).f_blocks > 1.8 * before
        finally:
            subprocess.run(["umount", target], check=True)
    finally:
        loop.detach(device, label=label)
