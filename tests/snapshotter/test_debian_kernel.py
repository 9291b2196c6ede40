"""The main job on the kernel that Debian ships, in the virtual machine: convert, push, mount, run a container.

Other tests run on the kernel of the host, which may be newer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.server import client, hostclient
from obdlab.settings.settings import Settings
from obdlab.system import mount
from tests import containerd_host
from tests.containerd import host as containerd_module
from tests.containerd_host import NAME, containerd_with_obdlab
from tests.convert.layouts import directory, make_layout, member
from tests.registry.server import running_registry
from tests.server.tcmu.test_daemon import wait_for
from tests.snapshotter import imagefiles
from tests.snapshotter.test_lazy_images import push_golden

pytestmark = [pytest.mark.vm, pytest.mark.slow]

#: Emulated processors are slow.
_PATIENCE_S = 600
_FILES = {f"data/{number:03}": os.urandom(1 << (number % 18)) for number in range(60)}


def obdlab(*arguments: str, status: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "obdlab", *arguments], capture_output=True, text=True, timeout=_PATIENCE_S, check=False
    )
    assert done.returncode in status, done.stderr
    return done.stdout


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file_system", ["ext4", "erofs"])
def test_an_image_is_converted_pushed_and_mounted(tmp_path: Path, file_system: str) -> None:
    layout, root = tmp_path / "layout", tmp_path / "mnt"
    make_layout(layout, [[directory("data/"), *(member(name, data) for name, data in _FILES.items())]])
    with running_registry(tmp_path / "registry") as server:
        image = f"{server.host}/debian/{file_system}:1"
        obdlab("image", "convert", "--plain-http", server.host, "--fs", file_system, f"oci:{layout}", image)
        # Experiments want a network, which this machine has not: status 1.
        devices = obdlab("doctor", status=(0, 1)).partition("containers:")[0]
        assert "fuse+loop: available" in devices
        assert "FAIL" not in devices, devices
        options = ("--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache"))
        try:
            obdlab("device", "mount", *options, "--plain-http", server.host, image, str(root))
            for name, data in _FILES.items():
                assert (root / name).read_bytes() == data, name
            obdlab("device", "umount", *options[:2], str(root))
            assert obdlab("device", "list", "--json", *options[:2]) == ""
        finally:
            client.DeviceService(tmp_path / "run", Settings()).shutdown(force=True)
    assert not [entry for entry in mount.mounts() if tmp_path in entry.mountpoint.parents]


@pytest.mark.timeout(1500)
def test_containerd_runs_an_image_through_fuse_and_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (containerd_host, containerd_module):
        for name in [name for name in vars(module) if name.endswith("TIMEOUT_S")]:
            monkeypatch.setattr(module, name, 300.0)
    monkeypatch.setattr(hostclient, "_HOST_START_TIMEOUT_S", 300.0)
    with running_registry(tmp_path / "registry") as server:
        image = push_golden(server, "golden")
        with containerd_with_obdlab(tmp_path / "host", "--device", "fuse+loop") as host:
            host.rpull(image)
            shell = ("--mount", f"type=bind,src={imagefiles.busybox()},dst=/busybox,options=rbind:ro")
            run = ("run", "--rm", "--snapshotter", NAME, *shell, image, "c")
            command = "/busybox ls -a /; echo new > /file; /busybox cat /file"
            printed = host.ctr(*run, "/busybox", "sh", "-c", command, timeout_s=_PATIENCE_S)
            assert "new" in printed.split()
            assert len(host.snapshotter.devices.list()) == 1
            host.ctr("images", "rm", "--sync", image, timeout_s=_PATIENCE_S)
            wait_for(lambda: not host.snapshotter.devices.list(), "the device stays")
