"""What a device over FUSE and loop asks of both: files stand for the served file, and calls of loop are noted."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from obdlab.blob import Blob, MemoryBlob
from obdlab.devices import fuse, fuse_loop, loop
from obdlab.devices.fuse import FuseServer
from obdlab.devices.fuse_loop import KIND, FuseLoop, FuseLoopDevice, label_below
from obdlab.devices.kind import Place
from obdlab.errors import DeviceError
from tests.devices.blobs import MemoryWritable

NODE = Path("/dev/loop3")


def label(directory: Path) -> str:
    return f"obdlab:{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}:{directory.name}"[:63]


class Host:
    """Notes the calls; the served file and its directory are those of ``root``."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.served: list[tuple[FuseServer, int | None]] = []
        self.waited: list[float | None] = []
        self.ends = True
        self.attached: list[dict[str, object]] = []
        self.below: list[dict[str, object]] = []
        self.detached: list[tuple[str, Path, str, float]] = []
        self.unused: list[Path] = []
        self.found: dict[Path, str] = {}
        self.trouble: DeviceError | None = None
        (root / "disk").touch()
        (root / "below").touch()
        monkeypatch.setattr(FuseServer, "start", lambda server, connection: self._start(server, connection))
        monkeypatch.setattr(FuseServer, "wait", lambda _, timeout_s: self._wait(timeout_s))
        monkeypatch.setattr(loop, "attach", self._attach)
        monkeypatch.setattr(loop, "attach_while_open", self._attach_below)
        monkeypatch.setattr(
            loop, "labelled", lambda prefix: [d for d, t in self.found.items() if t.startswith(prefix)]
        )
        monkeypatch.setattr(loop, "label_of", lambda device: self.found.get(device, ""))
        monkeypatch.setattr(loop, "detach", self._detach)
        monkeypatch.setattr(loop, "detach_when_unused", self._detach_when_unused)
        monkeypatch.setattr(fuse_loop, "wait_unused", self.unused.append)

    def _start(self, server: FuseServer, connection: int | None) -> int:
        self.served.append((server, connection))
        return os.open(self.root, os.O_RDONLY)

    def _wait(self, timeout_s: float | None) -> bool:
        self.waited.append(timeout_s)
        return self.ends

    def _attach(self, disk: int, **options: object) -> Path:
        self._refuse()
        self.attached.append({"on": Path(os.readlink(f"/proc/self/fd/{disk}")).name} | options)
        return NODE

    def _attach_below(self, disk: int, **options: object) -> tuple[Path, int]:
        self.below.append({"on": Path(os.readlink(f"/proc/self/fd/{disk}")).name} | options)
        return Path("/dev/loop4"), os.open(self.root / "below", os.O_RDONLY)

    def _detach(self, device: Path, *, label: str, timeout_s: float) -> None:
        self._refuse()
        self.detached.append(("at once", device, label, timeout_s))

    def _detach_when_unused(self, device: Path, *, label: str) -> None:
        self.detached.append(("later", device, label, 0))

    def _refuse(self) -> None:
        if self.trouble is not None:
            raise self.trouble


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def options(**changed: object) -> dict[str, object]:
    usual = {"on": "disk", "read_only": True, "sector_size": 512, "readahead_kib": 128}
    return usual | changed


def test_a_device_is_attached_to_the_served_file_and_keeps_nothing_else_open(host: Host) -> None:
    before = os.listdir("/proc/self/fd")
    device = FuseLoopDevice(MemoryBlob(bytes(512)), host.root, name="one")
    assert host.attached == [options(label=label(host.root))]
    assert (host.below, host.waited) == ([], [])
    assert (device.path, device.size, device.read_only) == (NODE, 512, True)
    assert (device.kind, device.can_graduate, device.can_change_servers) == ("fuse+loop", True, False)
    ((server, connection),) = host.served
    assert (server.name, server.read_only, connection) == ("one", True, None)
    assert os.listdir("/proc/self/fd") == before


