"""TCMU disks of a real kernel: the contract of every device. Over a simulated kernel: traits of this kind."""

from __future__ import annotations

import hashlib
import os
import select
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from obdlab.blob import Blob, MemoryBlob
from obdlab.devices.device import Device
from obdlab.devices.tcmu import configfs
from obdlab.devices.tcmu import tcmu_device as tcmu
from obdlab.devices.tcmu.ring import RingError
from obdlab.devices.tcmu.tcmu_device import TcmuDevice
from obdlab.devices.tcmu.uio import DeviceBusyError, UioDevice, UioName
from obdlab.errors import DeviceError
from obdlab.system import pauses
from tests.devices.blobs import MemoryWritable
from tests.devices.contract import DeviceContract
from tests.devices.tcmu.simulated import KernelRing, read_10
from tests.devices.tcmu.tree import Tree

DISK = Path("/dev/simulated")


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
        monkeypatch.setattr(configfs, "export", lambda _: DISK)
        self.readahead: list[tuple[Path, int]] = []
        monkeypatch.setattr(tcmu.loop, "set_readahead", lambda *arguments: self.readahead.append(arguments))
        self.controls: list[str] = []
        write = configfs._write
        monkeypatch.setattr(configfs, "_write", lambda path, text: self._note(path, text) or write(path, text))
        self.device = TcmuDevice(self.blob, self.directory)

    def _note(self, path: Path, text: str) -> None:
        if path.name == "control":
            self.controls.append(text)

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
    monkeypatch.setattr(pauses, "time", clock)
    monkeypatch.setattr(configfs, "disk_of", lambda _: Path("/dev/simulated"))
    monkeypatch.setattr(configfs, "_in_flight", lambda _: True)
    action = tcmu._target(host.directory).backstore / "action"
    action.mkdir()
    tcmu.abandon(host.directory)
    assert (action / "reset_ring").read_text() == "2"
    assert sum(slept) < 0.1


def test_how_the_backstore_is_configured(host: Host) -> None:
    name = hashlib.sha256(os.fsencode(host.directory)).hexdigest()
    backstore = host.tree.root / "core/user_88" / f"dev_{name[:13]}"
    assert host.controls == [
        f"dev_config=obdlab/{name[:32]}:device",
        "max_data_area_mb=32",
        "nl_reply_supported=-1",
        "hw_block_size=512",
        "dev_size=8192",
    ]
    assert tcmu._target(host.directory).backstore == backstore
    assert tcmu._target(host.directory).loop.name == f"naa.188{name[:13]}"
    device = host.device
    assert (device.path, device.size, device.read_only, device.kind) == (DISK, 8192, False, "tcmu")
    assert device.can_graduate is False
    assert host.readahead == [(DISK, 128)]


def test_servers_can_change_where_the_kernel_can_reset_a_ring(host: Host) -> None:
    assert host.device.can_change_servers is False
    action = tcmu._target(host.directory).backstore / "action"
    action.mkdir()
    assert host.device.can_change_servers is False
    (action / "reset_ring").touch()
    assert host.device.can_change_servers is True


