"""Traces published with an image: hot layers, acceleration layers, artifacts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from obdlab.convert.endpoints.layout import VerifiedFile
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.endpoints.registryimages import RegistrySource
from obdlab.convert.publish.hot_and_traces import add_acceleration_layer, add_hot_layer, attach_trace, detach_traces
from obdlab.convert.publish.ordered import order_layers
from obdlab.errors import FormatError
from obdlab.formats import oci
from obdlab.formats.lsmt.layout import HEADER_SPACE
from obdlab.formats.trace import Trace, content_of_layer
from obdlab.image.config import ImageConfig
from obdlab.image.from_manifest import fetch_config
from obdlab.image.open import open_image
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from obdlab.traces.hotlayer import is_hot
from obdlab.traces.sets import coverage, unique
from tests.layers.golden import GOLDEN, sha256_of
from tests.registry.server import RegistryServer
from tests.traces.test_hotlayer import EXT4, EXT4_SHA256, READS, trace_of

pytestmark = pytest.mark.registry


@pytest.fixture
def client() -> RegistryClient:
    return RegistryClient()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path / "cache", read_deadline_s=10)


def push_image(server: RegistryServer, client: RegistryClient, name: str) -> Reference:
    """An overlaybd image of the golden layers, with the manifest and config of one that the original made."""
    reference = Reference.parse(f"{server.host}/{name}:plain")
    repository = client.repository(reference)
    layers = []
    for path in EXT4:
        data = path.read_bytes()
        digest = oci.digest_of(data)
        client.push_blob(repository, digest, len(data), lambda data=data: io.BytesIO(data))
        annotations = {oci.BLOB_DIGEST: digest, oci.BLOB_SIZE: str(len(data)), oci.BLOB_FS_TYPE: "ext4"}
        layers.append(oci.Descriptor(oci.OCI_LAYER, digest, len(data), annotations=annotations))
    document = json.loads((GOLDEN / "image" / "config.json").read_bytes())
    document["rootfs"]["diff_ids"] = [layer.digest for layer in layers]
    document["history"] = [{"created_by": "l1"}, {"created_by": "l2"}]
    config = oci.to_json(document)
    client.push_blob(repository, oci.digest_of(config), len(config), lambda: io.BytesIO(config))
    described = oci.Descriptor(oci.OCI_CONFIG, oci.digest_of(config), len(config))
    manifest = oci.Manifest(config=described, layers=tuple(layers), media_type=oci.OCI_MANIFEST, annotations={})
    client.put_manifest(reference, oci.OCI_MANIFEST, manifest.to_bytes())
    return reference


@pytest.mark.parametrize("elsewhere", ["same", "other", "layout"])
def test_a_hot_layer_on_top(
    registry_server: RegistryServer,
    client: RegistryClient,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    elsewhere: str,
) -> None:
    fetched = []
    fetch = RegistrySource.fetch

    def fetch_and_note(self: RegistrySource, layer: oci.Descriptor, *rest: Any) -> VerifiedFile:
        fetched.append(layer)
        return fetch(self, layer, *rest)

    monkeypatch.setattr(RegistrySource, "fetch", fetch_and_note)
    image = push_image(registry_server, client, f"traces/hot-{elsewhere}")
    name = {
        "same": f"{registry_server.host}/traces/hot-same:hot",
        "other": f"{registry_server.host}/traces/hot-{elsewhere}-new:hot",
        "layout": f"oci:{tmp_path}/layout:hot",
    }[elsewhere]
    source, target = open_source(str(image), client), open_destination(name, client)
    descriptor, size = add_hot_layer(source, target, trace_of(EXT4, READS), settings, client=client)
    # Another repository of the same registry shares the layers that are there.
    assert len(fetched) == (len(EXT4) if elsewhere == "layout" else 0)
    made = open_source(name, client)
    manifest = made.manifest(host_platform(), overlaybd=True)
    assert oci.digest_of(manifest.to_bytes()) == descriptor.digest
    assert [layer.size for layer in manifest.layers] == [*(path.stat().st_size for path in EXT4), size]
    config = made.config(manifest)
    assert config.diff_ids[-1] == manifest.layers[-1].digest
    assert [entry["created_by"] for entry in config.document["history"]] == ["l1", "l2", "obdlab: hot layer"]
    if elsewhere != "layout":
        with open_image(fetch_config(client, Reference.parse(name), host_platform()), settings) as disk:
            assert is_hot(disk.layers[-1])  # type: ignore[union-attr]
            assert sha256_of(disk) == EXT4_SHA256
    # The same trace gives the same bytes, also of what was copied.
    again, _ = add_hot_layer(source, target, trace_of(EXT4, READS), settings)
    assert again.digest == descriptor.digest


def test_an_acceleration_layer_is_the_originals(
    registry_server: RegistryServer, client: RegistryClient, settings: Settings
) -> None:
    image = push_image(registry_server, client, "traces/accelerated")
    name = f"{registry_server.host}/traces/accelerated:trace"
    trace = trace_of(EXT4, READS[:10])
    source = open_source(str(image), client)
    add_acceleration_layer(source, open_destination(name, client), trace, settings, client=client)
    reference = Reference.parse(name)
    manifest = oci.Manifest.parse(client.get_manifest(reference).data)
    top = manifest.layers[-1]
    assert set(top.annotations) == {
        oci.ACCELERATION_LAYER,
        oci.BLOB_DIGEST,
        oci.BLOB_SIZE,
        oci.BLOB_FS_TYPE,
        oci.OVERLAYBD_VERSION,
    }
    blob = client.read_blob(client.repository(reference), top.digest, top.size, 1 << 20)
    assert content_of_layer(blob) == trace
    with open_image(fetch_config(client, reference, host_platform()), settings) as disk:
        assert sha256_of(disk) == EXT4_SHA256
    with pytest.raises(FormatError, match="has a trace already"):
        add_acceleration_layer(open_source(name, client), open_destination(name + "2", client), trace, settings)


def test_layers_in_the_order_of_a_trace_are_the_same_disk(
    registry_server: RegistryServer, client: RegistryClient, settings: Settings, tmp_path: Path
) -> None:
    image = push_image(registry_server, client, "traces/ordered")
    name = f"{registry_server.host}/traces/ordered:new"
    trace = trace_of(EXT4, READS)
    source, target = open_source(str(image), client), open_destination(name, client)
    stored, new_trace = order_layers(source, target, trace, work_dir=tmp_path)
    assert order_layers(source, target, trace, work_dir=tmp_path) == (stored, new_trace)
    with open_image(fetch_config(client, Reference.parse(name), host_platform()), settings) as disk:
        assert sha256_of(disk) == EXT4_SHA256
        old, new = Trace.from_bytes(trace), Trace.from_bytes(new_trace)
        new.check_fits([layer.data.size for layer in disk.layers])  # type: ignore[union-attr]
        # As much of each layer, at its front but for the rest of blocks that a read only touched.
        for ranges in coverage(new).values():
            size = sum(end - begin for begin, end in ranges)
            assert ranges[0][0] < HEADER_SPACE + 4096
            assert ranges[-1][1] - HEADER_SPACE <= size + 2 * 4096 * len(READS)
        assert unique(new).size <= unique(old).size + 1024 * len(READS)


def test_an_artifact_is_found_by_the_image_it_refers_to(
    registry_server: RegistryServer, client: RegistryClient, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    image = push_image(registry_server, client, "traces/referred")
    before = client.get_manifest(image).digest
    assert not fetch_config(client, image, host_platform(), traces=True).trace.digest
    attach_trace(client, image, trace_of(EXT4, READS[:3]), settings, platform=None)
    trace = trace_of(EXT4, READS)
    attach_trace(client, image, trace, settings, platform=None)
    config = fetch_config(client, image, host_platform(), traces=True)
    assert client.get_manifest(image).digest == before
    assert (config.trace.digest, config.trace.size) == (oci.digest_of(trace), len(trace))
    assert ImageConfig.from_json(config.to_json()) == config
    with caplog.at_level("INFO"), open_image(config, settings) as disk:
        for offset, length in READS:
            disk.read_at(offset, length)
        assert sha256_of(disk) == EXT4_SHA256
        assert disk.statistics()["prefetch_bytes"] > 0
    assert "not replayed" not in caplog.text
    assert len(detach_traces(client, image, platform=None)) == 2
    assert fetch_config(client, image, host_platform(), traces=True).trace.digest == ""
    assert detach_traces(client, image, platform=None) == []


def test_beside_a_hot_layer_there_is_no_use_for_a_trace(
    registry_server: RegistryServer, client: RegistryClient, settings: Settings
) -> None:
    image = push_image(registry_server, client, "traces/twice")
    name = f"{registry_server.host}/traces/twice:hot"
    trace = trace_of(EXT4, READS)
    add_hot_layer(open_source(str(image), client), open_destination(name, client), trace, settings, client=client)
    with pytest.raises(FormatError, match="has a hot layer already"):
        attach_trace(client, Reference.parse(name), trace, settings, platform=None)
    again = open_destination(f"{name}2", client)
    with pytest.raises(FormatError, match="has a hot layer already"):
        add_hot_layer(open_source(name, client), again, trace, settings, client=client)


def test_what_is_no_trace_of_the_image_is_published_nowhere(
    registry_server: RegistryServer, client: RegistryClient, settings: Settings
) -> None:
    image = push_image(registry_server, client, "traces/refused")
    name = f"{registry_server.host}/traces/refused:new"
    source, target = open_source(str(image), client), open_destination(name, client)
    foreign = Trace.from_reads([(5, 0, 512)]).to_bytes()
    for bad in (foreign, trace_of(EXT4, READS)[:-5], b"\xff" * 70_000):
        with pytest.raises(FormatError):
            add_hot_layer(source, target, bad, settings, client=client)
        with pytest.raises(FormatError):
            add_acceleration_layer(source, target, bad, settings, client=client)
        with pytest.raises(FormatError):
            attach_trace(client, image, bad, settings, platform=None)
    with pytest.raises(Exception, match="404"):
        client.get_manifest(Reference.parse(name))
    assert client.referrers(client.repository(image), client.get_manifest(image).digest) == ()
