"""turboOCI images through containerd: made, pulled, run, and written over."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.convert.compare.listing import differences, list_tree
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerOptions
from obdlab.convert.publish.hot_and_traces import add_hot_layer
from obdlab.errors import ObdlabError
from obdlab.formats import oci
from obdlab.formats.trace import Trace
from obdlab.pull.errors import PullError
from obdlab.pull.unpack import Outcome
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from obdlab.system import mount
from tests import capabilities
from tests.containerd_host import NAME, ObdlabHost, containerd_with_obdlab
from tests.convert.converting import convert
from tests.convert.turbo.test_builder import listing_of
from tests.layers.golden import GOLDEN, TURBO
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


@pytest.mark.parametrize("filesystem", ["ext4", "erofs"])
def test_a_hot_layer_lies_on_top(
    host: ObdlabHost, registry_server: RegistryServer, tmp_path: Path, filesystem: str
) -> None:
    image = made(registry_server, f"hot-{filesystem}", tmp_path, filesystem)
    hot = image.replace(":turbo", ":hot")
    with (
        closing(RegistryClient()) as client,
        closing(open_source(image, client)) as source,
        closing(open_destination(hot, client)) as target,
    ):
        trace = Trace.from_reads([(0, 4096, 4096), (1, 4096, 4096)]).to_bytes()
        add_hot_layer(source, target, trace, Settings(cache_dir=tmp_path / "cache"), client=client)
    result = host.rpull(hot)
    assert [layer.outcome for layer in result.layers] == [Outcome.UNPACKED, Outcome.UNPACKED, Outcome.LAZY]
    assert run(host, hot, "hot", "echo ran", "--null-io") == ""
    (point,) = [entry for entry in mount.mounts() if host.snapshotter.root in entry.mountpoint.parents]
    assert point.fs_type == filesystem
    assert differences(list_tree(point.mountpoint), listing_of(TARS)) == []


def test_an_ordinary_pull_says_how_to_pull_it(
    host: ObdlabHost, registry_server: RegistryServer, tmp_path: Path
) -> None:
    image = made(registry_server, "ordinary", tmp_path, "ext4")
    with pytest.raises(AssertionError, match=r"is a turboOCI layer, which .*obdlab image pull"):
        host.ctr("images", "pull", "--plain-http", "--snapshotter", NAME, image)


def published(server: RegistryServer, name: str, tars: list[bytes], targets: list[bytes]) -> str:
    """Push a turboOCI image of these uncompressed blobs, whose annotations name these targets."""
    annotations = []
    for tar, target in zip(tars, targets, strict=True):
        blob = gzip.compress(tar, 1, mtime=0)  # as image_documents does
        annotations.append(
            {
                oci.BLOB_DIGEST: oci.digest_of(blob),
                oci.BLOB_SIZE: str(len(blob)),
                oci.TURBO_TARGET_DIGEST: oci.digest_of(target),
                oci.TURBO_TARGET_MEDIA_TYPE: oci.OCI_LAYER_GZIP,
            }
        )
    documents, manifest = imagefiles.image_documents(tars, annotations)
    stored = documents | {oci.digest_of(target): target for target in targets}
    return imagefiles.push(server.host, f"snapshotter/{name}", stored, manifest)


def blob_tars(image: str) -> list[bytes]:
    reference = Reference.parse(image)
    with closing(RegistryClient()) as client:
        layers = oci.Manifest.parse(client.get_manifest(reference).data).layers
        place = client.repository(reference)
        return [gzip.decompress(client.read_blob(place, each.digest, each.size, 1 << 24)) for each in layers]


def original_tar(number: int) -> bytes:
    """The uncompressed blob with the files that the original's tools made of a layer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("ext4.fs.meta", ".turbo.ociv1", "gzip.meta"):
            data = b"" if name == ".turbo.ociv1" else (TURBO / f"l{number}.{name}").read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_no_image_chooses_the_files_of_another(
    host: ObdlabHost, registry_server: RegistryServer, tmp_path: Path
) -> None:
    victim = made(registry_server, "victim", tmp_path, "ext4")
    targets = [gzip.compress(tar, 9) for tar in TARS]  # any other bytes
    hostile = published(registry_server, "hostile", blob_tars(victim), targets)
    with pytest.raises(ObdlabError, match=f"got {oci.digest_of(targets[0])}, wanted sha256:"):
        host.rpull(hostile)
    assert host.ctr("snapshots", "--snapshotter", NAME, "ls").count("sha256:") == 0
    host.rpull(victim)
    assert run(host, victim, "victim", "echo ran") == "ran\n"


@pytest.mark.parametrize("allowed", [False, True])
def test_an_image_of_the_original_needs_a_setting(
    registry_server: RegistryServer, tmp_path: Path, allowed: bool
) -> None:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    tars = [original_tar(number) for number in (1, 2, 3)]
    targets = [(TURBO / f"l{number}.tar.gz").read_bytes() for number in (1, 2, 3)]
    image = published(registry_server, "original", tars, targets)
    other = published(registry_server, "other", tars, [targets[0], targets[2], targets[1]])
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"turboTargetsByLabel": allowed}))
    with containerd_with_obdlab(tmp_path / "host", "--config", str(config)) as host:
        if not allowed:
            with pytest.raises(ObdlabError, match=r"convert the image again.*turboTargetsByLabel"):
                host.rpull(image)
            return
        host.rpull(image)
        assert run(host, image, "original", "echo ran") == "ran\n"
        with pytest.raises(PullError, match=f"another image made .*wanted {oci.digest_of(targets[2])}"):
            host.rpull(other)
