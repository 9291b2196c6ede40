"""The file behind a loop device, over a simulated tree of /sys/block."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.devices import loop
from obdlab.devices.backingfile import is_behind


@pytest.mark.parametrize(
    ("files", "behind"),
    [
        ({0: "/a/disk"}, True),
        ({0: "/a/disk (deleted)"}, True),
        ({0: "/a/disk.other"}, False),
        ({0: "/dev/loop1", 1: "/a/disk"}, True),
        ({0: "/dev/loop1", 1: "/a/other"}, False),
        ({0: "/dev/loop1"}, False),
        ({0: "/dev/loop1", 1: "/dev/loop0"}, False),
        ({}, False),
    ],
    ids=["it", "it, deleted", "another", "it, one below", "another, one below", "none below", "a circle", "none"],
)
def test_a_file_is_behind_its_device_and_the_one_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[int, str], behind: bool
) -> None:
    monkeypatch.setattr(loop, "_SYS_BLOCK", tmp_path)
    for number, file in files.items():
        directory = tmp_path / f"loop{number}" / "loop"
        directory.mkdir(parents=True)
        (directory / "backing_file").write_text(f"{file}\n")
    assert is_behind("/a/disk", Path("/dev/loop0")) is behind
    assert not is_behind("", Path("/dev/loop0"))
