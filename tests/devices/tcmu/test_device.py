"""TCMU disks of a real kernel: the contract of every device. Over a simulated kernel: traits of this kind."""

from __future__ import annotations

import hashlib
import os
import select
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from obdlab.blob import Blob
from obdlab.devices.device import Device
from obdlab.devices.tcmu import configfs
from obdlab.devices.tcmu import tcmu_device as tcmu
from obdlab.devices.tcmu.tcmu_device import TcmuDevice
from obdlab.devices.tcmu.uio import UioDevice
from obdlab.errors import DeviceError
from tests.devices.blobs import MemoryWritable
from tests.devices.contract import DeviceContract
from tests.devices.tcmu.simulated import KernelRing, read_10
from tests.devices.tcmu.tree import Tree


@pytest.mark.vm
class TestTcmuDevice(DeviceContract):
    def make(self, blob: Blob, directory: Path, **options: Any) -> Device:
        return TcmuDevice(blob, directory, **options)

    def leftovers(self, directory: Path) -> list[str]:
        target = tcmu._target(directory)
        return [str(path) for path in (target.backstore, target.loop) if path.exists()]


class Host:
    """A device over simulated configfs and ring. Its node does not exist."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = directory / "target"
        root.mkdir()
        self.tree = Tree(root, monkeypatch)
        self.kernel = KernelRing()
        self.directory = directory / "device"
        self.blob = MemoryWritable(8192)
        monkeypatch.setattr(tcmu, "number_of", lambda _: 3)
        monkeypatch.setattr(UioDevice, "open", lambda _: UioDevice(self.kernel.event, self.kernel.memory))
        monkeypatch.setattr(configfs, "export", lambda _: Path("/dev/simulated"))
        self.device = TcmuDevice(self.blob, self.directory)

    def take_away(self) -> None:
        """Have the kernel take the device away, with an answer unread, so that the server's next wait fails."""
        self.kernel.put(read_10(0, 8), room=4096)
        self.kernel.publish()
        assert select.select([self.kernel.kernel], [], [], 30)[0]
        self.kernel.kernel.close()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    found = Host(tmp_path, monkeypatch)
    yield found
    if found.kernel.kernel.fileno() >= 0:
        found.take_away()
    assert found.device.wait(30)


def test_a_disk_is_known_by_32_digits_of_its_directorys_hash(host: Host) -> None:
    serial = hashlib.sha256(os.fsencode(host.directory)).hexdigest()[:32]
    answer = host.kernel.do(bytes((0x12, 1, 0x80, 0, 255, 0)), room=255)
    assert answer.data[:4] == bytes((0, 0x80, 0, 33))
    assert answer.data[4 : answer.read_length] == serial.encode() + b"\0"


def test_a_device_that_is_gone_is_closed_once(host: Host) -> None:
    assert not host.device.wait(0)
    host.take_away()
    assert host.device.wait(30)
    assert host.kernel.memory.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(host.kernel.event)
    assert host.device.wait(0)


def test_a_size_that_the_kernel_does_not_look_for_is_not_taken_on(host: Host) -> None:
    host.blob.data.extend(bytes(4096))
    with pytest.raises(DeviceError, match="/dev/simulated: the kernel does not look for a new size: No such file"):
        host.device.take_on_size()
    assert host.device.size == 8192


def test_requests_of_an_abandoned_device_fail_at_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(configfs, "time", clock)
    monkeypatch.setattr(configfs, "disk_of", lambda _: Path("/dev/simulated"))
    monkeypatch.setattr(configfs, "_in_flight", lambda _: True)
    action = tcmu._target(host.directory).backstore / "action"
    action.mkdir()
    tcmu.abandon(host.directory)
    assert (action / "reset_ring").read_text() == "2"
    assert sum(slept) < 0.1
