"""containerd's CRI plugin, asked over its gRPC API as a kubelet does: images and pods, lazily."""

from __future__ import annotations

import signal
from contextlib import closing
from typing import TYPE_CHECKING

import grpc
import pytest

from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerOptions
from obdlab.formats import oci
from obdlab.snapshotter.store import Kind
from tests.containerd.kubelet import Kubelet
from tests.containerd_host import ObdlabHost
from tests.convert.converting import convert
from tests.e2e.conftest import BIG
from tests.e2e.running import file_text, wait_for
from tests.snapshotter import imagefiles
from tests.snapshotter.wire import WireSnapshotter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.registry.server import RegistryServer

pytestmark = [pytest.mark.containerd, pytest.mark.registry]


@pytest.fixture
def kubelet(host: ObdlabHost) -> Iterator[Kubelet]:
    with closing(Kubelet(host.containerd.address)) as client:
        yield client


def test_a_pod_runs_lazily(
    host: ObdlabHost, kubelet: Kubelet, registry_server: RegistryServer, image: str, tmp_path: Path
) -> None:
    before = len(registry_server.requests())
    assert kubelet.pull(image).startswith("sha256:")
    with closing(WireSnapshotter(str(host.snapshotter.address))) as wire:
        snapshots = [snapshot for snapshot in wire.walk() if "containerd.io/snapshot/remote" in snapshot.labels]
    assert len(snapshots) == 2
    for snapshot in snapshots:
        assert snapshot.kind is Kind.COMMITTED
        assert snapshot.labels["containerd.io/snapshot/cri.image-ref"] == image
        assert snapshot.labels["containerd.io/snapshot/cri.layer-digest"].startswith("sha256:")
    asked = [entry["uri"] for entry in registry_server.requests()[before:] if "/blobs/" in entry["uri"]]
    assert len(asked) == 1  # the config
    with kubelet.pod("lazy", tmp_path) as pod:
        container = kubelet.start(pod, image, "main", ["/bin/sh", "-c", "cat /etc/issue; exec sleep 1000"])
        wait_for(lambda: file_text(tmp_path / "main.log").endswith("stdout F on top\n"))
        assert len(host.snapshotter.devices.list()) == 1
        assert kubelet.execute(container, "/bin/busybox", "wc", "-c", "/big").split() == [str(len(BIG)), "/big"]
        assert kubelet.execute(container, "/bin/sh", "-c", "echo new > /etc/issue; cat /etc/issue") == "new\n"
        # Another container of the pod shares the device, and not what the first one wrote.
        other = kubelet.start(pod, image, "side", ["/bin/busybox", "sleep", "1000"])
        assert kubelet.execute(other, "/bin/busybox", "cat", "/etc/issue") == "on top\n"
        assert len(host.snapshotter.devices.list()) == 1
        kubelet.stop(container)
    for name in (image, f"{registry_server.host}/e2e/pause:latest"):
        kubelet.remove_image(name)


def test_a_pod_runs_on_a_turbo_image(
    host: ObdlabHost, kubelet: Kubelet, registry_server: RegistryServer, layers: list[bytes], tmp_path: Path
) -> None:
    source = imagefiles.push(registry_server.host, "e2e/turbo", *imagefiles.image_documents(layers))
    turbo = source.replace(":latest", ":turbo")
    options = ConvertOptions(layer=LayerOptions(virtual_size=1 << 30), turbo=("ext4", "erofs"), work_dir=tmp_path)
    targets = {each.digest: each.size for each in convert(source, turbo, options).manifest.layers}
    before = len(registry_server.requests())
    kubelet.pull(turbo)
    with closing(WireSnapshotter(str(host.snapshotter.address))) as wire:
        pulled = [each for each in wire.walk() if oci.TURBO_TARGET_DIGEST in each.labels]
    assert [snapshot.kind for snapshot in pulled] == [Kind.COMMITTED] * 2
    asked = [entry["uri"] for entry in registry_server.requests()[before:] if "/blobs/" in entry["uri"]]
    assert len(asked) == 1 + len(targets)  # the config and the small blobs
    with kubelet.pod("turbo", tmp_path) as pod:
        container = kubelet.start(pod, turbo, "main", ["/bin/sh", "-c", "cat /etc/issue; exec sleep 1000"])
        wait_for(lambda: file_text(tmp_path / "main.log").endswith("stdout F on top\n"))
        assert kubelet.execute(container, "/bin/busybox", "wc", "-c", "/big").split() == [str(len(BIG)), "/big"]
        assert kubelet.execute(container, "/bin/sh", "-c", "echo new > /etc/issue; cat /etc/issue") == "new\n"
        kubelet.stop(container)
    for name in (turbo, f"{registry_server.host}/e2e/pause:latest"):
        kubelet.remove_image(name)


@pytest.mark.slow
def test_pods_outlive_both_services(
    host: ObdlabHost, kubelet: Kubelet, registry_server: RegistryServer, image: str, tmp_path: Path
) -> None:
    kubelet.pull(image)
    with kubelet.pod("survivor", tmp_path) as pod:
        container = kubelet.start(pod, image, "main", ["/bin/busybox", "sleep", "1000"])
        host.snapshotter.stop(signal.SIGKILL)
        host.containerd.stop(signal.SIGKILL)
        # In this order: the CRI plugin forgets images whose snapshotter does not answer when it starts.
        host.start_snapshotter()
        host.containerd.start()
        wait_for(lambda: is_initialized(kubelet, container))
        assert kubelet.execute(container, "/bin/busybox", "wc", "-c", "/big").split() == [str(len(BIG)), "/big"]
        other = kubelet.start(pod, image, "other", ["/bin/busybox", "sleep", "1000"])
        assert kubelet.execute(other, "/bin/busybox", "cat", "/etc/issue") == "on top\n"
    for name in (image, f"{registry_server.host}/e2e/pause:latest"):
        kubelet.remove_image(name)


def is_initialized(kubelet: Kubelet, container: str) -> bool:
    try:
        kubelet.execute(container, "/bin/sh", "-c", "exit 0")
    except grpc.RpcError as error:
        assert "not initialized" in str(error)
        return False
    return True
