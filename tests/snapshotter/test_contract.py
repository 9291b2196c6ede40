"""The contract suite: on the core, over a socket, and on containerd's overlayfs snapshotter to prove the suite."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.containerd.client import Containerd
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.snapshotter.core import Snapshotter
from obdlab.snapshotter.imagemounts import ImageDevices
from obdlab.snapshotter.layout import Layout
from obdlab.snapshotter.overlaybd import ImageOptions
from obdlab.snapshotter.service import SnapshotServer
from tests import capabilities
from tests.containerd.host import running_containerd
from tests.snapshotter.contract import SnapshotterContract
from tests.snapshotter.wire import WireSnapshotter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.containerd.host import ContainerdHost


@pytest.fixture
def core() -> Iterator[Snapshotter]:
    # A short path: the options of a deep overlay must fit a page.
    directory = Path(tempfile.mkdtemp(prefix="o"))
    layout = Layout(directory / "root")
    images = ImageDevices(
        layout, DeviceService(directory / "run", Settings(cache_dir=directory / "cache", index_at_pull=False))
    )
    snapshotter = Snapshotter(layout, images, ImageOptions())
    try:
        yield snapshotter
    finally:
        snapshotter.close()
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerdHost]:
    capabilities.require("containerd")
    with running_containerd(tmp_path_factory.mktemp("c")) as host:
        yield host


class TestCore(SnapshotterContract):
    @pytest.fixture
    def snapshotter(self, core: Snapshotter) -> Snapshotter:
        return core


class TestOverTheWire(SnapshotterContract):
    deepest = 30

    @pytest.fixture
    def snapshotter(self, core: Snapshotter, tmp_path: Path) -> Iterator[WireSnapshotter]:
        server = SnapshotServer(core, tmp_path / "s.sock")
        server.start()
        client = WireSnapshotter(str(tmp_path / "s.sock"))
        yield client
        client.close()
        server.stop(5.0)
        assert not (tmp_path / "s.sock").exists()


@pytest.mark.containerd
class TestContainerdsOverlayfs(SnapshotterContract):
    deepest = 30

    @pytest.fixture
    def snapshotter(self, containerd: ContainerdHost, request: pytest.FixtureRequest) -> Iterator[WireSnapshotter]:
        # Without a lease, containerd's garbage collector takes what no image refers to.
        namespace = f"n{abs(hash(request.node.name)):x}"
        with Containerd(containerd.address, namespace) as leases, leases.lease(expire_s=600) as leased:
            names = (("containerd-namespace", namespace), ("containerd-lease", leased.lease_id))
            client = WireSnapshotter(containerd.address, "overlayfs", *names)
            yield client
            client.close()
