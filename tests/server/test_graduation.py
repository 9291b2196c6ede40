"""Devices that the kernel goes on with alone: no I/O error, no wrong byte, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.cache.unpacked import FlatFileError
from obdlab.devices import loop
from obdlab.devices.fuse_loop import devices_of
from obdlab.errors import DeviceError
from obdlab.formats import oci
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.layerfiles.diskimport import import_disk
from obdlab.layerfiles.flatten import FlattenError
from obdlab.layerfiles.writing import Packing
from obdlab.layers.append import AppendUpper
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from obdlab.server import controlclient
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.server.messages import Graduate, Switched
from obdlab.server.rundir import DeviceRecord
from obdlab.server.unpacking import graduate
from obdlab.settings.settings import Settings
from obdlab.system import mount
from obdlab.system.processes import Process
from tests.devices.contract import MIB, read_direct
from tests.registry.server import running_registry
from tests.server.killing import kill, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obdlab.server.client import AttachedDevice

pytestmark = pytest.mark.kernel

SIZE = 16 * MIB
needs_fio = pytest.mark.tools("fio")
FIO = ["fio", "--name=job", "--ioengine=libaio", "--iodepth=16", "--bs=4k", "--verify=crc32c", "--verify_fatal=1"]
ROUNDS = [1, pytest.param(50, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceService]:
    """One for all tests: starting it takes longer than they do."""
    made = DeviceService(tmp_path_factory.mktemp("host").resolve() / "run", Settings())
    made.start_host()
    yield made
    clean_up(made, force=True)


@pytest.fixture
def service(host: DeviceService, tmp_path: Path) -> Iterator[DeviceService]:
    made = DeviceService(host.run_dir.path, Settings(cache_dir=tmp_path / "cache"))
    yield made
    for directory in made.run_dir.device_directories():
        made.detach(directory.name, force=True)


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose blocks fio can check."""
    path = tmp_path_factory.mktemp("pattern") / "file"
    command = [*FIO, f"--filename={path}", f"--size={SIZE}", "--rw=write", "--do_verify=0", "--refill_buffers"]
    subprocess.run(command, check=True, capture_output=True, cwd=path.parent)
    return path


def image_of(disk: Path) -> Path:
    """The configuration of an image of one ZFile layer that holds this disk."""
    layer, config = disk.with_suffix(".obd"), disk.with_suffix(".json")
    import_disk(disk, layer, Packing(), kind="raw")
    ImageConfig(lowers=(LowerConfig(file=str(layer)),)).save(config)
    return config


def file_system(pattern: Path, folder: Path, kind: str) -> Path:
    disk, tree = folder / "disk.raw", folder / "tree"
    tree.mkdir()
    shutil.copy(pattern, tree / "file")
    if kind == "erofs":
        command = ["mkfs.erofs", "-b4096", str(disk), str(tree)]
    else:
        os.truncate(os.open(disk, os.O_CREAT | os.O_WRONLY), 2 * SIZE)
        command = ["mkfs.ext4", "-q", "-d", str(tree), str(disk)]
    subprocess.run(command, check=True, capture_output=True)
    return disk


