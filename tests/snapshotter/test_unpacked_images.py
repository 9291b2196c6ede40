"""Images that complete themselves, are unpacked, and start from that form under a real containerd."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.system import mount
from tests import capabilities
from tests.containerd_host import ObdlabHost, containerd_with_obdlab
from tests.registry.server import running_registry
from tests.server.killing import until
from tests.snapshotter import imagefiles
from tests.snapshotter.test_lazy_images import push_golden, run

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.containerd

#: The default, without the minutes of delay.
SETTINGS = {"download_delay_s": 0.0, "download_delay_extra_s": 0.0}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ObdlabHost]:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(SETTINGS))
    with containerd_with_obdlab(tmp_path / "host", "--settings", str(settings)) as running:
        yield running


def sums(host: ObdlabHost, image: str, name: str) -> str:
    return run(
        host, image, name, "/busybox find / -xdev -type f -size +0 -exec /busybox sha256sum {} + | /busybox sort"
    )


def test_from_the_first_start_to_one_after_a_reboot(host: ObdlabHost, tmp_path: Path) -> None:
    devices = host.snapshotter.devices
    with running_registry(tmp_path / "registry") as server:
        image = push_golden(server, "unpacked")
        host.rpull(image)
        wanted = sums(host, image, "first")
        assert len(wanted.splitlines()) > 3
        until(lambda: devices.list()[0].graduated, 120)
        assert sums(host, image, "second") == wanted
        (device,) = devices.list()
    # The registry is gone; a device that is attached anew has no server, and FUSE takes no part.
    host.snapshotter.stop()
    for entry in reversed(mount.mounts()):
        if host.snapshotter.root in entry.mountpoint.parents:
            mount.unmount(entry.mountpoint, lazy=True)
    devices.shutdown(force=True)
    shutil.rmtree(host.snapshotter.run_dir)
    assert not device.path.exists() or not Path("/sys/block", device.path.name, "loop").exists()
    host.start_snapshotter()
    assert sums(host, image, "third") == wanted
    (device,) = devices.list()
    assert (device.graduated, device.pid, device.keeper_pid) == (True, 0, 0)
    host.ctr("images", "rm", "--sync", image)
    until(lambda: devices.list() == [])
    assert len(list((host.snapshotter.run_dir.parent / "cache" / "graduated").glob("*/disk"))) == 1
