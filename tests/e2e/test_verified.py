"""Images with hash trees on a real containerd: their roots reach the devices, which check and refuse by them."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from obdlab.cli.main import main
from tests import capabilities
from tests.containerd.kubelet import Kubelet
from tests.containerd_host import containerd_with_obdlab
from tests.e2e.conftest import BIG
from tests.e2e.images import push_converted
from tests.e2e.running import file_text, nothing_left, remove, run, start, wait_for
from tests.outage.proxy import outage_proxy

if TYPE_CHECKING:
    from pathlib import Path

    from tests.containerd_host import ObdlabHost
    from tests.registry.faulty import Answer
    from tests.registry.server import RegistryServer

pytestmark = [pytest.mark.containerd, pytest.mark.registry]

READ = "/bin/busybox sha256sum /big"
READ_SAYS = f"{hashlib.sha256(BIG).hexdigest()}  /big"


def trees_of_devices(host: ObdlabHost) -> list[list[bool]]:
    """For each device that is attached, the lowers of its configuration with a tree."""
    found = []
    for device in host.snapshotter.devices.list():
        with open(device.config) as file:
            found.append(["hashTree" in lower for lower in json.load(file)["lowers"]])
    return found


class Forged:
    """Flips a bit of each answer."""

    name = "forged"

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def fault(self, answer: Answer) -> None:
        with self._lock:
            self.count += 1
        if answer.status == 206:
            middle = len(answer.body) // 2
            answer.body = answer.body[:middle] + bytes([answer.body[middle] ^ 4]) + answer.body[middle + 1 :]
        answer.send()


def test_roots_come_with_either_pull(
    host: ObdlabHost, image: str, registry_server: RegistryServer, tmp_path: Path
) -> None:
    host.rpull(image)
    assert run(host, image, "pulled", READ).strip() == READ_SAYS
    start(host, image, "roots")
    assert trees_of_devices(host) == [[True, True]]
    remove(host, "roots")
    host.ctr("images", "rm", "--sync", image)
    with closing(Kubelet(host.containerd.address)) as kubelet:
        kubelet.pull(image)
        with kubelet.pod("roots", tmp_path) as pod:
            kubelet.start(pod, image, "main", ["/bin/sh", "-c", f"{READ}; exec sleep 1000"])
            wait_for(lambda: READ_SAYS in file_text(tmp_path / "main.log"))
            assert trees_of_devices(host) == [[True, True]]
        for name in (image, f"{registry_server.host}/e2e/pause:latest"):
            kubelet.remove_image(name)


def test_a_host_that_requires_trees(
    registry_server: RegistryServer, image: str, layers: list[bytes], tmp_path: Path
) -> None:
    capabilities.require("containerd")
    (tmp_path / "settings.json").write_text(json.dumps({"verify": "require"}))
    treeless = push_converted(registry_server.host, "e2e/treeless", layers, tmp_path, hash_trees=False)
    with (
        containerd_with_obdlab(tmp_path / "host", "--settings", str(tmp_path / "settings.json")) as host,
        nothing_left(host),
    ):
        host.rpull(treeless)
        with pytest.raises(Exception, match="no hash tree in the image's manifest"):
            run(host, treeless, "refused", READ)
        host.ctr("images", "rm", "--sync", treeless)
        host.rpull(image)
        assert run(host, image, "checked", READ).strip() == READ_SAYS
        host.ctr("images", "rm", "--sync", image)


def test_a_forging_registry_starts_no_container(
    host: ObdlabHost, image: str, registry_server: RegistryServer
) -> None:
    with outage_proxy(registry_server.host) as proxy:
        forged, behind = Forged(), image.replace(registry_server.host, proxy.host)
        # Checked units are shared by registries, and tests before have read them from the registry itself.
        assert main(["cache", "clear", "--cache-dir", str(host.snapshotter.devices.settings.cache_dir)]) == 0
        host.rpull(behind)
        proxy.always(forged)
        with pytest.raises(Exception, match="hash tree"):
            run(host, behind, "forged", READ)
        assert forged.count
        proxy.good()
        assert run(host, behind, "good", READ).strip() == READ_SAYS
        host.ctr("images", "rm", "--sync", behind)
