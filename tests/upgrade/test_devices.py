"""Devices in use that old code made, after the code is replaced under their processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import obdlab
from obdlab.formats import oci
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.server.client import AttachedDevice, DeviceService
from obdlab.server.rundir import DeviceState
from obdlab.settings.settings import Settings
from obdlab.system.mount import unmount
from tests.devices.contract import read_direct
from tests.registry.server import RegistryServer
from tests.server.killing import until
from tests.snapshotter import imagefiles
from tests.upgrade.site import Site

pytestmark = [pytest.mark.kernel, pytest.mark.registry]

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
LAYERS = [str(GOLDEN / f"layer{number}.obd") for number in (1, 2)]
MIB = 1 << 20


class Host:
    """Devices of one run directory, served by what is installed."""

    def __init__(self, place: Path) -> None:
        self.site = Site(place / "site")
        self.run_dir = place / "run"
        self.cache_dir = place / "cache"
        self._places = ("--run-dir", str(self.run_dir), "--cache-dir", str(self.cache_dir))

    def run(self, *words: str | Path, cache: bool = True, status: int = 0) -> str:
        return self.site.run(*words, *(self._places if cache else self._places[:2]), status=status)

    def attach(self, config: Path, device_id: str) -> Path:
        return Path(self.run("attach", config, "--id", device_id).strip())

    def devices(self) -> dict[str, AttachedDevice]:
        """The devices, as the present code sees them."""
        service = DeviceService(self.run_dir, Settings(cache_dir=self.cache_dir))
        return {device.device_id: device for device in service.list()}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    made.site.install_old()
    try:
        yield made
    finally:
        made.site.install_new()
        unmount(tmp_path / "mnt", lazy=True)
        made.run("cleanup", "--force")


@pytest.fixture
def content() -> bytes:
    with obdlab.open_stack(LAYERS) as disk:
        return disk.read_at(0, len(disk))


def local_image(place: Path) -> Path:
    ImageConfig(lowers=tuple(LowerConfig(file=path) for path in LAYERS)).save(place / "local.json")
    return place / "local.json"


def remote_image(place: Path, server: RegistryServer) -> Path:
    layers, annotations = imagefiles.golden_layers()
    documents = imagefiles.image_documents(layers, annotations, compress=False)
    imagefiles.push(server.host, "upgrade/golden", *documents)
    lowers = tuple(LowerConfig(digest=oci.digest_of(layer), size=len(layer)) for layer in layers)
    ImageConfig(f"http://{server.host}/v2/upgrade/golden/blobs", lowers).save(place / "remote.json")
    return place / "remote.json"


def writable_disk(host: Host, place: Path) -> Path:
    host.site.run("create", place / "data", place / "index", "--vsize", "64M")
    upper = UpperConfig(index=str(place / "index"), data=str(place / "data"))
    ImageConfig(upper=upper).save(place / "writable.json")
    return place / "writable.json"


def is_right(device: Path, content: bytes) -> bool:
    """Read some of the device, another part each time, past the kernel's cache."""
    places = [0, *(MIB * number for number in random.sample(range(len(content) // MIB), 4))]
    return all(read_direct(device, place, MIB) == content[place : place + MIB] for place in places)


def test_devices_go_on_and_are_taken_over(
    host: Host, tmp_path: Path, content: bytes, registry_server: RegistryServer
) -> None:
    local = host.attach(local_image(tmp_path), "local")
    remote = host.attach(remote_image(tmp_path, registry_server), "remote")
    disk = host.attach(writable_disk(host, tmp_path), "disk")
    subprocess.run(["mkfs.ext4", "-q", disk], check=True, timeout=60)
    target = tmp_path / "mnt"
    target.mkdir()
    subprocess.run(["mount", disk, target], check=True, timeout=60)
    (target / "old").write_bytes(content[:MIB])
    assert is_right(local, content)

    host.site.install_new()
    after = host.devices()
    assert {name: (device.state, device.path) for name, device in after.items()} == {
        "local": (DeviceState.WHOLE, local),
        "remote": (DeviceState.WHOLE, remote),
        "disk": (DeviceState.WHOLE, disk),
    }
    assert host.run("ls-devices", cache=False).count("\n") >= len(after)
    for path in (local, remote):
        assert is_right(path, content)
    assert host.attach(tmp_path / "local.json", "local") == local
    late = host.attach(tmp_path / "local.json", "late")
    assert is_right(late, content)
    (target / "by the old server").write_bytes(content[:MIB])
    host.run("snapshot", "disk", "--data", tmp_path / "data2", "--index", tmp_path / "index2")

    # An old keeper still replaces its server. No old server asks for another keeper; it serves without.
    os.kill(after["local"].pid, signal.SIGKILL)
    os.kill(after["remote"].keeper_pid, signal.SIGKILL)
    for path in (local, remote):
        assert is_right(path, content)
    states = {"local": DeviceState.WHOLE, "remote": DeviceState.UNKEPT}
    until(lambda: {name: device.state for name, device in host.devices().items() if name in states} == states)

    host.run("upgrade")
    upgraded = host.devices()
    assert {device.state for device in upgraded.values()} == {DeviceState.WHOLE}
    assert all(upgraded[name].pid != after[name].pid for name in after)
    for path in (local, remote, late):
        assert is_right(path, content)
    (target / "by the new server").write_bytes(content[:MIB])
    for name in ("old", "by the old server", "by the new server"):
        assert (target / name).read_bytes() == content[:MIB]

    subprocess.run(["umount", target], check=True, timeout=60)
    for name in upgraded:
        host.run("detach", name, cache=False)
    disk = host.attach(tmp_path / "writable.json", "disk")
    subprocess.run(["e2fsck", "-fn", disk], check=True, timeout=60, capture_output=True)
    host.run("detach", "disk", cache=False)
