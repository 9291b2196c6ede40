"""Docker Engine with the containerd image store: an image is pulled lazily, run, changed, pushed and removed."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from obdlab.image.config import ImageConfig
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


@pytest.mark.parametrize("mode", ["dir", "overlayfs"])
def test_docker_commits_through_the_differ(
    registry_server: RegistryServer, image: str, tmp_path: Path, mode: str
) -> None:
    capabilities.require("docker")
    with (
        containerd_with_obdlab(tmp_path / "host", differ={"rwMode": mode}) as host,
        running_docker(tmp_path / "docker", host) as engine,
    ):
        engine.docker("pull", "--quiet", image)
        engine.docker("run", "--network", "none", "--detach", "--name", "one", image, "/bin/busybox", "sleep", "1000")
        engine.docker("exec", "one", "/bin/sh", "-c", "echo changed > /etc/issue")
        changed = image.replace(":obd", ":changed")
        engine.docker("commit", "one", changed)
        run = ("run", "--network", "none", "--rm", changed, "/bin/busybox", "cat", "/etc/issue")
        assert engine.docker(*run) == "changed\n"  # on the init layer of the container

        engine.docker("push", changed)
        engine.docker("rm", "--force", "one")
        engine.docker("rmi", changed, image)
        wait_for(lambda: list((host.snapshotter.root / "snapshots").iterdir()) == [])
        host.rpull(changed)
        assert engine.docker(*run) == "changed\n"  # and on the image alone
        configs = (host.snapshotter.root / "snapshots").glob("*/block/config.v1.json")
        by_depth = {len(ImageConfig.load(config).lowers): config for config in configs}
        # By default a container writes to an overlay, of which containerd's own differ makes an ordinary layer.
        assert max(by_depth) == (3 if mode == "dir" else 2)
        device = host.snapshotter.devices.attach(by_depth[max(by_depth)], "checked")
        checked = subprocess.run(["e2fsck", "-fn", device.path], capture_output=True, text=True, check=False)
        host.snapshotter.devices.detach("checked")
        assert "Pass 5" in checked.stdout
        assert checked.returncode == 0, checked.stdout


def test_dockers_buildkit_builds_on_a_lazy_base(registry_server: RegistryServer, image: str, tmp_path: Path) -> None:
    capabilities.require("docker")
    # The one name of a lazy snapshotter that this BuildKit knows. With two names for one root, containerd's garbage
    # collection of either deletes the other's snapshots.
    with (
        containerd_with_obdlab(tmp_path / "host", name="stargz") as host,
        running_docker(tmp_path / "docker", host, "stargz") as engine,
    ):
        if "buildx" not in engine.docker("buildx", "version", check=False):
            capabilities.missing("docker", "docker-buildx is not installed")
        context, built = tmp_path / "context", image.replace(":obd", ":built")
        context.mkdir()
        (context / "Dockerfile").write_text(
            f"FROM {image} AS first\n"
            'RUN ["/bin/busybox", "sh", "-c", "echo built > /built"]\n'
            f"FROM {image} AS second\nCOPY --from=first /built /copied\n"
            "FROM scratch AS files\nCOPY --from=second /copied /etc/issue /\n"
        )
        build = ("buildx", "build", "--progress", "plain", "--network", "none", "--provenance", "false", str(context))
        before = blob_bytes(registry_server)
        engine.docker(*build, "--target", "files", "--output", f"type=local,dest={tmp_path}/files")
        assert (tmp_path / "files/copied").read_text() == "built\n"
        assert (tmp_path / "files/issue").read_text() == "on top\n"

        # Pushed, and only then Docker misses the image in its own store.
        output = f"type=image,name={built},push=true,store=false,unpack=false"
        printed = engine.docker(*build, "--target", "second", "--output", output, check=False)
        assert "pushing manifest" in printed
        assert "ERROR: tag does not exist" in printed
        assert blob_bytes(registry_server) - before < len(BIG)
        host.rpull(built)
        run = ("run", "--rm", "--snapshotter", "stargz", built, "pushed", "/bin/busybox", "cat", "/copied")
        assert host.ctr(*run) == "built\n"

        engine.docker(*build, "--target", "second", "--tag", built)
        assert engine.docker("run", "--network", "none", "--rm", built, "/bin/busybox", "cat", "/copied") == "built\n"
        engine.docker("rmi", built)
        engine.docker("buildx", "prune", "--all", "--force")
        host.ctr("images", "rm", "--sync", built, check=False)
        wait_for(lambda: list((host.snapshotter.root / "snapshots").iterdir()) == [])
