"""containerd's CRI plugin, asked over its gRPC API as a kubelet does: an image is pulled lazily."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import grpc
import pytest

from obdlab.snapshotter.store import Kind
from tests import capabilities
from tests.containerd.host import running_containerd
from tests.containerd_host import NAME, SnapshotterProcess
from tests.registry.server import RegistryServer, registry_server
from tests.snapshotter.test_lazy_images import push_golden
from tests.snapshotter.wire import WireSnapshotter

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["registry_server"]

pytestmark = pytest.mark.containerd


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field of protobuf's wire, shorter than 128 bytes."""
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def test_an_image_is_pulled_lazily(tmp_path: Path, registry_server: RegistryServer) -> None:
    capabilities.require("containerd")
    image = push_golden(registry_server, "cri")
    snapshotter = SnapshotterProcess(tmp_path / "snapshotter")
    snapshotter.start()
    try:
        with running_containerd(tmp_path / "containerd", {NAME: str(snapshotter.address)}, cri=NAME) as host:
            with grpc.insecure_channel(
                f"unix:{host.address}", options=[("grpc.default_authority", "localhost")]
            ) as channel:
                # runtime.v1 PullImageRequest: image = 1 (ImageSpec: image = 1)
                pull = channel.unary_unary("/runtime.v1.ImageService/PullImage")
                assert b"sha256:" in pull(field(1, field(1, image.encode())), timeout=60, wait_for_ready=True)
            with closing(WireSnapshotter(str(snapshotter.address))) as wire:
                snapshots = wire.walk()
            assert len(snapshots) == 2
            for snapshot in snapshots:
                assert snapshot.kind is Kind.COMMITTED
                assert snapshot.labels["containerd.io/snapshot/remote"] == "remote snapshot"
                assert snapshot.labels["containerd.io/snapshot/cri.image-ref"] == image
    finally:
        snapshotter.take_down()
