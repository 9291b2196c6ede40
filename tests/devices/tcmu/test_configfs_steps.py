"""Each step of making a TCMU disk and of taking it away: values, order, patience and errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from obdlab.devices.tcmu import configfs
from obdlab.devices.tcmu.configfs import Target
from obdlab.errors import DeviceError
from obdlab.system import pauses
from tests.devices.tcmu.tree import Tree

DISK = Path("/dev/sdx")


class Host:
    """Trees of configfs, /sys and /dev below ``root``; notes what is written. Its clock is its own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (root / "target").mkdir()
        self.tree = Tree(root / "target", monkeypatch)
        self.root = root
        self.slept: list[float] = []
        self.written: list[tuple[str, str]] = []
        self.refusals: dict[str, list[int]] = {}
        self._write_text, self._open, self._listdir = Path.write_text, os.open, os.listdir
        clock = SimpleNamespace(monotonic=lambda: 100 + sum(self.slept), sleep=self.slept.append)
        monkeypatch.setattr(configfs, "time", clock)
        monkeypatch.setattr(pauses, "time", clock)
        monkeypatch.setattr(configfs, "Path", self._path)
        monkeypatch.setattr(configfs, "write_attribute", self._write)
        monkeypatch.setattr(os, "listdir", lambda path: self._listdir(self._path(path)))
        self.target = Target.of("7")

    def _path(self, *parts: str | Path) -> Path:
        path = Path(*parts)
        return self.root / path.relative_to("/") if path.parts[:2] in (("/", "sys"), ("/", "dev")) else path

    def _write(self, path: Path, text: str) -> None:
        if self.refusals.get(path.name):
            code = self.refusals[path.name].pop(0)
            raise OSError(code, os.strerror(code))
        self.written.append((path.name, text))
        self._write_text(path, text)

    def add_disk(self, name: str = "sdx", address: str = "7:0:1") -> Path:
        """Have the kernel make a disk; return its directory in /sys."""
        directory = self.root / f"sys/class/scsi_device/{address}:0/device"
        (directory / "block" / name).mkdir(parents=True)
        (self.root / "dev").mkdir(exist_ok=True)
        (self.root / "dev" / name).touch()
        (self.root / "sys/block" / name / "device").mkdir(parents=True)
        return directory

    def in_flight(self, text: str) -> None:
        self._write_text(self.root / "sys/block/sdx/inflight", text)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_a_backstore_gets_its_options_one_by_one_then_is_enabled_and_waits_for_ever(host: Host) -> None:
    configfs.create(host.target, "obdlab/x", ("a=1", "b=2"))
    controls = [("control", text) for text in ("dev_config=obdlab/x", "a=1", "b=2")]
    assert host.written == [*controls, ("enable", "1"), ("cmd_time_out", "2147483")]
    configfs.remove(host.target)
    host.written.clear()
    configfs.create(host.target, "x" * 255)
    assert host.written[:2] == [("control", "dev_config=" + "x" * 255), ("control", "max_data_area_mb=4")]


def test_only_root_sees_a_backstore_and_its_export(host: Host) -> None:
    host.add_disk()
    configfs.create(host.target, "obdlab/x")
    configfs.export(host.target)
    directories = (host.target.backstore.parent, host.target.backstore, host.target.loop, host.target.lun)
    assert [directory.stat().st_mode & 0o777 for directory in directories] == [0o700] * 4


@pytest.mark.parametrize("file", ["control", "enable", "cmd_time_out"])
def test_a_backstore_that_the_kernel_refuses_is_taken_back(host: Host, file: str) -> None:
    host.refusals[file] = [errno.EINVAL]
    with pytest.raises(DeviceError, match="Invalid argument"):
        configfs.create(host.target, "obdlab/x")
    assert host.tree.left() == []


def test_a_handler_that_starts_is_waited_for(host: Host) -> None:
    host.refusals["enable"] = [errno.EAGAIN] * 99
    configfs.create(host.target, "obdlab/x")
    assert host.slept == [0.05] * 99


def test_a_handler_that_does_not_come_is_an_error(host: Host) -> None:
    host.refusals["enable"] = [errno.EAGAIN] * 100
    with pytest.raises(DeviceError, match="dev_7: its handler refused it: Resource temporarily unavailable"):
        configfs.create(host.target, "obdlab/x")
    assert (len(host.slept), host.refusals["enable"]) == (99, [])


def test_a_refusal_of_the_handler_is_not_waited_for(host: Host) -> None:
    host.refusals["enable"] = [errno.ENOENT]
    with pytest.raises(DeviceError, match="its handler refused it: No such file or directory"):
        configfs.create(host.target, "obdlab/x")
    assert host.slept == []


def test_an_export_is_a_disk_that_does_not_time_out(host: Host) -> None:
    directory = host.add_disk()
    configfs.create(host.target, "obdlab/x")
    before = os.listdir("/proc/self/fd")
    assert configfs.export(host.target) == host.root / "dev/sdx"
    assert (directory / "timeout").read_text() == "2147483"
    assert ("nexus", "naa.1990000000000007") in host.written
    assert configfs.disk_of(host.target) == host.root / "dev/sdx"
    assert os.listdir("/proc/self/fd") == before


