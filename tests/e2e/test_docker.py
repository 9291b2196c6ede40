"""Docker Engine with the containerd image store: an image is pulled lazily, run, changed, pushed and removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import capabilities
from tests.containerd_host import containerd_with_obdlab
from tests.e2e.conftest import BIG
from tests.e2e.engine import running_docker
from tests.e2e.running import blob_bytes, wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from tests.registry.server import RegistryServer

pytestmark = [pytest.mark.containerd, pytest.mark.registry, pytest.mark.slow]


def test_docker_runs_an_image_lazily(registry_server: RegistryServer, image: str, tmp_path: Path) -> None:
    capabilities.require("docker")
    with (
        containerd_with_obdlab(tmp_path / "host") as host,
        running_docker(tmp_path / "docker", host) as engine,
    ):
        before = blob_bytes(registry_server)
        engine.docker("pull", "--quiet", image)
        assert blob_bytes(registry_server) - before < 4096  # the config
        run = ("run", "--network", "none", "--rm")
        assert engine.docker(*run, image, "/bin/busybox", "cat", "/etc/issue") == "on top\n"
        assert blob_bytes(registry_server) - before < len(BIG)
        assert len(host.snapshotter.devices.list()) == 1

        engine.docker("run", "--network", "none", "--detach", "--name", "one", image, "/bin/busybox", "sleep", "1000")
        assert engine.docker("exec", "one", "/bin/busybox", "wc", "-c", "/big").split()[0] == str(len(BIG))
        engine.docker("exec", "one", "/bin/sh", "-c", "echo changed > /etc/issue")
        assert "C /etc/issue" in engine.docker("diff", "one")

        # The new image goes to where the layers are that were never downloaded here.
        changed = image.replace(":obd", ":changed")
        engine.docker("commit", "one", changed)
        assert engine.docker("push", changed).count("Layer already exists") == 2
        engine.docker("rm", "--force", "one")

        # Docker finds an image that it can copy once the blobs are here as well.
        host.rpull(image, download=True)
        assert "e2e/busybox" in engine.docker("image", "ls")
        engine.docker("save", "--output", str(tmp_path / "saved.tar"), image)
        assert (tmp_path / "saved.tar").stat().st_size > len(BIG)
        engine.docker("rmi", changed, image)
        wait_for(lambda: host.snapshotter.devices.list() == [])
        engine.docker("pull", "--quiet", changed)
        assert engine.docker(*run, changed, "/bin/busybox", "cat", "/etc/issue") == "changed\n"
        engine.docker("rmi", changed)
        wait_for(lambda: list((host.snapshotter.root / "snapshots").iterdir()) == [])
