"""EROFS mounted straight from a served file."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.blob import MemoryBlob
from obdlab.contrib import fuse_file
from obdlab.contrib.fuse_file import FuseFileDevice, take_down
from obdlab.errors import DeviceError
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.layerfiles.diskimport import import_disk
from obdlab.layerfiles.writing import Packing
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.server.rundir import DeviceRecord
from obdlab.settings.settings import Settings
from obdlab.system import mount
from obdlab.system.processes import Process
from tests.devices.blobs import MemoryWritable
from tests.server.killing import kill, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.tools("mkfs.erofs"),
    pytest.mark.skipif(bool(os.geteuid()) or bool(fuse_file.kernel_refuses()), reason="no EROFS from a file here"),
]
CONTENT = {f"file{number}": os.urandom(70_000) for number in range(30)}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("erofs")
    (folder / "tree").mkdir()
    for name, content in CONTENT.items():
        (folder / "tree" / name).write_bytes(content)
    command = ["mkfs.erofs", "-b4096", str(folder / "disk.raw"), str(folder / "tree")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "disk.raw"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path.resolve() / "a b"
    path.mkdir()
    yield path
    while mount.is_mounted(path):
        mount.unmount(path, lazy=True)


@pytest.fixture
def service(tmp_path: Path, disk: Path) -> Iterator[DeviceService]:
    made = DeviceService(tmp_path.resolve() / "run", Settings(cache_dir=tmp_path / "cache", device_kind="fuse+file"))
    import_disk(disk, tmp_path / "layer.obd", Packing(), kind="raw")
    ImageConfig(lowers=(LowerConfig(file=str(tmp_path / "layer.obd")),)).save(tmp_path / "config.json")
    yield made
    clean_up(made, force=True)


def content_of(target: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}


def test_ends_with_its_mount(disk: Path, target: Path, tmp_path: Path) -> None:
    directory = tmp_path.resolve() / "its own"
    directory.mkdir()
    device = FuseFileDevice(MemoryBlob(disk.read_bytes()), directory)
    mount.mount(device.path, target, read_only=True)
    device.is_mounted_now()
    assert content_of(target) == CONTENT
    assert device.in_use
    with pytest.raises(DeviceError, match="still in use"):
        take_down(directory)
    mount.unmount(target)
    assert device.wait(30)
    take_down(directory)
    assert not device.path.is_symlink()


def test_one_that_nobody_mounted_is_taken_down(disk: Path, tmp_path: Path) -> None:
    device = FuseFileDevice(MemoryBlob(disk.read_bytes()), tmp_path)
    assert not device.in_use
    device.stop(30)


def test_refuses_all_but_read_only_erofs(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="holds no file system that is known"):
        FuseFileDevice(MemoryBlob(bytes(8192)), tmp_path)
    with pytest.raises(DeviceError, match="writable"):
        FuseFileDevice(MemoryWritable(8192), tmp_path)
    assert not list(tmp_path.iterdir())


def test_survives_its_server(service: DeviceService, target: Path, tmp_path: Path) -> None:
    device = service.attach(tmp_path / "config.json", "x")
    service.mount(device, target)
    second = tmp_path / "second"
    second.mkdir()
    service.mount(device, second)
    try:
        (target / "file0").read_bytes()
        kill(device.pid)
        assert content_of(target) == content_of(second) == CONTENT
        assert service.list()[0].restarts == 1
        with pytest.raises(DeviceError, match="still in use"):
            service.detach("x")
    finally:
        mount.unmount(second)
    record = DeviceRecord.load(service.run_dir.device("x"))
    assert record is not None
    mount.unmount(target)
    until(lambda: Process.of(record.pid) is None and Process.of(record.keeper_pid) is None)
    assert service.list() == []
    assert not service.run_dir.device_directories()


def test_cleanup_unmounts(service: DeviceService, target: Path, tmp_path: Path) -> None:
    service.mount(service.attach(tmp_path / "config.json", "x"), target)
    clean_up(service, force=True)
    assert not mount.is_mounted(target)
    assert not service.run_dir.path.exists() or not list(service.run_dir.path.glob("devices/*"))
