"""One host with everything, and one image of busybox with a large file, converted once for the run."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests import capabilities
from tests.containerd_host import containerd_with_obdlab
from tests.e2e.images import busybox_layer, file_layer, push_converted, push_pause
from tests.e2e.running import nothing_left
from tests.registry.server import registry_server
from tests.snapshotter import imagefiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.containerd_host import ObdlabHost
    from tests.registry.server import RegistryServer

__all__ = ["registry_server"]

#: What /big of the image holds: too much to come along with anything else that is read.
BIG = random.Random(7).randbytes(6 << 20)


@pytest.fixture(scope="package")
def running(tmp_path_factory: pytest.TempPathFactory, registry_server: RegistryServer) -> Iterator[ObdlabHost]:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    pause = push_pause(registry_server.host)
    with containerd_with_obdlab(tmp_path_factory.mktemp("host"), sandbox_image=pause) as host:
        yield host


@pytest.fixture
def host(running: ObdlabHost) -> Iterator[ObdlabHost]:
    """A containerd with CRI and the snapshotter, of which a test must leave nothing."""
    with nothing_left(running):
        yield running


@pytest.fixture(scope="session")
def layers() -> list[bytes]:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    return [busybox_layer({"etc/issue": b"below\n"}), file_layer({"etc/issue": b"on top\n", "big": BIG})]


@pytest.fixture(scope="session")
def image(registry_server: RegistryServer, layers: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A converted image of two layers."""
    return push_converted(registry_server.host, "e2e/busybox", layers, tmp_path_factory.mktemp("convert"))
