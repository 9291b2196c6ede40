"""Images that were unpacked before: attached by a loop device alone, without server, device host and FUSE."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.cache.eviction import EvictingSpace
from obdlab.cache.space import disk_usage
from obdlab.cache.unpacked import FlatFileError, FlatFiles, remove_unused
from obdlab.cli.main import main
from obdlab.devices import loop
from obdlab.devices.fuse_loop import devices_of
from obdlab.errors import DeviceError
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.layerfiles.diskimport import import_disk
from obdlab.layerfiles.writing import Packing
from obdlab.layers.append import AppendUpper
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.server.live import LiveDevice
from obdlab.server.rundir import DeviceRecord, DeviceState
from obdlab.server.unpacking import graduate
from obdlab.settings.settings import Settings
from obdlab.system import abi, mount
from tests.devices.contract import MIB, read_direct
from tests.image.test_open_remote import push
from tests.server.killing import kill, kill_for_good, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.registry.server import RegistryServer

pytestmark = pytest.mark.kernel

SIZE = 8 * MIB


class Place:
    """A run directory, a cache, and an image of one layer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.content = os.urandom(3 * MIB) + bytes(2 * MIB) + os.urandom(SIZE - 5 * MIB)
        self.settings = Settings(cache_dir=directory / "cache")
        disk = directory / "disk.raw"
        disk.write_bytes(self.content)
        import_disk(disk, directory / "layer.obd", Packing(), kind="raw")
        self.config = directory / "config.json"
        self.save(result_file=str(directory / "result"))

    def save(self, **changes: object) -> Path:
        layer = LowerConfig(file=str(self.directory / "layer.obd"))
        replace(ImageConfig(lowers=(layer,)), **changes).save(self.config)
        return self.config

    @property
    def service(self) -> DeviceService:
        return DeviceService(self.directory / "run", self.settings)

    @property
    def disk(self) -> Path:
        (disk,) = (self.directory / "cache" / "graduated").glob("*/disk")
        return disk

    def unpack(self) -> None:
        """Have the image unpacked, by a device that is gone then; no process is left."""
        self.service.attach(self.config, "first")
        graduate(self.service.run_dir, "first")
        self.service.detach("first")
        self.service.stop_host()

    def reboot(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lose what a reboot loses: devices, the run directory; and have another boot id."""
        clean_up(self.service, force=True)
        shutil.rmtree(self.directory / "run")
        monkeypatch.setattr("obdlab.cache.unpacked.boot_id", lambda: "another")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path.resolve())
    yield place
    clean_up(place.service, force=True)
    assert not any(devices_of(place.directory / "run" / "devices" / name) for name in ("first", "x", "y"))


def test_a_node_that_is_another_devices_by_now_is_not_given_out(place: Place) -> None:
    place.unpack()
    service = place.service
    first = service.attach(place.config, "x")
    # The record stays, as after the last use of a released device.
    loop.detach(first.path, label=loop.label_of(first.path))
    second = service.attach(place.config, "y")
    assert second.path == first.path
    assert service.list() == [second]
    again = service.attach(place.config, "x")
    assert again.path != second.path
    assert service.detach("y")
    assert devices_of(service.run_dir.device("x")) == [again.path]
    assert service.detach("x")


def test_the_next_start_needs_no_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.unpack()
    shutil.rmtree(place.directory / "run")
    monkeypatch.setattr("obdlab.server.hostclient.HostClient.ask", lambda *_: pytest.fail("asked the host"))
    service = place.service
    assert service.is_unpacked(place.config)
    device = service.attach(place.config, "x")
    assert (device.graduated, device.alive, device.pid, device.keeper_pid) == (True, True, 0, 0)
    assert (device.state, device.read_only, device.size) == (DeviceState.GRADUATED, True, SIZE)
    assert not (place.directory / "run" / "host.sock").exists()
    assert loop.backing_of(device.path) == str(place.disk)
    assert read_direct(device.path, 0, SIZE) == place.content
    assert (place.directory / "result").read_text() == "success"
    assert service.attach(place.config, "x") == device
    assert service.list() == [device]
    assert graduate(service.run_dir, "x").path == place.disk
    assert "reads" in service.last_error("x")
    with pytest.raises(DeviceError, match="graduated, so it has no server"):
        LiveDevice(service, "x").start_recording()
    assert service.detach("x")
    assert not devices_of(service.run_dir.device("x"))
    assert not service.run_dir.device_directories()
    assert not service.detach("x")


def test_it_survives_a_reboot_which_has_it_checked_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.unpack()
    checks: list[str] = []
    check = FlatFiles.check
    monkeypatch.setattr(FlatFiles, "check", lambda *args: (checks.append(args[1]), check(*args)))
    assert place.service.attach(place.config, "x").graduated
    assert not checks  # the unpacking has just read it back
    place.reboot(monkeypatch)
    for name in ("x", "y"):
        device = place.service.attach(place.config, name)
        assert device.graduated
        assert read_direct(device.path, 0, SIZE) == place.content
    assert len(checks) == 1
    assert not (place.directory / "run" / "host.sock").exists()


@pytest.mark.parametrize("at", [0, 3 * MIB + 5, SIZE - 1])
def test_damage_is_found_when_it_is_taken_into_use(place: Place, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    place.unpack()
    disk = place.disk
    with disk.open("r+b") as file:
        file.seek(at)
        file.write(bytes([place.content[at] ^ 1]))
    device = place.service.attach(place.config, "x")
    assert not device.graduated
    assert not disk.exists()
    assert read_direct(device.path, 0, SIZE) == place.content


def test_a_check_that_would_take_too_long_leaves_it_served(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.unpack()
    place.reboot(monkeypatch)
    monkeypatch.setattr("obdlab.server.localattach._LONGEST_CHECK_S", 0.0)
    device = place.service.attach(place.config, "x")
    assert not device.graduated
    assert read_direct(device.path, 0, SIZE) == place.content
    graduate(place.service.run_dir, "x")  # checks it, and needs not unpack it again
    assert place.service.list()[0].graduated


def test_it_is_not_taken_from_its_users(place: Place) -> None:
    place.unpack()
    device = place.service.attach(place.config, "x")
    disk, space = place.disk, EvictingSpace(place.settings.cache_dir)
    assert remove_unused(space) == 0
    assert disk.exists()
    place.service.detach("x")
    assert remove_unused(space) > 0
    assert not disk.exists()
    assert not place.service.attach(place.config, "x").graduated
    assert device.graduated


def test_what_is_served_all_the_same(place: Place) -> None:
    place.unpack()
    assert not place.service.attach(place.config, "x", served=True).graduated
    for changes in ({"unpacked_disks": False}, {"device_kind": "tcmu"}):
        assert not DeviceService(place.directory / "run", replace(place.settings, **changes)).is_unpacked(
            place.config
        )
    empty = place.directory / "trace"
    empty.touch()
    assert not place.service.is_unpacked(place.save(record_trace_path=str(empty)))
    data, index = place.directory / "data", place.directory / "index"
    AppendUpper.create(data, index, SIZE).close()
    assert not place.service.is_unpacked(place.save(upper=UpperConfig(index=str(index), data=str(data))))
    assert not place.service.attach(place.config, "y").read_only
    assert not place.service.is_unpacked(place.directory / "missing.json")


def test_a_device_that_is_served_stays_so_and_a_dead_one_is_replaced(place: Place) -> None:
    served = place.service.attach(place.config, "x")
    place.service.attach(place.config, "first")
    graduate(place.service.run_dir, "first")
    assert place.service.attach(place.config, "x") == served
    kill_for_good(served)
    device = place.service.attach(place.config, "x")
    assert device.graduated
    assert read_direct(device.path, 0, SIZE) == place.content


def test_a_client_killed_before_the_record_leaves_what_the_next_one_replaces(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.unpack()
    with monkeypatch.context() as patch:
        patch.setattr(DeviceRecord, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            place.service.attach(place.config, "x")
    assert len(devices_of(place.service.run_dir.device("x"))) == 1
    assert place.service.list() == []
    device = place.service.attach(place.config, "x")
    assert device.graduated
    assert len(devices_of(place.service.run_dir.device("x"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(DeviceRecord, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            place.service.attach(place.config, "y")
    clean_up(place.service)
    assert not devices_of(place.service.run_dir.device("y"))


def test_another_image_under_the_id_is_refused(place: Place) -> None:
    place.unpack()
    place.service.attach(place.config, "x")
    other = place.directory / "other.json"
    shutil.copy(place.config, other)
    with pytest.raises(DeviceError, match="already attached for"):
        place.service.attach(other, "x")


@pytest.mark.tools("mkfs.ext4")
def test_the_commands_know_it(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    disk = place.directory / "ext4.raw"
    disk.write_bytes(bytes(SIZE))
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    (place.directory / "layer.obd").unlink()
    import_disk(disk, place.directory / "layer.obd", Packing(), kind="raw")
    place.unpack()
    target = place.directory / "mnt"
    target.mkdir()
    places = ["--run-dir", str(place.directory / "run"), "--cache-dir", str(place.settings.cache_dir)]
    config = str(place.config)
    assert main(["device", "mount", "--json", *places, config, str(target)]) == 0
    capsys.readouterr()
    try:
        assert (target / "lost+found").is_dir()
        assert main(["device", "list", *places]) == 0
        assert "graduated" in capsys.readouterr().out
        assert main(["device", "list", "--json", *places]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert (listed["state"], listed["pid"], listed["alive"]) == ("graduated", 0, True)
    finally:
        mount.unmount(target)
    assert main(["device", "detach", *places, listed["id"]]) == 0


@contextmanager
def small_file_system(target: Path, size: int) -> Iterator[None]:
    target.mkdir()
    abi.mount("small", target, "tmpfs", 0, f"size={size},mode=0700")
    try:
        yield
    finally:
        mount.unmount(target, lazy=True)


def test_a_full_disk_ends_in_the_served_state(place: Place) -> None:
    """It fills up while the image is unpacked: not before any byte is written, as a limit of the cache does."""
    with small_file_system(place.directory / "small", 10 * MIB):
        place.settings = Settings(cache_dir=place.directory / "small" / "cache", cache_quota=0, cache_min_free=0)
        filler = place.directory / "small" / "filler"

        def fill(done: int, _: int) -> None:
            if done == 5 * MIB:
                filler.write_bytes(bytes(6 * MIB))

        device = place.service.attach(place.config, "x")
        with pytest.raises(FlatFileError, match=r"No space|cache is full"):
            graduate(place.service.run_dir, "x", fill)
        assert place.service.list() == [device]
        assert not device.graduated
        assert read_direct(device.path, 0, SIZE) == place.content
        assert not [path for path in (place.settings.cache_dir / "graduated").rglob("*") if path.is_file()]
        filler.unlink()
        graduate(place.service.run_dir, "x")
        assert place.service.list()[0].graduated
        assert read_direct(device.path, 0, SIZE) == place.content
        place.service.detach("x")


def unpackers() -> list[int]:
    """The processes that unpack a device's image."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"graduate\0--run-dir" in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found


@pytest.mark.parametrize("rounds", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_while_it_is_unpacked_and_moved(place: Place, rounds: int) -> None:
    """Server or unpacker, at any time: each read has the right bytes, and nothing is left after a cleanup."""
    place.settings = replace(place.settings, graduation=True)
    chooser = random.Random(rounds)
    space = EvictingSpace(place.settings.cache_dir)
    graduated = 0
    for number in range(rounds):
        device = place.service.attach(place.config, "x")
        if number % 2:
            until(unpackers)
        time.sleep(chooser.uniform(0, 0.7))
        record = DeviceRecord.load(place.service.run_dir.device("x"))
        assert record is not None
        victims = unpackers() if chooser.random() < 0.5 else [record.pid]
        for pid in victims:
            with suppress(ProcessLookupError):
                kill(pid)
        assert read_direct(device.path, 0, SIZE) == place.content
        assert place.service.list()[0].alive
        if number % 3 == 0:
            graduate(place.service.run_dir, "x")
            assert read_direct(device.path, 0, SIZE) == place.content
        graduated += place.service.list()[0].graduated
        place.service.detach("x")
        until(lambda: not unpackers())
        clean_up(place.service)
        left = {path.name for path in (place.settings.cache_dir / "graduated").rglob("*") if path.is_file()}
        assert left in (set(), {"disk", "sums", "checked"})
        assert space.count() == disk_usage(space.directory)
        if left:
            local = place.service.attach(place.config, "y")
            assert local.graduated
            assert read_direct(local.path, 0, SIZE) == place.content
            place.service.detach("y")
        remove_unused(space)
    assert graduated


@pytest.mark.registry
def test_by_default_an_image_of_a_registry_becomes_local(place: Place, registry_server: RegistryServer) -> None:
    """After the delay: a device that is gone before causes nothing. With --served it keeps its server."""
    layer = place.directory / "layer.obd"
    config = push(registry_server, "local/default", [layer])
    place.save(lowers=config.lowers, repo_blob_url=config.repo_blob_url)

    def background() -> int:
        counters = place.service.statistics("x")["source"]
        return int(counters["background_bytes"])

    for changes, served in (({}, False), ({"download_delay_s": 0.0, "download_delay_extra_s": 0.0}, True)):
        place.settings = replace(place.settings, **changes)
        device = place.service.attach(place.config, "x", served=served)
        assert read_direct(device.path, 0, MIB) == place.content[:MIB]
        time.sleep(1.5)
        assert background() == 0
        assert not place.service.list()[0].graduated
        place.service.detach("x")
    device = place.service.attach(place.config, "x")
    until(lambda: place.service.list()[0].graduated, 120)
    assert read_direct(device.path, 0, SIZE) == place.content
    place.service.detach("x")
    assert place.service.attach(place.config, "y").graduated


@pytest.mark.registry
@pytest.mark.parametrize("rounds", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_while_it_completes(place: Place, registry_server: RegistryServer, rounds: int) -> None:
    """Its server, at any time: each read has the right bytes, and the image becomes local all the same."""
    config = push(registry_server, "local/killed", [place.directory / "layer.obd"])
    place.save(lowers=config.lowers, repo_blob_url=config.repo_blob_url)
    slowly = {"download_delay_s": 0.0, "download_delay_extra_s": 0.0, "download_bytes_per_s": 6.0 * MIB}
    place.settings = place.settings.with_values(slowly, name="test")
    chooser = random.Random(rounds)
    killed = 0
    for _ in range(rounds):
        device = place.service.attach(place.config, "x")
        for _ in range(4):
            time.sleep(chooser.uniform(0, 0.8))
            record = DeviceRecord.load(place.service.run_dir.device("x"))
            assert record is not None
            if record.is_graduated:
                break
            with suppress(ProcessLookupError):
                kill(record.pid)
                killed += 1
            at = chooser.randrange(SIZE // MIB) * MIB
            assert read_direct(device.path, at, MIB) == place.content[at : at + MIB]
            assert place.service.list()[0].alive
        until(lambda: place.service.list()[0].graduated, 120)
        assert read_direct(device.path, 0, SIZE) == place.content
        place.service.detach("x")
        until(lambda: not unpackers())
        clean_up(place.service)
        space = EvictingSpace(place.settings.cache_dir)
        assert space.count() == disk_usage(space.directory)
        shutil.rmtree(space.directory)
    assert killed
