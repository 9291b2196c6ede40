"""Frozen file systems hold writers back, and go on at the end of the block."""

from __future__ import annotations

import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from obdlab.errors import DeviceError
from obdlab.system.freeze import frozen, thaw
from tests import capabilities

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kernel


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    capabilities.require("kernel")
    disk, point = tmp_path / "disk", tmp_path / "mnt"
    point.mkdir()
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, point], check=True)
    yield point
    subprocess.run(["umount", point], check=True)


def test_writers_wait(mounted: Path) -> None:
    with frozen(mounted):
        writer = threading.Thread(target=(mounted / "file").write_bytes, args=(b"data",))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
    writer.join(20)
    assert (mounted / "file").read_bytes() == b"data"
    assert not thaw(mounted)


def test_a_frozen_one_is_left_to_its_owner(mounted: Path) -> None:
    with frozen(mounted):
        with frozen(mounted):
            pass
        writer = threading.Thread(target=(mounted / "file").write_bytes, args=(b"data",))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
    writer.join(20)


def test_what_a_killed_process_left_is_thawed(mounted: Path) -> None:
    subprocess.run(["fsfreeze", "--freeze", mounted], check=True)
    assert thaw(mounted)
    (mounted / "file").write_bytes(b"data")


def test_others_cannot_be_frozen(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot be frozen"), frozen(tmp_path / "missing"):
        pass