def test_use_is_that_of_the_disk(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for used in (True, False):
        monkeypatch.setattr(tcmu.loop, "in_use", {DISK: used}.__getitem__)
        assert host.device.in_use is used


def test_a_new_size_is_looked_for_by_the_kernel(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "sys/block/simulated/device"
    directory.mkdir(parents=True)
    monkeypatch.setattr(tcmu, "Path", lambda *parts: tmp_path / Path(*parts).relative_to("/"))
    host.blob.data.extend(bytes(4096))
    assert host.device.size == 8192
    host.device.take_on_size()
    assert (directory / "rescan").read_text() == "1"
    assert host.device.size == 12288


def test_a_device_that_is_refused_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, monkeypatch)
    host.take_away()
    assert host.device.wait(30)
    (tmp_path / "other").mkdir()

    def refuse(_: configfs.Target) -> Path:
        raise DeviceError("no disk came of it")

    kernel = KernelRing()
    monkeypatch.setattr(UioDevice, "open", lambda _: UioDevice(kernel.event, kernel.memory))
    monkeypatch.setattr(configfs, "export", refuse)
    with pytest.raises(DeviceError, match="no disk came of it"):
        TcmuDevice(host.blob, tmp_path / "other")
    kernel.kernel.close()
    assert kernel.memory.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(kernel.event)
    assert not tcmu._target(tmp_path / "other").backstore.exists()
    with pytest.raises(DeviceError, match="512-byte sectors"):
        TcmuDevice(MemoryBlob(bytes(511)), tmp_path / "other")


class Recovery:
    """A device whose server is dead; ``node`` is its disk, ``steps`` are those of the next server."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel, self.blob, self.directory = KernelRing(), MemoryWritable(8192), directory
        self.node: Path | None = DISK
        self.steps: list[tuple[object, ...]] = []
        self.busy = 0
        monkeypatch.setattr(configfs, "disk_of", lambda _: self.node)
        monkeypatch.setattr(configfs, "control", lambda store, *step: bool(self.steps.append((store.name, *step))))
        monkeypatch.setattr(tcmu, "number_of", lambda _: 3)
        monkeypatch.setattr(UioDevice, "open", self._open)
        monkeypatch.setattr(tcmu.loop, "check_size", lambda *arguments: self.steps.append(arguments))
        monkeypatch.setattr(tcmu, "time", SimpleNamespace(monotonic=lambda: sum(self.slept), sleep=self.slept_append))
        self.slept: list[float] = []

    def slept_append(self, seconds: float) -> None:
        self.slept.append(seconds)

    def _open(self, number: int) -> UioDevice:
        assert number == 3
        if self.busy:
            self.busy -= 1
            raise DeviceBusyError("/dev/uio3: served by another process")
        self.steps.append(("open",))
        return UioDevice(self.kernel.event, self.kernel.memory)


@pytest.fixture
def recovery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recovery]:
    found = Recovery(tmp_path / "device", monkeypatch)
    yield found
    found.kernel.kernel.close()
    if ("open",) not in found.steps:
        os.close(found.kernel.event)


def test_the_next_server_blocks_the_device_while_it_resets_the_ring(recovery: Recovery) -> None:
    recovery.busy = 3  # the dead server's last thread
    device = TcmuDevice(recovery.blob, recovery.directory, name="one", recover=True)
    store = tcmu._target(recovery.directory).backstore.name
    assert recovery.steps == [
        (DISK, 8192, "one"),
        ("open",),
        (store, "block_dev", "1"),
        (store, "reset_ring", "1"),
        (store, "block_dev", "0"),
    ]
    assert recovery.slept == [0.01] * 3
    assert device.path == DISK
    assert recovery.kernel.do(read_10(0, 8), room=4096).status == 0
    device._server.end()
    assert device.wait(30)


def test_a_device_that_another_process_serves_stays_its_own(recovery: Recovery) -> None:
    recovery.busy = 10**6
    with pytest.raises(DeviceBusyError):
        TcmuDevice(recovery.blob, recovery.directory, recover=True)
    assert sum(recovery.slept) == pytest.approx(10.0, abs=0.05)
    recovery.node = None
    with pytest.raises(DeviceError, match="device: no TCMU device is there to go on with"):
        TcmuDevice(recovery.blob, recovery.directory, recover=True)


def test_a_recovery_that_fails_unblocks_the_device_and_closes_it(recovery: Recovery) -> None:
    struct.pack_into("=H", recovery.kernel.memory, 0, 1)  # another version of the mailbox
    with pytest.raises(RingError, match="version"):
        TcmuDevice(recovery.blob, recovery.directory, recover=True)
    assert recovery.steps[-1][1:] == ("block_dev", "0")
    assert recovery.kernel.memory.closed


class Disks:
    """Notes what is done to take a disk away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[object, ...]] = []
        self.node: Path | None = DISK
        monkeypatch.setattr(configfs, "disk_of", lambda _: self.node)
        monkeypatch.setattr(configfs, "set_offline", lambda disk: self.steps.append(("offline", disk)))
        monkeypatch.setattr(configfs, "settle", lambda _, disk, s: self.steps.append(("settle", disk, s)))
        monkeypatch.setattr(configfs, "remove", lambda target: self.steps.append(("remove", target.loop.name)))
        monkeypatch.setattr(tcmu, "wait_unused", lambda disk: self.steps.append(("unused", disk)))


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> Disks:
    return Disks(monkeypatch)


@pytest.mark.parametrize(
    ("force", "timeout_s", "settles_s"), [(False, 10.0, 10.0), (False, 0.5, 0.5), (True, 10.0, 1.0), (True, 0.5, 0.5)]
)
def test_a_disk_goes_offline_before_it_is_removed(
    disks: Disks, tmp_path: Path, force: bool, timeout_s: float, settles_s: float
) -> None:
    tcmu.take_down(tmp_path, timeout_s=timeout_s, force=force)
    removed = ("remove", tcmu._target(tmp_path).loop.name)
    steps = [("unused", DISK), ("offline", DISK), ("settle", DISK, settles_s), removed]
    assert disks.steps == steps[force:]
    assert tcmu.devices_of(tmp_path) == [DISK]
    disks.steps.clear()
    disks.node = None
    tcmu.take_down(tmp_path, force=force)
    assert disks.steps == [removed]  # of a device that was never exported
    assert tcmu.devices_of(tmp_path) == []


def test_an_abandoned_disk_is_settled_at_once_and_stays(disks: Disks, tmp_path: Path) -> None:
    tcmu.abandon(tmp_path)
    assert disks.steps == [("offline", DISK), ("settle", DISK, 0.0)]


def test_directories_are_found_by_what_their_devices_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, comma, elsewhere = tmp_path / "one", tmp_path / "t,wo", tmp_path / "below" / "three"
    found = {
        1: UioName("88", "dev_1", "obdlab", tcmu._label(one)),
        2: UioName("88", "dev_2", "obdlab", tcmu._label(comma)),
        3: UioName("88", "dev_3", "obdlab", tcmu._label(elsewhere)),
        4: UioName("88", "dev_4", "overlaybd", tcmu._label(tmp_path / "four")),
        5: UioName("88", "dev_5", "obdlab", f"{'0' * 32}:five"),
    }
    monkeypatch.setattr(tcmu, "devices", lambda: found)
    assert tcmu.directories_below(tmp_path) == {one}
    assert tcmu.directories_below(tmp_path / "below") == {elsewhere}


def test_texts_for_the_kernel_have_no_comma_and_fit(tmp_path: Path) -> None:
    name = hashlib.sha256(os.fsencode(tmp_path / "a,b")).hexdigest()
    assert tcmu._label(tmp_path / "a,b") == f"{name[:32]}:a_b"
    assert len(tcmu._label(tmp_path / ("d" * 250))) == 200
