"""turboOCI images through containerd: made, pulled, run, and written over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.convert.compare.listing import differences, list_tree
from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerOptions
from obdlab.system import mount
from tests import capabilities
from tests.containerd_host import NAME, ObdlabHost, containerd_with_obdlab
from tests.convert.converting import convert
from tests.convert.turbo.test_builder import listing_of
from tests.layers.golden import GOLDEN
from tests.registry.server import RegistryServer, registry_server
from tests.snapshotter import imagefiles
from tests.snapshotter.test_lazy_images import run

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["registry_server"]

pytestmark = pytest.mark.containerd

TARS = [(GOLDEN / "ext4" / f"layer{number}.tar").read_bytes() for number in (1, 2)]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ObdlabHost]:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    with containerd_with_obdlab(tmp_path / "host") as running:
        yield running


def made(server: RegistryServer, name: str, work_dir: Path, *filesystems: str, compress: bool = True) -> str:
    """Push the golden layers as an ordinary image, and make a turboOCI image of it."""
    documents = imagefiles.image_documents(TARS, compress=compress)
    source = imagefiles.push(server.host, f"snapshotter/{name}", *documents)
    options = ConvertOptions(layer=LayerOptions(virtual_size=1 << 30), turbo=filesystems, work_dir=work_dir)
    destination = source.replace(":latest", ":turbo")
    convert(source, destination, options)
    return destination


@pytest.mark.parametrize("filesystems", [("ext4",), ("erofs",), ("ext4", "erofs")], ids="+".join)
def test_an_image_runs(
    host: ObdlabHost, registry_server: RegistryServer, tmp_path: Path, filesystems: tuple[str, ...]
) -> None:
    name, compress = f"run-{len(filesystems)}-{filesystems[0]}", len(filesystems) == 1
    image = made(registry_server, name, tmp_path, *filesystems, compress=compress)
    result = host.rpull(image)
    assert result.layer_bytes < 100_000
    assert run(host, image, "one", "echo mine > /written && /busybox cat /written", "--null-io") == ""
    (point,) = [entry for entry in mount.mounts() if host.snapshotter.root in entry.mountpoint.parents]
    assert point.fs_type == ("erofs" if "erofs" in filesystems else "ext4")
    assert differences(list_tree(point.mountpoint), listing_of(TARS)) == []
    assert run(host, image, "two", "echo mine > /written && /busybox cat /written") == "mine\n"


def test_containers_write_to_a_device_of_their_own(registry_server: RegistryServer, tmp_path: Path) -> None:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"rwMode": "dir", "turboFsType": ["ext4"]}))
    with containerd_with_obdlab(tmp_path / "host", "--config", str(config)) as host:
        image = made(registry_server, "writable", tmp_path, "ext4", "erofs")
        host.rpull(image)
        command = "echo new > /written; /busybox cat /written; /busybox grep ' / ' /proc/mounts"
        printed = run(host, image, "first", command).split()
        assert printed[0] == "new"
        assert printed[1].startswith("/dev/")
        assert printed[3] == "ext4"


def test_an_ordinary_pull_says_how_to_pull_it(
    host: ObdlabHost, registry_server: RegistryServer, tmp_path: Path
) -> None:
    image = made(registry_server, "ordinary", tmp_path, "ext4")
    with pytest.raises(AssertionError, match=r"is a turboOCI layer, which .*obdlab image pull"):
        host.ctr("images", "pull", "--plain-http", "--snapshotter", NAME, image)
