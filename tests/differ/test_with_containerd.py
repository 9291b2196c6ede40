"""Stock containerd and ctr with the snapshotter as differ: layers are placed, made of plain ones, and exported."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.containerd.client import Containerd
from obdlab.containerd.errors import InvalidArgumentError, NotFoundError
from obdlab.containerd.gclabels import of_config, of_manifest
from obdlab.containerd.images import Image
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.formats import oci
from obdlab.image.config import COMMIT_FILE, ImageConfig
from obdlab.image.open import open_image, open_stack
from obdlab.layers.tarwrap import open_tarwrap
from obdlab.localfile import LocalFile
from obdlab.snapshotter.writable import LABEL_WRITABLE
from obdlab.volumes.detect import FileTree
from tests import capabilities
from tests.containerd_host import NAME, ObdlabHost, containerd_with_obdlab
from tests.registry.server import RegistryServer, registry_server, running_registry
from tests.snapshotter import imagefiles
from tests.snapshotter.test_lazy_images import push_golden, wait_for
from tests.snapshotter.test_with_containerd import LISTING

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def converted(archive: Path, directory: Path) -> list[str]:
    """The digests of the layers that a conversion makes, bottom first."""
    command = [sys.executable, "-m", "obdlab", "image", "convert", "--quiet", f"oci-archive:{archive}"]
    subprocess.run([*command, f"oci:{directory / 'layout'}:obd", "--no-hash-trees"], check=True)
    layout = ImageLayout(directory / "layout")
    (entry,) = layout.select("obd")
    manifest = oci.Manifest.parse(layout.read_blob(entry, oci.MAX_MANIFEST_SIZE), "converted")
    return [layer.digest for layer in manifest.layers]


def test_a_plain_image_becomes_block_layers(converting: ObdlabHost, archive: Path, tmp_path: Path) -> None:
    host = converting
    for snapshotter in (NAME, "overlayfs"):
        host.ctr("images", "import", "--local", "--snapshotter", snapshotter, str(archive))
    run = ("run", "--rm", "--snapshotter")
    ours = host.ctr(*run, NAME, PLAIN, "ours", "/bin/sh", "-c", LISTING)
    theirs = host.ctr(*run, "overlayfs", PLAIN, "theirs", "/bin/sh", "-c", LISTING)
    assert "/data/old/visible" in ours
    assert ours == theirs
    (device,) = host.snapshotter.devices.list()
    placed = [Path(lower.dir) / COMMIT_FILE for lower in ImageConfig.load(device.config).lowers]
    assert [oci.digest_of(file.read_bytes()) for file in placed] == converted(archive, tmp_path)
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


def test_the_transfer_service_uses_the_differ_that_it_is_given(
    converting: ObdlabHost, registry_server: RegistryServer
) -> None:
    host = converting
    layer = imagefiles.LayerTar()
    layer.add("busybox", imagefiles.busybox_bytes(), mode=0o755)
    layer.add("moved", b"by the transfer service")
    image = push(registry_server, "transferred", [layer.bytes()], [{}])
    before = {device.config for device in host.snapshotter.devices.list()}
    host.ctr("images", "pull", "--plain-http", "--snapshotter", NAME, image)
    run = ("run", "--rm", "--snapshotter", NAME, image, "moved", "/busybox", "cat", "/moved")
    assert host.ctr(*run) == "by the transfer service"
    (device,) = [each for each in host.snapshotter.devices.list() if each.config not in before]
    assert len(ImageConfig.load(device.config).lowers) == 1


def workers(host: ObdlabHost) -> list[str]:
    """The processes of the differ."""
    found = []
    for task in Path(f"/proc/{host.snapshotter.pid}/task").iterdir():
        found += (task / "children").read_text().split()
    return [pid for pid in found if b"obdlab.differ.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_client_that_goes_away_ends_the_work(converting: ObdlabHost, tmp_path: Path) -> None:
    host = converting
    layer = imagefiles.LayerTar()
    for number in range(64):
        layer.add(f"noise{number}", random.Random(number).randbytes(1 << 20))
    imagefiles.write_oci_archive(tmp_path / "noise.tar", "example.test/noise:1", [layer.bytes()])
    command = ["ctr", "--address", host.containerd.address, "--namespace", "test", "images", "import", "--local"]
    with subprocess.Popen([*command, "--snapshotter", NAME, str(tmp_path / "noise.tar")]) as client:
        wait_for(lambda: workers(host) != [] or client.poll() is not None)
        assert client.poll() is None
        for pid in workers(host):  # a worker that ends before the news comes is not given up
            os.kill(int(pid), signal.SIGSTOP)
        client.kill()
    wait_for(lambda: workers(host) == [])
    wait_for(lambda: list((host.snapshotter.root / "differ").iterdir()) == [])
    assert "given up" in host.snapshotter.log.read_text()
    # It is made whole at the next attempt.
    host.ctr(*command[5:], "--snapshotter", NAME, str(tmp_path / "noise.tar"))


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


def put_layer(host: ObdlabHost, parent: str, layer: bytes, name: str) -> None:
    """Unpack a layer as a client does that has no target name for it, and commit it."""
    digest = oci.digest_of(layer)
    with Containerd(host.containerd.address, "test") as client, client.lease(expire_s=600) as leased:
        leased.content.write(digest, layer)
        snapshots = leased.snapshots(NAME)
        mounts = snapshots.prepare(f"extract-{name}", parent)
        assert leased.differ.apply(oci.OCI_LAYER, digest, len(layer), mounts) == digest
        snapshots.commit(name, f"extract-{name}", {"containerd.io/gc.root": "test"})


def diff_of(host: ObdlabHost, parent: str, name: str) -> tuple[str, bytes]:
    """Return media type and bytes of what a client gets that asks for a committed snapshot's difference."""
    with Containerd(host.containerd.address, "test") as client, client.lease(expire_s=600) as leased:
        snapshots = leased.snapshots(NAME)
        left, right = snapshots.view("left", parent), snapshots.view("right", name)
        try:
            made = leased.differ.diff(left, right)
        finally:
            snapshots.remove("left")
            snapshots.remove("right")
        return made.media_type, b"".join(leased.content.stream(made.digest, made.size))


