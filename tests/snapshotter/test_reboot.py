"""After a reboot, with the registry down: what is in the cache runs, the rest says why it does not."""

from __future__ import annotations

import hashlib
import shutil
import time
from typing import TYPE_CHECKING

import pytest

from obdlab.errors import ObdlabError
from obdlab.formats import oci
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.snapshotter.errors import AlreadyExistsError, FailedPreconditionError
from obdlab.snapshotter.writable import LABEL_WRITABLE
from obdlab.system.processes import Process
from tests.registry.server import running_registry
from tests.server.killing import until
from tests.snapshotter import imagefiles
from tests.snapshotter.mounting import mounted
from tests.snapshotter.test_writable import Root, root

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.snapshotter.core import Snapshotter

__all__ = ["root"]

pytestmark = [pytest.mark.kernel, pytest.mark.registry]


ONE, TWO = oci.chain_ids([layer[oci.BLOB_DIGEST] for layer in imagefiles.golden_layers()[1]])


def pull(snapshotter: Snapshotter, image: str) -> None:
    """Have the golden image's layers as snapshots ONE and TWO."""
    _, annotations = imagefiles.golden_layers()
    for name, parent, layer in zip((ONE, TWO), ("", ONE), annotations, strict=True):
        labels = {"containerd.io/snapshot.ref": name, "containerd.io/snapshot/image-ref": image, **layer}
        assert oci.BLOB_DIGEST in labels
        with pytest.raises(AlreadyExistsError):
            snapshotter.prepare(f"extract-1 {name}", parent, labels)


def test_what_is_cached_runs_without_the_registry(root: Root, tmp_path: Path) -> None:
    root.devices = DeviceService(
        tmp_path / "run", Settings(cache_dir=tmp_path / "cache", open_deadline_s=2.0, read_deadline_s=2.0)
    )
    layers, annotations = imagefiles.golden_layers()
    with running_registry(tmp_path / "registry") as server, root.opened() as snapshotter:
        documents = imagefiles.image_documents(layers, annotations, compress=False)
        pull(snapshotter, imagefiles.push(server.host, "reboot/golden", *documents))
        with mounted(snapshotter.prepare("read", TWO, {}), tmp_path / "rootfs") as rootfs:
            wanted = hashlib.sha256((rootfs / "big").read_bytes()).hexdigest()
            names = sorted(path.name for path in rootfs.iterdir())
        with mounted(snapshotter.prepare("own", TWO, {LABEL_WRITABLE: "dir"}), tmp_path / "rootfs") as rootfs:
            (rootfs / "new").write_text("kept")
        snapshotter.prepare("plain", "", {})
    root.lose_mounts()
    with root.opened() as snapshotter:
        with mounted(snapshotter.mounts("read"), tmp_path / "rootfs") as rootfs:
            assert sorted(path.name for path in rootfs.iterdir()) == names
            assert hashlib.sha256((rootfs / "big").read_bytes()).hexdigest() == wanted
        with mounted(snapshotter.mounts("own"), tmp_path / "rootfs") as rootfs:
            assert (rootfs / "new").read_text() == "kept"
    root.lose_mounts()
    shutil.rmtree(tmp_path / "cache")
    with root.opened() as snapshotter:
        began = time.monotonic()
        with pytest.raises(ObdlabError, match=r"sha256:.*(refused|connect)"):
            snapshotter.mounts("read")
        assert time.monotonic() - began < 120
        # Others do not wait for it, and nothing of the attempt stays.
        assert snapshotter.mounts("plain")[0].type == "bind"
        assert root.devices.list() == []
        assert {snapshot.key for snapshot in snapshotter.walk()} == {ONE, TWO, "read", "own", "plain"}
        for key in ("read", "own", TWO, ONE):
            snapshotter.remove(key)


def test_an_unpacked_image_starts_without_registry_and_processes(root: Root, tmp_path: Path) -> None:
    """While its device graduates below a container, for a second container, and after a reboot."""
    completed = Settings(
        cache_dir=tmp_path / "cache",
        graduation=True,
        download_enabled=True,
        download_delay_s=0.0,
        download_delay_extra_s=0.0,
    )
    root.devices = DeviceService(tmp_path / "run", completed)
    layers, annotations = imagefiles.golden_layers()
    with running_registry(tmp_path / "registry") as server, root.opened() as snapshotter:
        documents = imagefiles.image_documents(layers, annotations, compress=False)
        pull(snapshotter, imagefiles.push(server.host, "reboot/golden", *documents))
        with mounted(snapshotter.prepare("one", TWO, {}), tmp_path / "rootfs") as rootfs:
            (device,) = root.devices.list()
            until(lambda: root.devices.list()[0].graduated)
            wanted = hashlib.sha256((rootfs / "big").read_bytes()).hexdigest()
            until(lambda: Process.of(device.pid) is None)
            root.devices.stop_host()
            with mounted(snapshotter.prepare("two", TWO, {}), tmp_path / "other") as other:
                assert hashlib.sha256((other / "big").read_bytes()).hexdigest() == wanted
            with mounted(snapshotter.mounts("two"), tmp_path / "other") as other:
                assert (other / "big").exists()
            assert len(root.devices.list()) == 1
    root.lose_mounts()
    root.devices = DeviceService(tmp_path / "run", Settings(cache_dir=tmp_path / "cache"))
    with root.opened() as snapshotter:
        with mounted(snapshotter.mounts("one"), tmp_path / "rootfs") as rootfs:
            assert hashlib.sha256((rootfs / "big").read_bytes()).hexdigest() == wanted
            (device,) = root.devices.list()
            assert (device.graduated, device.pid) == (True, 0)
            assert not (tmp_path / "run" / "host.sock").exists()
            with pytest.raises(FailedPreconditionError):
                snapshotter.remove(TWO)
        with mounted(snapshotter.prepare("own", TWO, {LABEL_WRITABLE: "dir"}), tmp_path / "rootfs") as rootfs:
            (rootfs / "new").write_text("a writable layer needs a server")
        for key in ("own", "one", "two", TWO, ONE):
            snapshotter.remove(key)
        assert root.devices.list() == []