def test_options_go_to_the_parts_that_they_belong_to(host: Host) -> None:
    blob = MemoryWritable(8192)
    device = FuseLoopDevice(
        blob, host.root, sector_size=4096, readahead_kib=4, connection=5, max_threads=7, on_busy=lambda: None
    )
    assert host.attached == [options(label=label(host.root), read_only=False, sector_size=4096, readahead_kib=4)]
    ((server, connection),) = host.served
    assert (connection, server._crew._limit, server._on_busy is None) == (5, 7, False)
    assert device.read_only is False
    FuseLoopDevice(blob, host.root, read_only=True)
    assert host.attached[-1]["read_only"] is True
    assert host.served[-1][0]._crew._limit == 256


def test_an_exchangeable_device_that_is_read_only_gets_another_below(host: Host) -> None:
    before = os.listdir("/proc/self/fd")
    FuseLoopDevice(MemoryBlob(bytes(4096)), host.root, sector_size=4096, exchangeable=True)
    assert host.below == [{"on": "disk", "label": label_below(host.root), "sector_size": 4096}]
    assert host.attached == [options(on="below", label=label(host.root), sector_size=4096)]
    assert os.listdir("/proc/self/fd") == before
    FuseLoopDevice(MemoryWritable(4096), host.root, exchangeable=True)
    assert len(host.below) == 1
    assert host.attached[-1]["on"] == "disk"


def test_a_refusal_ends_the_server_and_closes_all(host: Host) -> None:
    host.trouble = DeviceError("refused")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(DeviceError, match="refused"):
        FuseLoopDevice(MemoryBlob(bytes(512)), host.root)
    assert len(host.waited) == 1
    assert host.waited[0]
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(DeviceError, match="512-byte sectors"):
        FuseLoopDevice(MemoryBlob(bytes(511)), host.root)