def test_a_disk_is_looked_for_until_it_is_there_and_opens(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.add_disk()
    failures = [errno.ENOENT, errno.ENXIO, errno.ENODEV]
    opened = os.open

    def late(path: Path, flags: int) -> int:
        if Path(path).name == "sdx" and failures:
            code = failures.pop()
            raise OSError(code, os.strerror(code))
        return opened(path, flags)

    monkeypatch.setattr(os, "open", late)
    configfs.create(host.target, "obdlab/x")
    assert configfs.export(host.target) == host.root / "dev/sdx"
    assert host.slept == [0.01] * 3


def test_other_errors_of_opening_a_disk_end_the_export(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.add_disk()
    configfs.create(host.target, "obdlab/x")

    def refuse(path: Path, flags: int) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(DeviceError, match=r"naa\..*: cannot export \(Permission denied\): is tcm_loop loaded"):
            configfs.export(host.target)
    assert not host.target.loop.exists()
    assert host.slept == []


def test_a_disk_that_does_not_come_is_an_error_in_time(host: Host) -> None:
    configfs.create(host.target, "obdlab/x")
    with pytest.raises(DeviceError, match=r"SCSI device 7:0:1:0: no disk came of it within 2\.5 s"):
        configfs.export(host.target, timeout_s=2.5)
    assert sum(host.slept) == pytest.approx(2.5, abs=0.02)


def test_an_attach_whose_export_fails_leaves_no_backstore(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Target) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(configfs, "export", fails)
        with pytest.raises(KeyboardInterrupt):
            configfs.attach("7", Path("/a/config.v1.json"))
    assert host.tree.left() == []


def test_an_attach_names_image_tenant_and_live_id(host: Host) -> None:
    host.add_disk()
    config = Path("/a/config.v1.json")
    assert configfs.attach("7", config, tenant=5, live_id="live") == host.root / "dev/sdx"
    assert (host.tree.root / "core/user_5/dev_7").is_dir()
    assert ("control", "dev_config=overlaybd//a/config.v1.json;live") in host.written
    assert ("nexus", "naa.1050000000000007") in host.written
    configfs.remove(Target.of("7", 5))
    assert not (host.tree.root / "core/user_5/dev_7").exists()


def test_a_disk_is_set_offline(host: Host) -> None:
    host.add_disk()
    configfs.set_offline(DISK)
    assert (host.root / "sys/block/sdx/device/state").read_text() == "offline"
    configfs.set_offline(Path("/dev/sdy"))  # gone


@pytest.mark.parametrize(("text", "under_way"), [("       0        0\n", False), ("0 1\n", True), ("2 0\n", True)])
def test_requests_under_way_are_reads_or_writes(host: Host, text: str, under_way: bool) -> None:
    host.add_disk()
    assert configfs._in_flight(DISK) is False
    host.in_flight(text)
    assert configfs._in_flight(DISK) is under_way


def test_a_quiet_disk_is_settled_by_forgetting_its_cache(host: Host) -> None:
    directory = host.add_disk()
    cache = host.root / "sys/block/sdx/device/scsi_disk/7:0:1:0"
    cache.mkdir(parents=True)
    (cache / "cache_type").touch()
    host.in_flight("0 0")
    configfs.settle(host.target, DISK, 1.0)
    assert (cache / "cache_type").read_text() == "temporary write through"
    host.refusals["cache_type"] = [errno.EINVAL]
    configfs.settle(host.target, DISK, 1.0)  # an older kernel: its flush waits
    assert host.refusals["cache_type"] == []
    assert host.slept == []
    assert directory.is_dir()


def test_requests_that_nobody_answers_fail_after_their_time(host: Host) -> None:
    host.add_disk()
    configfs.create(host.target, "obdlab/x")
    (host.target.backstore / "action").mkdir()
    host.in_flight("1 0")
    host.written.clear()
    configfs.settle(host.target, DISK, 0.5)
    assert host.written == [("block_dev", "1"), ("reset_ring", "2")]
    assert sum(host.slept) == pytest.approx(0.5, abs=0.02)
    assert set(host.slept) == {0.01}


def test_requests_that_end_in_time_are_left_to_their_server(host: Host) -> None:
    host.add_disk()
    host.in_flight("1 0")
    slept = host.slept

    class Ends(list[float]):
        def append(self, seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 3:
                host.in_flight("0 0")

    pauses.time.sleep = Ends().append  # type: ignore[attr-defined]
    configfs.settle(host.target, DISK, 60)
    assert (len(slept), host.written) == (3, [])


def test_what_is_gone_needs_no_removal_and_what_is_kept_is_an_error(host: Host, tmp_path: Path) -> None:
    configfs.take_away(tmp_path / "gone")
    (tmp_path / "full" / "child").mkdir(parents=True)
    with pytest.raises(DeviceError, match="full: cannot remove: Directory not empty"):
        configfs.take_away(tmp_path / "full")
    (tmp_path / "link").symlink_to("full")
    configfs.take_away(tmp_path / "link")
    configfs.take_away(tmp_path / "full/child")
    configfs.take_away(tmp_path / "full")
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize("device_id", ["é", "a_b", "a-b", "a b"])
def test_ids_have_letters_and_digits_of_ascii(device_id: str) -> None:
    with pytest.raises(DeviceError, match="device id: 13 letters or digits at most"):
        Target.of(device_id)


def test_the_longest_id_fills_the_name(host: Host) -> None:
    assert Target.of("1234567890abc").loop.name == "naa.1991234567890abc"


def test_a_relative_config_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert configfs.dev_config_of(Path("config.v1.json")) == f"overlaybd/{tmp_path}/config.v1.json"
