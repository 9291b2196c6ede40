"""Overlaybd images under obdlab's own snapshotter: only documents are fetched, and containerd can live with it."""

from __future__ import annotations

import gzip
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from obdlab.cli import main
from obdlab.containerd.client import Containerd
from obdlab.containerd.errors import NotFoundError, UnavailableError
from obdlab.containerd.snapshots import Kind
from obdlab.convert.publish.hot_and_traces import attach_trace
from obdlab.errors import SourceError
from obdlab.formats.oci import (
    BLOB_DIGEST,
    BLOB_SIZE,
    HASH_TREE,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OVERLAYBD_VERSION,
    TRACE_LABEL,
    digest_of,
)
from obdlab.formats.trace import Trace
from obdlab.image.config import ImageConfig
from obdlab.pull.errors import PullError
from obdlab.pull.rpull import PullResult, rpull
from obdlab.pull.unpack import CRI_IMAGE_LABEL, IMAGE_LABEL, Outcome
from obdlab.registry.platform import host_platform
from obdlab.settings.settings import Settings
from tests import capabilities
from tests.containerd_host import NAME, ObdlabHost, containerd_with_obdlab
from tests.pull.images import BUSYBOX, GOLDEN, Layer, layer, lose_blob, push_image, shell_layer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from obdlab.registry.client import RegistryClient
    from obdlab.registry.reference import Reference
    from tests.registry.server import RegistryServer

pytestmark = [pytest.mark.containerd, pytest.mark.registry]

#: A shell for the golden image, which holds no programs.
SHELL = ("--mount", f"type=bind,src={BUSYBOX},dst=/busybox,options=rbind:ro")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObdlabHost]:
    capabilities.require("containerd")
    with containerd_with_obdlab(tmp_path_factory.mktemp("lazy")) as running:
        yield running


@pytest.fixture
def containerd(host: ObdlabHost) -> Iterator[Containerd]:
    """The namespace of ``host.ctr``, emptied at the end: nothing may hold on to a snapshot then."""
    with Containerd(host.containerd.address, "test") as client:
        yield client
        for image in client.images.list():
            client.images.delete(image.name, sync=True)
        assert client.snapshots(NAME).list() == []
        assert client.content.list() == []
        assert client.leases.list() == []
        assert list((host.snapshotter.root / "snapshots").iterdir()) == []


def overlaybd_layers() -> list[Layer]:
    layers = []
    for name in ("layer1.obd", "layer2.obd"):
        data = (GOLDEN / name).read_bytes()
        notes = {BLOB_DIGEST: digest_of(data), BLOB_SIZE: str(len(data)), OVERLAYBD_VERSION: "0.1.0"}
        layers.append(Layer(data, digest_of(data), OCI_LAYER, notes))
    return layers


def pull(
    containerd: Containerd, registry: RegistryClient, reference: Reference, *, download: bool = False
) -> PullResult:
    return rpull(containerd, registry, reference, snapshotter=NAME, platform=host_platform(), download=download)


def run(host: ObdlabHost, reference: Reference, name: str, command: str, *options: str) -> str:
    shell = ("/busybox", "sh") if options else ("/bin/sh",)
    return host.ctr("run", "--rm", "--snapshotter", NAME, *options, str(reference), name, *shell, "-c", command)