def checked_reads(target: Path, while_: Callable[[], object]) -> None:
    """Read blocks at random and check them, before, while and after ``while_()`` runs."""
    command = [*FIO, f"--filename={target}", "--readonly", "--direct=1", "--rw=randread", f"--size={SIZE}"]
    command += ["--verify_state_save=0", "--output-format=json", "--time_based", "--runtime=300"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as fio:
        try:
            until(lambda: fio.poll() is not None or reads_of(fio.pid))
            assert fio.poll() is None
            while_()
            before = reads_of(fio.pid)
            until(lambda: fio.poll() is not None or reads_of(fio.pid) > before + MIB)
            assert fio.poll() is None, "fio ended because of an error"
        finally:
            fio.send_signal(2)
            out, err = fio.communicate(timeout=60)
    (job,) = json.loads(out[out.index("{") :])["jobs"]
    assert job["error"] == 0, err
    assert job["read"]["io_bytes"] > 0


def reads_of(pid: int) -> int:
    total = 0
    for each in Path("/proc").glob(f"{pid}/task/{pid}/children"):
        for child in each.read_text().split():
            lines = Path(f"/proc/{child}/io").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
    return total


def processes_of(device: AttachedDevice) -> list[Process]:
    return [process for pid in (device.pid, device.keeper_pid) if (process := Process.of(pid)) is not None]


def assert_graduated(service: DeviceService, processes: list[Process]) -> None:
    (device,) = service.list()
    assert device.graduated
    assert device.alive
    until(lambda: not any(process.alive for process in processes))
    assert loop.in_use(device.path) or device.path in devices_of(service.run_dir.device("x"))


@needs_fio
@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_bare_device_under_load(service: DeviceService, pattern: Path, tmp_path: Path, rounds: int) -> None:
    config = image_of(Path(shutil.copy(pattern, tmp_path / "disk.raw")))
    for _ in range(rounds):
        device = service.attach(config, "x")
        processes = processes_of(device)
        checked_reads(device.path, lambda: graduate(service.run_dir, "x"))
        assert_graduated(service, processes)
        assert service.attach(config, "x").path == device.path
        service.detach("x")
        assert not service.run_dir.device_directories()
        assert not devices_of(service.run_dir.device("x"))


@needs_fio
@pytest.mark.parametrize("kind", ["erofs", "ext4"])
def test_a_mounted_file_system_under_load(service: DeviceService, pattern: Path, tmp_path: Path, kind: str) -> None:
    """EROFS with a device as it is by default, ext4 with one that was attached to graduate by itself."""
    settings = Settings(cache_dir=tmp_path / "cache", graduation=kind == "ext4")
    service = DeviceService(service.run_dir.path, settings)
    config = image_of(file_system(pattern, tmp_path, kind))
    target = tmp_path / "mnt"
    target.mkdir()
    device = service.attach(config, "x")
    processes = processes_of(device)
    service.mount(device, target)
    try:
        if kind == "erofs":
            checked_reads(target / "file", lambda: graduate(service.run_dir, "x"))
        else:
            checked_reads(target / "file", lambda: until(lambda: service.list()[0].graduated, 120))
        assert_graduated(service, processes)
        assert (target / "file").read_bytes() == pattern.read_bytes()
        with pytest.raises(DeviceError, match="in use"):
            service.detach("x")
        below = loop.backing_of(device.path)
    finally:
        mount.unmount(target)
    service.detach("x")
    if kind == "ext4":
        until(lambda: loop.backing_of(Path(below)) == "")


def test_a_mounted_ext4_keeps_its_server_by_default(service: DeviceService, pattern: Path, tmp_path: Path) -> None:
    config = image_of(file_system(pattern, tmp_path, "ext4"))
    target = tmp_path / "mnt"
    target.mkdir()
    device = service.attach(config, "x")
    service.mount(device, target)
    try:
        with pytest.raises(DeviceError, match="a mounted ext4 would not survive"):
            graduate(service.run_dir, "x")
        assert (target / "file").read_bytes() == pattern.read_bytes()
        assert not service.list()[0].graduated
        assert Process.of(device.pid) is not None
    finally:
        mount.unmount(target)


def test_devices_of_one_image_share_a_file(service: DeviceService, pattern: Path, tmp_path: Path) -> None:
    config = image_of(Path(shutil.copy(pattern, tmp_path / "disk.raw")))
    other = tmp_path / "other.json"
    shutil.copy(config, other)
    service.attach(config, "x")
    service.attach(other, "y")
    files = {graduate(service.run_dir, name).path for name in ("x", "y")}
    assert len(files) == 1
    assert len(list((tmp_path / "cache" / "graduated").iterdir())) == 1
    wanted = pattern.read_bytes()[:MIB]
    assert {read_direct(device.path, 0, MIB) for device in service.list()} == {wanted}


def test_a_server_killed_while_its_image_is_unpacked(service: DeviceService, pattern: Path, tmp_path: Path) -> None:
    config = image_of(Path(shutil.copy(pattern, tmp_path / "disk.raw")))
    device = service.attach(config, "x")
    killed: list[int] = []

    def progress(done: int, _: int) -> None:
        if done and not killed:
            killed.append(device.pid)
            kill(device.pid)
            until(lambda: (record := DeviceRecord.load(service.run_dir.device("x"))) and record.pid != device.pid)

    graduate(service.run_dir, "x", progress)
    assert killed
    assert service.list()[0].graduated
    assert read_direct(device.path, MIB, MIB) == pattern.read_bytes()[MIB : 2 * MIB]


def test_what_cannot_graduate(service: DeviceService, pattern: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="not attached"):
        graduate(service.run_dir, "x")
    data, index, config = tmp_path / "data", tmp_path / "index", tmp_path / "writable.json"
    AppendUpper.create(data, index, MIB).close()
    ImageConfig(upper=UpperConfig(index=str(index), data=str(data))).save(config)
    service.attach(config, "w")
    with pytest.raises(DeviceError, match="writable"):
        graduate(service.run_dir, "w")


def test_settings_forbid_unpacked_disks(service: DeviceService, pattern: Path, tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path / "cache", graduation=True, unpacked_disks=False)
    service = DeviceService(service.run_dir.path, settings)
    device = service.attach(image_of(Path(shutil.copy(pattern, tmp_path / "disk.raw"))), "x")
    with pytest.raises(DeviceError, match="forbid unpacked disks"):
        graduate(service.run_dir, "x")
    # The device's server refuses, too: any process may ask it.
    with pytest.raises(DeviceError, match="forbid unpacked disks"):
        controlclient.ask(service.run_dir.device("x"), Graduate("0" * 64), Switched, silence_s=60.0)
    assert not service.list()[0].graduated
    assert read_direct(device.path, 0, MIB) == pattern.read_bytes()[:MIB]
    assert not (tmp_path / "cache" / "graduated").exists()


def test_layers_that_were_replaced(service: DeviceService, pattern: Path, tmp_path: Path) -> None:
    """The device reads the file it has opened; what lies in its place now is another disk."""
    config = image_of(Path(shutil.copy(pattern, tmp_path / "disk.raw")))
    layer = tmp_path / "disk.obd"
    device = service.attach(config, "x")
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(SIZE - 4096) + bytes(range(256)) * 16)
    image_of(other).unlink()
    os.replace(tmp_path / "other.obd", layer)
    with pytest.raises(DeviceError, match="other files than those that were unpacked"):
        graduate(service.run_dir, "x")
    assert read_direct(device.path, 0, MIB) == pattern.read_bytes()[:MIB]


