"""containerd with our snapshotter on devices of a TCMU daemon: pull, run, remove, as with overlaybd's own parts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdlab.devices.tcmu import configfs, uio
from obdlab.errors import DeviceError
from obdlab.server import hostclient
from obdlab.server.tcmu.devices import TcmuDevices
from obdlab.settings.settings import DAEMON_KIND, Settings
from tests import containerd_host
from tests.containerd import host as containerd_module
from tests.containerd_host import NAME, containerd_with_obdlab
from tests.devices.contract import read_direct
from tests.registry.server import running_registry
from tests.server.tcmu.test_daemon import Daemon, golden_config, wait_for
from tests.snapshotter import imagefiles
from tests.snapshotter.test_lazy_images import push_golden


def image_directory(root: Path, snapshot: int) -> Path:
    directory = root / "snapshots" / str(snapshot) / "block"
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.end()
    sys.stderr.write(daemon.log.read_text())


@pytest.mark.vm
@pytest.mark.timeout(300)
def test_devices_are_the_originals_and_found_again(tmp_path: Path, daemon: Daemon) -> None:
    devices = TcmuDevices(Settings())
    config = golden_config(image_directory(tmp_path, 41), result_file="result")
    device = devices.attach(config, "any")
    assert (device.device_id, device.kind, device.read_only, device.alive) == ("41", DAEMON_KIND, True, True)
    assert Path("/sys/kernel/config/target/core/user_999999999/dev_41/enable").read_text() == "1\n"
    assert Path("/sys/kernel/config/target/loopback/naa.1990000000000041").is_dir()
    assert devices.attach(config) == device
    assert [each.config for each in devices.list()] == [config]
    assert len(read_direct(device.path, 0, 4096)) == 4096
    # What overlaybd-attacher or the original's snapshotter made is found, and taken away.
    other = golden_config(image_directory(tmp_path, 42))
    configfs.attach("42", other)
    assert {each.device_id for each in devices.list()} == {"41", "42"}
    assert devices.attach(other).device_id == "42"
    same_id = golden_config(image_directory(tmp_path / "other", 42))
    with pytest.raises(DeviceError, match=r"serves .*wanted"):
        devices.attach(same_id)
    broken = golden_config(image_directory(tmp_path, 43))
    broken.write_text("{")
    with pytest.raises(DeviceError, match="JSON"):
        devices.attach(broken)
    with pytest.raises(DeviceError, match="no image of a snapshot"):
        devices.attach(golden_config(tmp_path))
    assert devices.release("41")
    assert devices.release("42")
    assert devices.list() == []
    assert not devices.detach("41")


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_containerd_runs_an_image_on_tcmu(tmp_path: Path, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (containerd_host, containerd_module):
        for name in [name for name in vars(module) if name.endswith("TIMEOUT_S")]:
            monkeypatch.setattr(module, name, 300.0)
    monkeypatch.setattr(hostclient, "_HOST_START_TIMEOUT_S", 300.0)
    with running_registry(tmp_path / "registry") as server:
        image = push_golden(server, "golden")
        with containerd_with_obdlab(tmp_path / "host", "--device", DAEMON_KIND) as host:
            host.rpull(image)
            shell = ("--mount", f"type=bind,src={imagefiles.busybox()},dst=/busybox,options=rbind:ro")
            run = ("run", "--rm", "--snapshotter", NAME, *shell, image, "c")
            said = host.ctr(*run, "/busybox", "sh", "-c", "/busybox ls -a /; echo new > /file", timeout_s=600)
            assert "busybox" in said
            (device,) = [name for name in uio.devices().values() if name.handler == "overlaybd"]
            assert device.config.startswith(f"{host.snapshotter.root}/snapshots/")
            assert device.hba == "999999999"
            assert host.ctr(*run, "/busybox", "true", timeout_s=600) == ""
            host.ctr("images", "rm", "--sync", image, timeout_s=300)
            wait_for(lambda: not TcmuDevices(Settings()).list(), "the device stays")
