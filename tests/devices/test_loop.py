"""Loop devices over plain files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

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


def attach(file: Path, label: str = "", *, read_only: bool = True, sector_size: int = 512) -> Path:
    fd = os.open(file, os.O_RDWR)
    try:
        return loop.attach(fd, label=label or label_for(file), read_only=read_only, sector_size=sector_size)
    finally:
        os.close(fd)


def label_for(file: Path) -> str:
    return f"obdlab-test:{hash(file)}"


def test_attach_and_detach(file: Path) -> None:
    label = label_for(file)
    device = attach(file)
    try:
        assert device.read_bytes() == file.read_bytes()
        assert loop.label_of(device) == label
        assert loop.labelled(label) == loop.labelled(label[:-1]) == [device]
        assert not loop.in_use(device)
    finally:
        loop.detach(device, label=label)
    assert loop.labelled(label) == []
    assert loop.label_of(device) == ""
    loop.detach(device, label=label)


def test_detach_leaves_another_owners_device_alone(file: Path) -> None:
    device = attach(file)
    try:
        loop.detach(device, label="another")
        assert loop.labelled(label_for(file)) == [device]
    finally:
        loop.detach(device, label=label_for(file))


def test_a_device_given_to_another_since_it_was_looked_at(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = attach(file)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "label_of", lambda _: "another")
            loop.detach_when_unused(device, label="another")
        assert loop.labelled(label_for(file)) == [device]
    finally:
        loop.detach(device, label=label_for(file))


def test_a_device_that_somebody_made_read_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = attach(file, read_only=False)
    try:
        subprocess.run(["blockdev", "--setro", device], check=True)
    finally:
        loop.detach(device, label=label_for(file))
    monkeypatch.setattr(loop, "_free_device", lambda: device)
    assert attach(file, read_only=False) == device
    try:
        device.write_bytes(b"new")
        assert subprocess.check_output(["blockdev", "--getro", device]) == b"0\n"
    finally:
        loop.detach(device, label=label_for(file))
    assert file.read_bytes()[:3] == b"new"


def test_the_longest_label(file: Path) -> None:
    label = "l" * 63
    device = attach(file, label)
    try:
        assert loop.label_of(device) == label
    finally:
        loop.detach(device, label=label)


def test_detach_waits_for_the_last_user_and_gives_up_in_time(file: Path) -> None:
    device = attach(file)
    fd = os.open(device, os.O_RDONLY)
    try:
        with pytest.raises(DeviceError, match="still in use"):
            loop.detach(device, label=label_for(file), timeout_s=0.1)
    finally:
        os.close(fd)
    deadline = time.monotonic() + 60
    while loop.labelled(label_for(file)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loop.labelled(label_for(file)) == []


def test_exclusive_use_is_seen(file: Path) -> None:
    device = attach(file)
    fd = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        assert loop.in_use(device)
    finally:
        os.close(fd)
        loop.detach(device, label=label_for(file))


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_sector_size(file: Path, sector_size: int) -> None:
    device = attach(file, read_only=False, sector_size=sector_size)
    try:
        queue = Path(f"/sys/block/{device.name}/queue")
        assert int((queue / "logical_block_size").read_text()) == sector_size
    finally:
        loop.detach(device, label=label_for(file))


def test_errors_name_the_label(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot attach null device"), open("/dev/null", "rb") as file:
        loop.attach(file.fileno(), label="null device", read_only=True)
    with pytest.raises(DeviceError, match="Bad file descriptor"):
        loop.attach(1 << 20, label="nothing", read_only=True)


RACER = """
import sys
from pathlib import Path
from obdlab.devices import loop
file = open(sys.argv[1], "rb")
for _ in range(10):
    device = loop.attach(file.fileno(), label=sys.argv[1][-63:], read_only=True)
    try:
        assert device.read_bytes() == Path(sys.argv[1]).read_bytes()
    finally:
        loop.detach(device, label=sys.argv[1][-63:])
"""


def test_processes_racing_for_free_devices(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(6)]
    for number, path in enumerate(files):
        path.write_bytes(bytes([number]) * 65536)
    racers = [subprocess.Popen([sys.executable, "-c", RACER, str(path)], stderr=subprocess.PIPE) for path in files]
    failures = [racer.communicate(timeout=60)[1].decode() for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * len(racers), failures
    assert [loop.labelled(str(path)[-63:]) for path in files] == [[]] * len(files)


def test_a_writable_device_of_buffered_io(file: Path) -> None:
    with file.open("r+b") as opened:
        device = loop.attach(opened.fileno(), label=label_for(file), read_only=False, direct_io=False)
    try:
        assert Path(f"/sys/block/{device.name}/ro").read_text() == "0\n"
        assert Path(f"/sys/block/{device.name}/loop/dio").read_text() == "0\n"
    finally:
        loop.detach(device, label=label_for(file))


def test_detach_waits_until_a_user_has_closed_the_device(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = attach(file)
    with ExitStack() as user:
        user.callback(os.close, os.open(device, os.O_RDONLY))

        def sleep(seconds: float) -> None:
            user.close()
            time.sleep(seconds)

        monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
        loop.detach(device, label=label_for(file), timeout_s=60)
    assert loop.labelled(label_for(file)) == []


def test_a_device_goes_with_its_last_user(file: Path) -> None:
    device = attach(file)
    try:
        with device.open("rb"):
            loop.detach_when_unused(device, label="another")
            loop.detach_when_unused(device, label=label_for(file))
            assert loop.labelled(label_for(file)) == [device]
        deadline = time.monotonic() + 60
        while loop.labelled(label_for(file)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert loop.labelled(label_for(file)) == []
    finally:
        loop.detach(device, label=label_for(file))


def test_a_device_that_is_gone_when_it_is_detached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "label_of", lambda _: "ours")
    loop.detach(tmp_path / "loop7", label="ours")
    with pytest.raises(DeviceError, match="/dev/null: cannot detach: Inappropriate ioctl for device"):
        loop.detach(Path("/dev/null"), label="ours")


def test_a_host_without_loop_devices(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_CONTROL", f"{file}-control")
    with pytest.raises(DeviceError, match=r"cannot open .*-control: No such file or directory"):
        attach(file)