def test_no_room(service: DeviceService, pattern: Path, tmp_path: Path) -> None:
    service = DeviceService(service.run_dir.path, Settings(cache_dir=tmp_path / "cache", cache_quota=8 * MIB))
    config = image_of(Path(shutil.copy(pattern, tmp_path / "disk.raw")))
    device = service.attach(config, "x")
    with pytest.raises(FlatFileError, match="no room for an unpacked image"):
        graduate(service.run_dir, "x")
    assert read_direct(device.path, 0, MIB) == pattern.read_bytes()[:MIB]
    assert not list((tmp_path / "cache" / "graduated").glob("*/disk*"))


def test_an_image_of_a_registry(service: DeviceService, pattern: Path, tmp_path: Path) -> None:
    """Not before all of it is in the cache and checked; then by itself."""
    layer = tmp_path / "disk.obd"
    image_of(Path(shutil.copy(pattern, tmp_path / "disk.raw")))
    digest, size = oci.digest_of(layer.read_bytes()), layer.stat().st_size
    settings = Settings(cache_dir=tmp_path / "cache")
    downloading = replace(settings, graduation=True, download_enabled=True, download_delay_s=0)
    with running_registry(tmp_path / "registry") as server:
        client = RegistryClient()
        repository = client.repository(Reference.parse(f"{server.host}/image:1"))
        client.push_blob(repository, digest, size, lambda: layer.open("rb"))
        client.close()
        config = tmp_path / "config.json"
        ImageConfig(repository.blobs_url, lowers=(LowerConfig(digest=digest, size=size),)).save(config)
        service.attach(config, "x")
        with pytest.raises(FlattenError, match="1 of 1 layers are not in the cache whole"):
            graduate(service.run_dir, "x")
        service.detach("x")
        options = replace(downloading, download_delay_extra_s=0)
        device = DeviceService(service.run_dir.path, options).attach(config, "x")
        until(lambda: service.list()[0].graduated, 120)
    assert read_direct(device.path, 0, SIZE) == pattern.read_bytes()