@pytest.mark.kernel
def test_committed_layers_are_given_back(plain_host: ObdlabHost, tmp_path: Path) -> None:
    host = plain_host
    layers, _ = imagefiles.golden_layers()
    put_layer(host, "", layers[0], "bottom")
    put_layer(host, "bottom", layers[1], "top")
    # A blob that was placed is the answer as it is.
    assert diff_of(host, "bottom", "top") == (oci.OCI_LAYER, layers[1])
    assert diff_of(host, "", "bottom") == (oci.OCI_LAYER, layers[0])
    # A blob that another differ unpacked has lost its tar, and gets one.
    there = (host.snapshotter.root / "snapshots").glob(f"*/fs/{COMMIT_FILE}")
    (placed,) = [file for file in there if file.read_bytes() == layers[1]]
    with open_tarwrap(LocalFile(placed)) as content:
        bare = content.read_at(0, content.size)
    placed.write_bytes(bare)
    kind, again = diff_of(host, "bottom", "top")
    assert kind == oci.OCI_LAYER
    (tmp_path / "again").write_bytes(again)
    with open_tarwrap(LocalFile(tmp_path / "again")) as content:
        assert content.read_at(0, content.size) == bare
    # A sealed layer is packed.
    with Containerd(host.containerd.address, "test") as client:
        snapshots = client.snapshots(NAME)
        root = {"containerd.io/gc.root": "test"}
        (mount,) = snapshots.prepare("writer", "top", {LABEL_WRITABLE: "dir"} | root)
        (Path(mount.source) / "written").write_text("by hand")
        snapshots.commit("sealed", "writer", root)
    _, packed = diff_of(host, "top", "sealed")
    assert read(files_of(packed, layers[:2], tmp_path), b"/written") == b"by hand"


@pytest.mark.kernel
def test_other_sides_are_left_to_containerd(plain_host: ObdlabHost) -> None:
    host = plain_host
    layers, _ = imagefiles.golden_layers()
    put_layer(host, "", layers[0], "bottom")
    put_layer(host, "bottom", layers[1], "top")
    # Not its parent; and a container that writes to an overlay: ordinary tars.
    assert diff_of(host, "", "top")[0] == oci.OCI_LAYER_GZIP
    with Containerd(host.containerd.address, "test") as client, client.lease(expire_s=600) as leased:
        snapshots = leased.snapshots(NAME)
        left, right = snapshots.view("left", "top"), snapshots.prepare("container", "top")
        assert leased.differ.diff(left, right).media_type == oci.OCI_LAYER_GZIP


