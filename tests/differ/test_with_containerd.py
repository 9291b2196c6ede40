"""Stock containerd and ctr with the snapshotter as differ: layers are placed, made of plain ones, and exported."""

from __future__ import annotations

import hashlib
import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from obdlab.containerd.client import Containerd
from obdlab.containerd.gclabels import of_config, of_manifest
from obdlab.containerd.images import Image
from obdlab.formats import oci
from obdlab.image.config import COMMIT_FILE, ImageConfig
from obdlab.image.open import open_stack
from obdlab.volumes.detect import FileTree
from tests import capabilities
from tests.containerd_host import NAME, ObdlabHost, containerd_with_obdlab
from tests.registry.server import RegistryServer, registry_server, running_registry
from tests.snapshotter import imagefiles
from tests.snapshotter.test_lazy_images import push_golden
from tests.snapshotter.test_with_containerd import LISTING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.containerd, pytest.mark.registry]
__all__ = ["registry_server", "running_registry"]

PLAIN = "example.test/busybox:latest"
WRITABLE = ("--snapshotter-label", "containerd.io/snapshot/overlaybd.writable=")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    imagefiles.require_busybox()
    path = tmp_path_factory.mktemp("archive") / "busybox.tar"
    imagefiles.write_oci_archive(path, PLAIN, imagefiles.busybox_layers())
    return path


@pytest.fixture(scope="module")
def converting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObdlabHost]:
    capabilities.require("containerd")
    with containerd_with_obdlab(tmp_path_factory.mktemp("host"), differ={"convertLayers": "ext4"}) as running:
        yield running


def snapshot(host: ObdlabHost, key: str) -> dict:
    return json.loads(host.ctr("snapshots", "--snapshotter", NAME, "info", key))


def test_a_plain_image_becomes_block_layers(converting: ObdlabHost, archive: Path) -> None:
    host = converting
    for snapshotter in (NAME, "overlayfs"):
        host.ctr("images", "import", "--local", "--snapshotter", snapshotter, str(archive))
    run = ("run", "--rm", "--snapshotter")
    ours = host.ctr(*run, NAME, PLAIN, "ours", "/bin/sh", "-c", LISTING)
    theirs = host.ctr(*run, "overlayfs", PLAIN, "theirs", "/bin/sh", "-c", LISTING)
    assert "/data/old/visible" in ours
    assert ours == theirs
    (device,) = host.snapshotter.devices.list()
    config = ImageConfig.load(device.config)
    assert len(config.lowers) == 3
    assert not (host.snapshotter.root / "differ").exists() or not list((host.snapshotter.root / "differ").iterdir())


def push(server: RegistryServer, name: str, layers: list[bytes], annotations: list[dict[str, str]]) -> str:
    documents = imagefiles.image_documents(layers, annotations, compress=not any(annotations))
    return imagefiles.push(server.host, f"differ/{name}", *documents)


def pull(host: ObdlabHost, image: str) -> str:
    return host.ctr("images", "pull", "--local", "--plain-http", "--snapshotter", NAME, image)


def test_plain_layers_on_a_block_image_become_blocks(converting: ObdlabHost, registry_server: RegistryServer) -> None:
    host = converting
    top = imagefiles.LayerTar()
    top.add("made-here", b"by the differ")
    top.add("busybox", imagefiles.busybox_bytes(), mode=0o755)
    layers, notes = imagefiles.golden_layers()
    layers, notes = [*layers[:2], top.bytes()], [*notes[:2], {}]
    image = push(registry_server, "mixed", layers, notes)
    assert host.rpull(image).layer_bytes == len(layers[2])
    before = {device.config for device in host.snapshotter.devices.list()}
    assert host.ctr("run", "--rm", "--snapshotter", NAME, image, "mixed", "/busybox", "cat", "/made-here") == (
        "by the differ"
    )
    (device,) = [each for each in host.snapshotter.devices.list() if each.config not in before]
    config = ImageConfig.load(device.config)
    assert [bool(lower.digest) for lower in config.lowers] == [True, True, False]