def test_only_documents_are_fetched(
    host: ObdlabHost, containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    reference, manifest = push_image(registry, f"{registry_server.host}/lazy/documents", overlaybd_layers())
    before = len(registry_server.requests())
    result = pull(containerd, registry, reference)
    assert [item.outcome for item in result.layers] == [Outcome.LAZY] * 2
    assert result.fetched_bytes == len(manifest.to_bytes()) + manifest.config.size

    digests = {item.digest for item in manifest.layers}
    asked = [entry["uri"] for entry in registry_server.requests()[before:]]
    assert asked
    assert not [uri for uri in asked if any(digest in uri for digest in digests)]
    assert {info.digest for info in containerd.content.list()} == {result.digest, manifest.config.digest}

    snapshots = containerd.snapshots(NAME).list()
    assert [info.kind for info in snapshots] == [Kind.COMMITTED] * 2
    assert containerd.leases.list() == []


def test_a_trace_that_refers_to_the_image_helps_its_starts(
    host: ObdlabHost,
    containerd: Containerd,
    registry: RegistryClient,
    registry_server: RegistryServer,
    tmp_path: Path,
) -> None:
    reference, _ = push_image(registry, f"{registry_server.host}/lazy/traced", overlaybd_layers())
    trace = Trace.from_reads([(0, 4096, 65536), (1, 4096, 8192)]).to_bytes()
    attach_trace(registry, reference, trace, Settings(cache_dir=tmp_path / "cache"), platform=None)
    pull(containerd, registry, reference)
    configs = [
        ImageConfig.load(path) for path in (host.snapshotter.root / "snapshots").glob("*/block/config.v1.json")
    ]
    # Of the bottom layer alone it would be a trace of another image.
    assert sorted((len(config.lowers), config.trace.digest) for config in configs) == [
        (1, ""),
        (2, digest_of(trace)),
    ]


def test_a_hostile_image_does_not_get_the_name_of_another(
    host: ObdlabHost, containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    """Its config lists the victim's diff IDs, over a layer of its own."""
    good = overlaybd_layers()
    data = good[0].data + bytes(1024)  # another blob, which opens as a layer all the same
    notes = {BLOB_DIGEST: digest_of(data), BLOB_SIZE: str(len(data)), OVERLAYBD_VERSION: "0.1.0"}
    for layers in (
        [Layer(data, good[0].diff_id, OCI_LAYER, notes)],
        [good[0], Layer(data, good[1].diff_id, OCI_LAYER, notes)],
    ):
        hostile, _ = push_image(registry, f"{registry_server.host}/lazy/hostile{len(layers)}", layers)
        with pytest.raises(PullError, match=f"wanted diff ID {layers[-1].diff_id}"):
            pull(containerd, registry, hostile)
        assert containerd.snapshots(NAME).list() == []
    victim, _ = push_image(registry, f"{registry_server.host}/lazy/victim", good)
    assert pull(containerd, registry, victim).count(Outcome.LAZY) == 2
    assert "ran" in run(host, victim, "victim", "echo ran", *SHELL)


def test_a_layer_that_is_said_to_be_another_blob_is_refused(
    containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    good = overlaybd_layers()[0]
    for change in ({BLOB_DIGEST: "sha256:" + "1" * 64}, {BLOB_SIZE: str(len(good.data) + 512)}):
        layers = [Layer(good.data, good.diff_id, OCI_LAYER, good.annotations | change)]
        reference, _ = push_image(registry, f"{registry_server.host}/lazy/contradiction", layers)
        with pytest.raises(PullError, match="is said to be another blob"):
            pull(containerd, registry, reference)


def test_a_compressed_layer_is_fetched_and_checked(
    host: ObdlabHost, containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    """Its digest is not its diff ID, so nothing proves the name before the blob is there."""
    good = overlaybd_layers()[0]
    data = gzip.compress(good.data, 1, mtime=0)
    notes = {BLOB_DIGEST: digest_of(data), BLOB_SIZE: str(len(data)), OVERLAYBD_VERSION: "0.1.0"}
    layers = [Layer(data, good.diff_id, OCI_LAYER_GZIP, notes)]
    reference, _ = push_image(registry, f"{registry_server.host}/lazy/compressed", layers)
    assert pull(containerd, registry, reference).count(Outcome.UNPACKED) == 1
    assert "ran" in run(host, reference, "compressed", "echo ran", *SHELL)


def test_an_annotation_names_no_other_image(
    host: ObdlabHost, containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    good = overlaybd_layers()[0]
    notes = dict.fromkeys((IMAGE_LABEL, CRI_IMAGE_LABEL), "127.0.0.1:1/other/image:1") | {TRACE_LABEL: "x,1"}
    layers = [Layer(good.data, good.diff_id, OCI_LAYER, dict(good.annotations) | notes)]
    reference, _ = push_image(registry, f"{registry_server.host}/lazy/renamed", layers)
    assert pull(containerd, registry, reference).count(Outcome.LAZY) == 1
    assert "ran" in run(host, reference, "renamed", "echo ran", *SHELL)


def test_second_pull_changes_nothing(
    host: ObdlabHost, containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    reference, _ = push_image(registry, f"{registry_server.host}/lazy/twice", overlaybd_layers())
    pull(containerd, registry, reference)
    before = (containerd.snapshots(NAME).list(), containerd.content.list(), containerd.images.list())
    result = pull(containerd, registry, reference)
    assert result.count(Outcome.PRESENT) == 2
    assert (containerd.snapshots(NAME).list(), containerd.content.list(), containerd.images.list()) == before


def test_stock_ctr_runs_lists_checks_and_removes(
    host: ObdlabHost, containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    reference, _ = push_image(registry, f"{registry_server.host}/lazy/ctr", overlaybd_layers())
    pull(containerd, registry, reference)
    assert "written" in run(
        host, reference, "lazily", "/busybox echo written > /f; /busybox cat /f; /busybox ls /", *SHELL
    )
    assert str(reference) in host.ctr("images", "ls")
    checked = host.ctr("images", "check", "--snapshotter", NAME)
    assert "incomplete (1/3)" in checked
    assert checked.split()[-1] == "true"  # unpacked
    host.ctr("images", "usage", "--snapshotter", NAME, str(reference))
    host.ctr("images", "rm", "--sync", str(reference))
    assert containerd.snapshots(NAME).list() == []


def test_blobs_of_an_image_pulled_lazily_before(
    host: ObdlabHost,
    containerd: Containerd,
    registry: RegistryClient,
    registry_server: RegistryServer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    reference, manifest = push_image(registry, f"{registry_server.host}/lazy/blobs", overlaybd_layers())
    pull(containerd, registry, reference)
    assert "not found" in host.ctr("images", "export", str(tmp_path / "lazy.tar"), str(reference), check=False)
    where = ("--address", host.containerd.address, "--namespace", "test")
    assert main.main(["image", "pull", *where, "--download-blobs", str(reference)]) == 0
    printed = capsys.readouterr()
    assert "2 present; fetched 1.5" in printed.out
    assert "2 of 2 layers were pulled lazily before, and containers go on reading them" in printed.err
    assert all(containerd.content.exists(layer.digest) for layer in manifest.layers)
    host.ctr("images", "export", str(tmp_path / "whole.tar"), str(reference))
    assert (tmp_path / "whole.tar").stat().st_size > sum(layer.size for layer in manifest.layers)

    containerd.images.delete(str(reference), sync=True)
    result = pull(containerd, registry, reference, download=True)
    assert result.count(Outcome.UNPACKED) == 2
    assert pull(containerd, registry, reference, download=True).still_lazy == ()


def test_layers_go_on_being_read_where_they_were_pulled_first(
    host: ObdlabHost,
    containerd: Containerd,
    registry: RegistryClient,
    registry_server: RegistryServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, _ = push_image(registry, f"{registry_server.host}/lazy/first", overlaybd_layers())
    other = registry_server.host.replace("127.0.0.1", "localhost")
    pull(containerd, registry, first)
    where = ("--address", host.containerd.address, "--namespace", "test")
    assert main.main(["image", "pull", *where, f"{registry_server.host}/lazy/first"]) == 0
    assert capsys.readouterr().err == ""
    assert main.main(["image", "pull", *where, f"{other}/lazy/first"]) == 0
    assert f"2 of 2 layers were pulled before as part of {first}, and containers go on" in capsys.readouterr().err


def test_a_layer_with_another_tree_is_reported(
    host: ObdlabHost,
    containerd: Containerd,
    registry: RegistryClient,
    registry_server: RegistryServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The host checks the layer by the tree of the image that was pulled first, here by none."""
    bare, _ = push_image(registry, f"{registry_server.host}/lazy/bare", overlaybd_layers())
    tree = {HASH_TREE: f"sha256:{'1' * 64},sha256:{'2' * 64}"}
    bottom, top = overlaybd_layers()
    guarded = [replace(bottom, annotations=bottom.annotations | tree), top]
    second, _ = push_image(registry, f"{registry_server.host}/lazy/guarded", guarded)
    assert not any(each.other_tree for each in pull(containerd, registry, bare).layers)
    where = ("--address", host.containerd.address, "--namespace", "test")
    assert main.main(["image", "pull", *where, str(second)]) == 0
    assert "1 of 2 layers were pulled before with another hash tree than this image's" in capsys.readouterr().err
    assert [each.other_tree for each in pull(containerd, registry, second).layers] == [True, False]
    assert not any(each.other_tree for each in pull(containerd, registry, bare).layers)


def test_garbage_collection_takes_nothing(
    host: ObdlabHost, containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    keep, manifest = push_image(registry, f"{registry_server.host}/lazy/keep", overlaybd_layers())
    drop, _ = push_image(registry, f"{registry_server.host}/lazy/drop", overlaybd_layers()[:1])
    pull(containerd, registry, keep)
    pull(containerd, registry, drop)
    host.ctr("images", "rm", "--sync", str(drop))
    host.ctr("content", "prune", "references")
    assert len(containerd.snapshots(NAME).list()) == 2
    assert containerd.content.exists(manifest.config.digest)
    assert "alive" in run(host, keep, "kept", "/busybox echo alive", *SHELL)


def test_plain_image_in_the_same_snapshotter(
    host: ObdlabHost, containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    layers = [shell_layer(), layer({"a": b"one"}), layer({"a": b"two"})]
    reference, _ = push_image(registry, f"{registry_server.host}/lazy/plain", layers)
    result = pull(containerd, registry, reference)
    assert result.count(Outcome.UNPACKED) == 3
    assert "got two" in run(host, reference, "plain", "read x < /a; echo got $x")


def test_plain_layer_over_lazy_ones(
    host: ObdlabHost, containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    layers = [*overlaybd_layers(), layer({"top": b"plain"})]
    reference, _ = push_image(registry, f"{registry_server.host}/lazy/mixed", layers)
    result = pull(containerd, registry, reference)
    assert [item.outcome for item in result.layers] == [Outcome.LAZY, Outcome.LAZY, Outcome.UNPACKED]
    assert "plain" in run(host, reference, "mixed", "/busybox cat /top", *SHELL)


def test_another_namespace_shares_and_keeps(
    host: ObdlabHost, containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    reference, _ = push_image(registry, f"{registry_server.host}/lazy/shared", overlaybd_layers())
    pull(containerd, registry, reference)
    with Containerd(host.containerd.address, "other") as other:
        result = pull(other, registry, reference)
        assert result.layer_bytes == 0
        other.images.delete(str(reference), sync=True)
        assert other.snapshots(NAME).list() == []
    assert len(containerd.snapshots(NAME).list()) == 2
    assert "alive" in run(host, reference, "shared", "/busybox echo alive", *SHELL)


def test_overlaybd_image_in_overlayfs_is_refused(
    host: ObdlabHost, containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    reference, manifest = push_image(registry, f"{registry_server.host}/lazy/refused", overlaybd_layers())
    message = rf"{reference}: layer {manifest.layers[0].digest} is an overlaybd layer, .* 'overlayfs' does not mount"
    with pytest.raises(PullError, match=message):
        rpull(containerd, registry, reference, snapshotter="overlayfs", platform=host_platform())
    assert containerd.snapshots("overlayfs").list() == []
    assert containerd.content.list() == []
    assert containerd.images.list() == []


def test_one_image_in_two_snapshotters(
    host: ObdlabHost, containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    layers = [layer({"a": b"one"}), layer({"b": b"two"})]
    reference, manifest = push_image(registry, f"{registry_server.host}/lazy/overlayfs", layers)
    result = rpull(containerd, registry, reference, snapshotter="overlayfs", platform=host_platform())
    assert result.layer_bytes == sum(item.size for item in manifest.layers)
    pull(containerd, registry, reference)  # the same config now refers to snapshots in both
    assert len(containerd.snapshots(NAME).list()) == len(containerd.snapshots("overlayfs").list()) == 2
    containerd.images.delete(str(reference), sync=True)
    assert containerd.snapshots("overlayfs").list() == []
    with pytest.raises(NotFoundError):
        containerd.images.get(str(reference))


def test_missing_plain_layer_over_lazy_ones_leaves_nothing(
    containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    layers = [*overlaybd_layers(), layer({"lost": b"lost"})]
    reference, manifest = push_image(registry, f"{registry_server.host}/lazy/lost", layers)
    lose_blob(registry_server, reference, manifest.layers[2].digest)
    with pytest.raises(SourceError, match=manifest.layers[2].digest):
        pull(containerd, registry, reference)
    # The fixture sees that no snapshot is left, neither active nor committed, in containerd and on disk.


def test_snapshotter_that_is_gone(
    host: ObdlabHost, containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    reference, _ = push_image(registry, f"{registry_server.host}/lazy/gone", overlaybd_layers())
    host.snapshotter.stop()
    try:
        with pytest.raises(
            UnavailableError, match=rf"'{NAME}' does not answer: is `.*obdlab serve snapshotter` running .* \("
        ):
            pull(containerd, registry, reference)
    finally:
        host.start_snapshotter()
    deadline = time.monotonic() + 60
    while True:  # containerd dials again with pauses
        try:
            assert pull(containerd, registry, reference).count(Outcome.LAZY) == 2
        except UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        else:
            return