def test_growing_tells_fuse_first_and_then_loop(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    blob, told = MemoryWritable(512), []
    device = FuseLoopDevice(blob, host.root)
    monkeypatch.setattr(FuseServer, "forget_size", lambda _: told.append("fuse"))
    monkeypatch.setattr(loop, "update_size", told.append)
    blob.data.extend(bytes(512))
    device.take_on_size()
    assert told == ["fuse", NODE]
    assert device.size == 1024


def test_use_is_that_of_the_loop_device(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FuseLoopDevice(MemoryBlob(bytes(512)), host.root)
    for used in (True, False):
        monkeypatch.setattr(loop, "in_use", {NODE: used}.__getitem__)
        assert device.in_use is used


def test_a_device_stops_once_its_requests_are_answered(host: Host) -> None:
    device = FuseLoopDevice(MemoryBlob(bytes(512)), host.root)
    host.found[NODE] = label(host.root)
    assert device.wait(2.5) is True
    device.stop(timeout_s=4.0)
    assert host.detached == [("at once", NODE, label(host.root), 4.0)]
    assert host.waited == [2.5, 4.0]
    host.ends = False
    with pytest.raises(
        DeviceError, match=r"/dev/loop3: requests are still being served 0\.5 s after it was detached"
    ):
        device.stop(timeout_s=0.5)
    assert device.wait(0) is False
    assert device.statistics().reads == 0


def test_devices_are_taken_down_by_label(host: Host, tmp_path: Path) -> None:
    ours, leftover, other = Path("/dev/loop1"), Path("/dev/loop2"), Path("/dev/loop5")
    host.found = {ours: label(tmp_path), leftover: label(tmp_path), other: label(tmp_path.parent)}
    assert KIND.devices_of(tmp_path) == [ours, leftover]
    KIND.take_down(tmp_path, timeout_s=3.0)
    assert host.unused == [ours, leftover]
    assert host.detached == [("at once", device, label(tmp_path), 3.0) for device in (ours, leftover)]
    host.trouble = DeviceError("still in use")
    with pytest.raises(DeviceError, match="still in use"):
        KIND.take_down(tmp_path)
    assert host.unused == [ours, leftover, ours]


@pytest.mark.parametrize(("timeout_s", "waits_s"), [(0.5, 0.5), (10.0, 1.0)])
def test_force_asks_for_no_unused_device_and_waits_a_second(
    host: Host, tmp_path: Path, timeout_s: float, waits_s: float
) -> None:
    host.found = {NODE: label(tmp_path)}
    KIND.take_down(tmp_path, timeout_s=timeout_s, force=True)
    assert host.detached == [("at once", NODE, label(tmp_path), waits_s)]
    host.trouble = DeviceError("still in use")
    KIND.take_down(tmp_path, force=True)
    assert host.unused == []


def test_devices_can_go_with_their_last_users(host: Host, tmp_path: Path) -> None:
    host.found = {NODE: label(tmp_path), Path("/dev/loop4"): "obdlab:other"}
    assert KIND.take_down_when_unused(tmp_path) is True
    assert host.detached == [("later", NODE, label(tmp_path), 0)]


def test_directories_are_found_by_their_labels(host: Host, tmp_path: Path) -> None:
    one, two, nested = tmp_path / "one", tmp_path / "t" / "two", tmp_path / "with:colon"
    for number, directory in enumerate((one, two, nested)):
        host.found[Path(f"/dev/loop{number}")] = label(directory)
    host.found[Path("/dev/loop9")] = label_below(one)
    host.found[Path("/dev/loop8")] = "obdlab:0123456789abcdef:one"
    assert KIND.directories_below(tmp_path) == {one}
    assert KIND.directories_below(tmp_path / "t") == {two}


def test_labels_fit_and_the_one_below_is_no_prefix_of_the_device(tmp_path: Path) -> None:
    short, long = tmp_path / "disk", tmp_path / ("d" * 80)
    assert label_below(short) == f"obdlab-below:{label(short).removeprefix('obdlab:')}"
    assert len(label_below(long)) == len(fuse_loop._label(long)) == 63
    assert fuse_loop._label(short) == label(short)
    assert not label_below(short).startswith("obdlab:")


def test_a_host_without_a_node_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "fuse", tmp_path / "loop-control"
    monkeypatch.setattr(FuseLoop, "nodes", (str(one), str(two)))
    assert KIND.missing() == f"{one}: No such file or directory"
    one.touch()
    assert KIND.missing() == f"{two}: No such file or directory"
    two.touch()
    assert KIND.missing() == ""


def test_the_kind_opens_a_device_as_its_place_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[Blob, Path, dict[str, object]]] = []
    monkeypatch.setattr(
        fuse_loop, "FuseLoopDevice", lambda blob, directory, **options: seen.append((blob, directory, options))
    )
    blob, busy = MemoryBlob(bytes(512)), lambda: None
    KIND.open(blob, Place(tmp_path, "one", 4, 5, NODE, busy, exchangeable=True))
    wanted = {"name": "one", "readahead_kib": 4, "connection": 5, "path": NODE, "on_busy": busy, "exchangeable": True}
    assert seen == [(blob, tmp_path, wanted)]


def test_the_kind_speaks_of_connections_as_fuse_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[int] = []
    monkeypatch.setattr(fuse, "open_connection", lambda: 5)
    monkeypatch.setattr(fuse, "has_ended", lambda connection: connection == 6)
    monkeypatch.setattr(fuse, "send_again", told.append)
    assert KIND.connect() == 5
    assert (KIND.has_ended(tmp_path, 5), KIND.has_ended(tmp_path, 6)) == (False, True)
    KIND.send_again(7)
    assert told == [7]
    for can in (True, False):
        monkeypatch.setattr(fuse, "can_send_again", lambda can=can: can)
        assert KIND.can_change_servers() is can
    assert (KIND.is_shared, KIND.is_file, KIND.preference) == (True, False, 0)