def test_an_image_that_lists_other_layers_is_refused(converting: ObdlabHost, registry_server: RegistryServer) -> None:
    # Its first layer would get the name of another image's layer.
    host = converting
    blobs, manifest = imagefiles.image_documents([imagefiles.busybox_layers()[1]])
    document = json.loads(blobs[manifest])
    config = json.loads(blobs.pop(document["config"]["digest"]))
    config["rootfs"]["diff_ids"] = ["sha256:" + "6" * 64]
    for kind, content in (("config", config), ("manifest", document)):
        data = json.dumps(content).encode()
        digest = oci.digest_of(data)
        blobs[digest] = data
        if kind == "config":
            document["config"] |= {"digest": digest, "size": len(data)}
    image = imagefiles.push(registry_server.host, "differ/liar", blobs, digest)
    with pytest.raises(AssertionError, match="wrong diff id"):
        pull(host, image)
    assert "6" * 64 not in host.ctr("snapshots", "--snapshotter", NAME, "ls")


@pytest.fixture
def plain_host(tmp_path: Path) -> Iterator[ObdlabHost]:
    capabilities.require("containerd")
    with containerd_with_obdlab(tmp_path / "host", differ={}) as running:
        yield running


def test_by_default_plain_layers_stay_plain(plain_host: ObdlabHost, archive: Path) -> None:
    host = plain_host
    host.ctr("images", "import", "--local", "--snapshotter", NAME, str(archive))
    assert host.ctr("run", "--rm", "--snapshotter", NAME, PLAIN, "one", "/bin/cat", "/data/old/visible") == "new"
    assert host.snapshotter.devices.list() == []


def diff(host: ObdlabHost, key: str, *options: str) -> bytes:
    command = ["ctr", "--address", host.containerd.address, "--namespace", "test", "snapshots", "--snapshotter", NAME]
    done = subprocess.run([*command, "diff", *options, key], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(host: ObdlabHost, image: str, name: str, mode: str) -> None:
    capabilities.require("kernel")
    host.rpull(image)
    mounts = ("--mount", f"type=bind,src={imagefiles.busybox()},dst=/busybox,options=rbind:ro")
    options = ("--detach", "--snapshotter", NAME, WRITABLE[0], WRITABLE[1] + mode)
    host.ctr("run", *options, *mounts, image, name, "/busybox", "sleep", "1000")


def execute(host: ObdlabHost, name: str, command: str) -> str:
    return host.ctr("tasks", "exec", "--exec-id", hashlib.sha256(command.encode()).hexdigest()[:12], name,
                    "/busybox", "sh", "-c", command)  # fmt: skip


def files_of(layer: bytes, below: list[bytes], directory: Path) -> FileTree:
    paths = []
    for number, blob in enumerate([*below, layer]):
        paths.append(directory / f"{number}.obd")
        paths[-1].write_bytes(blob)
    return FileTree(open_stack(paths))


def read(tree: FileTree, path: bytes) -> bytes:
    return b"".join(tree.content(tree.find(path)))


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["dir", "dev"])
def test_a_running_container_becomes_a_layer(
    plain_host: ObdlabHost, registry_server: RegistryServer, tmp_path: Path, mode: str
) -> None:
    host, image = plain_host, push_golden(registry_server, f"differ-{mode}")
    start(host, image, "one", mode)
    execute(host, "one", "echo first > /first; mkdir -p /made; echo deep > /made/deep")
    layer = diff(host, "one")
    below, _ = imagefiles.golden_layers()
    assert read(files_of(layer, below[:2], tmp_path), b"/made/deep") == b"deep\n"
    execute(host, "one", "echo goes on > /first")  # it is not frozen
    second = diff(host, "one")
    assert second != layer
    assert read(files_of(second, below[:2], tmp_path), b"/first") == b"goes on\n"
    assert not list((host.snapshotter.root / "differ").iterdir())


