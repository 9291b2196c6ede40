"""Containers on a real containerd: run, changed, committed, pushed, removed, in numbers, services restarted."""

from __future__ import annotations

import hashlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from obdlab.cli import main
from obdlab.containerd.client import Containerd
from tests.containerd_host import NAME, ObdlabHost
from tests.e2e.conftest import BIG
from tests.e2e.images import push_on_top
from tests.e2e.running import assert_nothing_left, device_mounts, execute, own, remove, run, start, stop, wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from tests.registry.server import RegistryServer

pytestmark = [pytest.mark.containerd, pytest.mark.registry]

BIG_SUM = hashlib.sha256(BIG).hexdigest()
OWN_DEVICE = ("--snapshotter-label", "containerd.io/snapshot/overlaybd.writable=dir")


def test_what_a_container_wrote_becomes_a_layer(host: ObdlabHost, image: str, tmp_path: Path) -> None:
    host.rpull(image)
    start(host, image, "writer", *OWN_DEVICE)
    assert execute(host, "writer", "/bin/busybox grep ' / ' /proc/mounts").split()[2] == "ext4"
    execute(host, "writer", "echo changed > /etc/issue; /bin/busybox rm /big; echo more > /more")
    stop(host, "writer")
    host.ctr("snapshots", "--snapshotter", NAME, "commit", "committed", own("writer"))
    with Containerd(host.containerd.address, "test") as client:
        labels = client.snapshots(NAME).stat("committed").labels
    sealed, layer = labels["containerd.io/snapshot/overlaybd.localcommitpath"], tmp_path / "layer.obd"
    assert main.main(["layer", "commit", "--quiet", "--tar", sealed, str(layer)]) == 0
    changed = push_on_top(image, "committed", layer.read_bytes())
    host.ctr("containers", "rm", own("writer"))
    host.ctr("snapshots", "--snapshotter", NAME, "rm", "committed")
    host.ctr("images", "rm", "--sync", image)
    assert_nothing_left(host)

    assert host.rpull(changed).layer_bytes == 0
    said = run(host, changed, "reader", "/bin/busybox cat /etc/issue /more; /bin/busybox ls /big 2>&1", check=False)
    assert said.startswith("changed\nmore\n")
    assert "No such file" in said
    # The image goes while a container is on it; its device goes with the container.
    start(host, changed, "stays")
    host.ctr("images", "rm", "--sync", changed)
    assert execute(host, "stays", "/bin/busybox cat /more /etc/issue") == "more\nchanged\n"
    remove(host, "stays")


@pytest.mark.parametrize("count", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_many_containers_at_once(host: ObdlabHost, image: str, count: int) -> None:
    host.rpull(image)
    command = "/bin/busybox sha256sum /big; echo {} > /etc/issue; /bin/busybox cat /etc/issue"
    with ThreadPoolExecutor(count) as pool:
        outputs = list(pool.map(lambda number: run(host, image, f"c{number}", command.format(number)), range(count)))
    assert outputs == [f"{BIG_SUM}  /big\n{number}\n" for number in range(count)]
    assert len(host.snapshotter.devices.list()) == len(device_mounts(host)) == 1
    host.ctr("images", "rm", "--sync", image)


@pytest.mark.parametrize("own_device", [pytest.param(False, marks=pytest.mark.slow), True])
def test_containers_outlive_both_services(host: ObdlabHost, image: str, own_device: bool) -> None:
    host.rpull(image)
    start(host, image, "survivor", *(OWN_DEVICE if own_device else ()))
    execute(host, "survivor", "echo before > /etc/issue")
    host.containerd.stop(signal.SIGKILL)
    host.snapshotter.stop(signal.SIGKILL)
    host.containerd.start()  # the snapshotter is not there yet
    assert "RUNNING" in host.ctr("tasks", "ls")
    assert execute(host, "survivor", "/bin/busybox cat /etc/issue") == "before\n"
    host.start_snapshotter()
    assert execute(host, "survivor", "/bin/busybox sha256sum /big").startswith(BIG_SUM)
    wait_for(lambda: run(host, image, "another", "echo ran", check=False) == "ran\n")
    assert execute(host, "survivor", "echo after >> /etc/issue; /bin/busybox cat /etc/issue") == "before\nafter\n"
    remove(host, "survivor")
    host.ctr("images", "rm", "--sync", image)


@pytest.mark.slow
def test_a_thousand_containers_leave_nothing(host: ObdlabHost, image: str, registry_server: RegistryServer) -> None:
    """Containers made and removed through ctr, one in ten of them run; each round of a hundred with a new pull."""
    pid = host.snapshotter.pid

    def open_files() -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    def one(number: int) -> None:
        name = f"c{number}"
        if number % 10 == 0:
            run(host, image, name, "/bin/busybox grep -q top /etc/issue")  # or ctr fails as grep does
            return
        host.ctr("containers", "create", "--snapshotter", NAME, image, own(name), "/bin/sh")
        host.ctr("containers", "rm", own(name))

    files: list[int] = []
    for _ in range(10):
        host.rpull(image)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, range(100)))
        host.ctr("images", "rm", "--sync", image)
        assert_nothing_left(host)
        files.append(open_files())
    assert files[-1] <= files[0] + 2, files
