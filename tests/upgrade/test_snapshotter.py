"""A snapshotter's root and its running containers that old code made, after the code is replaced."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.containerd_host import ObdlabHost, SnapshotterProcess, containerd_with_obdlab
from tests.registry.server import RegistryServer
from tests.snapshotter import imagefiles
from tests.snapshotter.test_lazy_images import EXPECTED, push_golden, run
from tests.upgrade.site import Site

pytestmark = [pytest.mark.containerd, pytest.mark.registry]


def big_sha256() -> str:
    return str(
        next(e for e in json.loads((EXPECTED / "expected.m2.json").read_text()) if e["path"] == "big")["sha256"]
    )


def sum_in(host: ObdlabHost, name: str, number: int) -> str:
    """Have a running container read a file of its image."""
    return host.ctr("tasks", "exec", "--exec-id", f"e{number}", name, "/busybox", "sha256sum", "/big").split()[0]


def test_containers_and_images_of_an_old_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry_server: RegistryServer
) -> None:
    imagefiles.require_busybox()
    site = Site(tmp_path / "site")
    site.install_old()
    monkeypatch.setenv("PYTHONPATH", site.environment["PYTHONPATH"])
    monkeypatch.chdir(tmp_path / "site")

    def command(process: SnapshotterProcess) -> list[str]:  # by its name in both versions
        return [*site.command, "-v", "snapshotter", *process._arguments]

    monkeypatch.setattr(SnapshotterProcess, "command", command)
    first = push_golden(registry_server, "old-first")
    second = push_golden(registry_server, "old-second", depth=1)
    wanted = big_sha256()
    with containerd_with_obdlab(tmp_path / "host") as host:
        host.rpull(first)
        run(host, first, "old", "/busybox sleep 100000", "-d")
        assert sum_in(host, "old", 0) == wanted

        # The old snapshotter runs on, and finds new modules only.
        site.install_new()
        assert run(host, first, "between", "/busybox sha256sum /big").split()[0] == wanted
        host.rpull(second)
        assert run(host, second, "between-second", "/busybox sha256sum /big").split()[0] == wanted

        assert host.snapshotter.stop() == 0
        host.start_snapshotter()
        assert sum_in(host, "old", 1) == wanted
        cache = host.snapshotter.devices.settings.cache_dir
        places = ("--run-dir", host.snapshotter.run_dir, "--cache-dir", cache)
        site.run("fsck", host.snapshotter.root, *places)
        for image in (first, second):
            assert run(host, image, "after", "/busybox sha256sum /big").split()[0] == wanted
        site.run("upgrade", *places)
        assert sum_in(host, "old", 2) == wanted
        (device, *_) = host.snapshotter.devices.list()
        os.kill(device.pid, signal.SIGKILL)
        assert sum_in(host, "old", 3) == wanted

        host.ctr("tasks", "kill", "-s", "KILL", "old")
        host.ctr("tasks", "rm", "--force", "old")
        host.ctr("containers", "rm", "old")
        for image in (first, second):
            host.ctr("images", "rm", "--sync", image)
        assert host.snapshotter.devices.list() == []