def test_files_are_not_put_into_containers(converting: ObdlabHost) -> None:
    # As when a container is restored from a checkpoint: its changes are applied to its own snapshot.
    host = converting
    layer = imagefiles.LayerTar()
    layer.add("restored", b"data")
    data = layer.bytes()
    with Containerd(host.containerd.address, "test") as client, client.lease(expire_s=600) as leased:
        leased.content.write(oci.digest_of(data), data)
        (mount,) = leased.snapshots(NAME).prepare("a-container", "")
        digest = leased.differ.apply(oci.OCI_LAYER, oci.digest_of(data), len(data), [mount])
        assert digest == oci.digest_of(data)
        assert sorted(path.name for path in Path(mount.source).iterdir()) == ["restored"]
        leased.snapshots(NAME).remove("a-container")


def test_wrong_descriptors_are_refused(plain_host: ObdlabHost) -> None:
    host = plain_host
    layers, _ = imagefiles.golden_layers()
    with Containerd(host.containerd.address, "test") as client, client.lease(expire_s=600) as leased:
        leased.content.write(oci.digest_of(layers[0]), layers[0])
        mounts = leased.snapshots(NAME).prepare("extract-one", "")
        with pytest.raises(InvalidArgumentError, match="not of 7 bytes"):
            leased.differ.apply(oci.OCI_LAYER, oci.digest_of(layers[0]), 7, mounts)
        with pytest.raises(NotFoundError):
            leased.differ.apply(oci.OCI_LAYER, oci.digest_of(b"other"), 5, mounts)
        with pytest.raises(InvalidArgumentError, match="not a digest"):
            leased.differ.apply(oci.OCI_LAYER, "sha256:../../etc", 5, mounts)
    assert list((host.snapshotter.root / "snapshots").glob(f"*/fs/{COMMIT_FILE}")) == []


@pytest.mark.kernel
def test_a_service_killed_while_it_copied_thaws_at_its_next_start(
    plain_host: ObdlabHost, registry_server: RegistryServer
) -> None:
    host, image = plain_host, push_golden(registry_server, "frozen")
    start(host, image, "one", "dir")
    (device,) = [each for each in host.snapshotter.devices.list() if not each.read_only]
    host.snapshotter.stop(signal.SIGKILL)
    subprocess.run(["fsfreeze", "--freeze", device.config.parent / "mountpoint"], check=True)
    host.start_snapshotter()
    execute(host, "one", "echo on > /written")
    assert execute(host, "one", "/busybox cat /written") == "on\n"


def test_layers_of_erofs(tmp_path: Path, archive: Path) -> None:
    capabilities.require("containerd")
    with containerd_with_obdlab(tmp_path / "host", differ={"convertLayers": "erofs"}) as host:
        host.ctr("images", "import", "--local", "--snapshotter", NAME, str(archive))
        run = ("run", "--rm", "--snapshotter", NAME, PLAIN, "one", "/bin/cat", "/data/old/visible", "/proc/mounts")
        printed = host.ctr(*run)
        assert printed.startswith("new")
        (device,) = host.snapshotter.devices.list()
        assert FileTree(open_image(device.config, traces=False)).kind == "erofs"
        assert len(ImageConfig.load(device.config).lowers) == 3


@pytest.mark.kernel
def test_an_overlay_on_an_image_becomes_a_layer(
    converting: ObdlabHost, registry_server: RegistryServer, tmp_path: Path
) -> None:
    host, image = converting, push_golden(registry_server, "overlay")
    start(host, image, "overlay", "none")
    script = "echo new > /new; /busybox rm -r /dir; /busybox mkdir /dir; echo only > /dir/only; /busybox ls -a /dir"
    assert execute(host, "overlay", "/busybox ls -a /").split() != []
    there = [name for name in execute(host, "overlay", "/busybox ls /").split() if name not in ("busybox", "new")]
    victim = there[0]
    execute(host, "overlay", script.replace("/dir", f"/{victim}"))
    below, _ = imagefiles.golden_layers()
    layer = diff(host, "overlay")
    tree = files_of(layer, below[:2], tmp_path)
    assert read(tree, b"/new") == b"new\n"
    assert set(tree.entries(tree.find(victim.encode()))) == {b"only"}
    # A checkpoint of the same container is for a runtime that restores files.
    host.ctr("containers", "checkpoint", "--rw", "overlay", "example.test/checkpoint:1")
    with Containerd(host.containerd.address, "test") as client:
        index = json.loads(client.content.read(client.images.get("example.test/checkpoint:1").digest))
    (kept,) = [each for each in index["manifests"] if "layer" in each["mediaType"]]
    assert kept["mediaType"] == oci.OCI_LAYER_GZIP
    assert oci.BLOB_DIGEST not in kept.get("annotations", {})
    host.ctr("tasks", "rm", "--force", "overlay")
    host.ctr("containers", "rm", "overlay")