def commit(host: ObdlabHost, image: str, name: str, key: str) -> dict:
    """Make an image of a container, as nerdctl and Docker do; return the new layer's descriptor."""
    with Containerd(host.containerd.address, "test") as client, client.lease(expire_s=600) as leased:
        source = leased.images.get(image)
        manifest = json.loads(leased.content.read(source.digest))
        config = json.loads(leased.content.read(manifest["config"]["digest"]))
        parent = snapshot(host, key)["Parent"]
        left = leased.snapshots(NAME).view(f"{key}-parent-view", parent)
        right = leased.snapshots(NAME).mounts(key)
        try:
            made = leased.differ.diff(left, right, {"a-label": "of the client"})
        finally:
            leased.snapshots(NAME).remove(f"{key}-parent-view")
        info = leased.content.info(made.digest)
        assert info.labels["containerd.io/uncompressed"] == made.digest
        assert info.labels["a-label"] == "of the client"
        layer = {
            "mediaType": made.media_type,
            "digest": made.digest,
            "size": made.size,
            "annotations": dict(made.annotations),
        }
        config["rootfs"]["diff_ids"].append(info.labels["containerd.io/uncompressed"])
        manifest["layers"].append(layer)
        for document in (config, manifest):
            data = json.dumps(document).encode()
            digest = oci.digest_of(data)
            if document is config:
                manifest["config"] |= {"digest": digest, "size": len(data)}
                leased.content.write(digest, data, of_config(NAME, oci.chain_id(config["rootfs"]["diff_ids"])))
            else:
                leased.content.write(digest, data, of_manifest(oci.Manifest.parse(data, name)))
                leased.images.put(Image(name, manifest["mediaType"], digest, len(data), {}))
    return layer


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["dir", "dev"])
def test_a_committed_container_is_an_overlaybd_image(
    plain_host: ObdlabHost, registry_server: RegistryServer, mode: str
) -> None:
    host, image = plain_host, push_golden(registry_server, f"commit-{mode}")
    start(host, image, "one", mode)
    execute(host, "one", "echo changed > /changed")
    layer = commit(host, image, "example.test/changed:one", "one")
    notes = layer["annotations"]
    assert layer["mediaType"] == oci.OCI_LAYER
    assert notes[oci.BLOB_DIGEST] == layer["digest"]
    assert notes[oci.BLOB_SIZE] == str(layer["size"])
    assert notes[oci.BLOB_FS_TYPE] == "ext4"
    assert notes[oci.OVERLAYBD_VERSION] == "0.1.0"
    mounts = ("--mount", f"type=bind,src={imagefiles.busybox()},dst=/busybox,options=rbind:ro")
    run = ("run", "--rm", "--snapshotter", NAME, *mounts, "example.test/changed:one", "two", "/busybox", "cat")
    assert host.ctr(*run, "/changed") == "changed\n"  # ctr unpacks it first: the differ places the blob
    images = [each for each in host.snapshotter.devices.list() if each.read_only]
    (device,) = [each for each in images if len(ImageConfig.load(each.config).lowers) == 3]
    placed = device.config.parents[1] / "fs" / COMMIT_FILE
    assert oci.digest_of(placed.read_bytes()) == layer["digest"]


def test_a_damaged_layer_is_not_placed(plain_host: ObdlabHost, registry_server: RegistryServer) -> None:
    layers, notes = imagefiles.golden_layers()
    damaged = layers[0][:1536] + layers[0][1536:2048] + bytes(len(layers[0]) - 2048)  # its digest is right
    image = push(registry_server, "damaged", [damaged], [dict.fromkeys(notes[0], "")])
    with pytest.raises(AssertionError, match="failed to extract layer"):
        pull(plain_host, image)
    assert list((plain_host.snapshotter.root / "snapshots").glob(f"*/fs/{COMMIT_FILE}")) == []
