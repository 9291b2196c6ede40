"""Loop devices over plain files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from obdlab.devices import loop
from obdlab.errors import DeviceError

pytestmark = pytest.mark.kernel

MIB = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MIB))
    return path


def test_attach_and_detach(file: Path) -> None:
    device = loop.attach(file, read_only=True)
    try:
        assert device.read_bytes() == file.read_bytes()
        assert loop.backing_file(device) == str(file)
        assert loop.devices_of(file) == [device]
        assert not loop.in_use(device)
    finally:
        loop.detach(device)
    assert loop.devices_of(file) == []
    loop.detach(device)


def test_detach_leaves_another_files_device_alone(file: Path, tmp_path: Path) -> None:
    device = loop.attach(file, read_only=True)
    try:
        loop.detach(device, file=tmp_path / "another")
        assert loop.devices_of(file) == [device]
    finally:
        loop.detach(device, file=file)


def test_detach_waits_for_the_last_user_and_gives_up_in_time(file: Path) -> None:
    device = loop.attach(file, read_only=True)
    fd = os.open(device, os.O_RDONLY)
    try:
        with pytest.raises(DeviceError, match="still in use"):
            loop.detach(device, timeout_s=0.1)
    finally:
        os.close(fd)
    deadline = time.monotonic() + 10
    while loop.devices_of(file) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loop.devices_of(file) == []


def test_exclusive_use_is_seen(file: Path) -> None:
    device = loop.attach(file, read_only=True)
    fd = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        assert loop.in_use(device)
    finally:
        os.close(fd)
        loop.detach(device)


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_sector_size(file: Path, sector_size: int) -> None:
    device = loop.attach(file, read_only=False, sector_size=sector_size)
    try:
        queue = Path(f"/sys/block/{device.name}/queue")
        assert int((queue / "logical_block_size").read_text()) == sector_size
    finally:
        loop.detach(device)


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"no-such-file: cannot open"):
        loop.attach(tmp_path / "no-such-file", read_only=True)
    with pytest.raises(DeviceError, match="cannot attach"):
        loop.attach(Path("/dev/null"), read_only=True)


RACER = """
import sys
from pathlib import Path
from obdlab.devices import loop
for _ in range(10):
    device = loop.attach(Path(sys.argv[1]), read_only=True)
    try:
        assert device.read_bytes() == Path(sys.argv[1]).read_bytes()
    finally:
        loop.detach(device)
"""


def test_processes_racing_for_free_devices(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(6)]
    for number, path in enumerate(files):
        path.write_bytes(bytes([number]) * 65536)
    racers = [subprocess.Popen([sys.executable, "-c", RACER, str(path)], stderr=subprocess.PIPE) for path in files]
    failures = [racer.communicate(timeout=60)[1].decode() for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * len(racers), failures
    assert [loop.devices_of(path) for path in files] == [[]] * len(files)
