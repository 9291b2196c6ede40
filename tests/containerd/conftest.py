"""A containerd for the whole run, and a client of it in a namespace of each test's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from obdlab.containerd.client import Containerd
from tests import capabilities
from tests.containerd.host import ContainerdHost, running_containerd

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ContainerdHost", "running_containerd"]


@pytest.fixture(scope="session")
def containerd_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerdHost]:
    """A containerd for the whole run; tests keep apart by namespaces of their own."""
    capabilities.require("containerd")
    with running_containerd(tmp_path_factory.mktemp("ctd")) as host:
        yield host


@pytest.fixture
def containerd(containerd_host: ContainerdHost, request: pytest.FixtureRequest) -> Iterator[Containerd]:
    """A client in a namespace of the test's own, emptied at the end."""
    namespace = f"t{abs(hash(request.node.nodeid)):x}"
    with Containerd(containerd_host.address, namespace) as client:
        yield client
        empty_namespace(client)


def empty_namespace(client: Containerd) -> None:
    """Remove leases and images; containerd's garbage collector then removes the rest."""
    for image in client.images.list():
        client.images.delete(image.name)
    for lease in client.leases.list():
        client.leases.delete(lease)
