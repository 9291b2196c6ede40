"""Indexes: every platform converted, attestations left out, documents as registries and containerd want them."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from obdlab.cli.main import main
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions
from obdlab.convert.platforms import convert_platforms
from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats import oci
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from tests.convert.layouts import Layout, make_layout, member, tar_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from tests.registry.server import RegistryServer

PLATFORMS = ("amd64", "arm64", "riscv64")


def make_index(root: Path, *, nested: bool = True) -> Layout:
    layout = Layout(root)
    images = [layout.add_image([tar_bytes([member(name, b"x")])], architecture=name) for name in PLATFORMS]
    images[1]["platform"] = {"os": "linux", "architecture": "arm64", "variant": "v8", "os.version": "7"}
    attestation = {
        **images[0],
        "platform": {"os": "unknown", "architecture": "unknown"},
        "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
    }
    if not nested:
        layout.write_index(images)
        return layout
    index = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [*images, attestation]}
    layout.write_index([layout.add_json(index, oci.OCI_INDEX)])
    return layout


def convert_all(source: Path, destination: str, options: ConvertOptions) -> str:
    with closing(RegistryClient()) as client:
        places = open_source(f"oci:{source}", client), open_destination(destination, client)
        return convert_platforms(*places, options=options).digest


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("docker", [True, False])
def test_whole_index(tmp_path: Path, *, docker: bool, nested: bool) -> None:
    make_index(tmp_path / "source", nested=nested)
    options = ConvertOptions(docker=docker, work_dir=tmp_path)
    digest = convert_all(tmp_path / "source", f"oci:{tmp_path / 'out'}:v1", options)
    layout = ImageLayout(tmp_path / "out")
    (entry,) = layout.select("v1")
    assert (entry.digest, entry.media_type) == (digest, oci.DOCKER_INDEX if docker else oci.OCI_INDEX)
    index = oci.Index.parse(layout.read_blob(entry, 1 << 20))
    assert [e.platform.architecture for e in index.manifests if e.platform] == list(PLATFORMS)
    assert index.manifests[1].to_json()["platform"]["os.version"] == "7"
    for child, name in zip(index.manifests, PLATFORMS, strict=True):
        manifest = oci.Manifest.parse(layout.read_blob(child, 1 << 20))
        assert manifest.is_overlaybd
        assert manifest.media_type == child.media_type == (oci.DOCKER_MANIFEST if docker else oci.OCI_MANIFEST)
        assert manifest.config.media_type == (oci.DOCKER_CONFIG if docker else oci.OCI_CONFIG)
        assert {each.media_type for each in manifest.layers} == {oci.DOCKER_LAYER if docker else oci.OCI_LAYER}
        config = oci.Config.parse(layout.read_blob(manifest.config, 1 << 20))
        assert config.platform.architecture == name
    assert not list(tmp_path.glob("obdlab-*"))


def test_each_platform_compares_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_index(tmp_path / "source")
    places = [f"oci:{tmp_path / 'source'}", f"oci:{tmp_path / 'out'}"]
    dump = tmp_path / "manifest.json"
    options = ["--platform", "all", "--work-dir", str(tmp_path), "--dump-manifest", str(dump), "-q"]
    assert main(["image", "convert", *places, *options]) == 0
    assert oci.digest_of(dump.read_bytes()) == capsys.readouterr().out.strip()
    for name in PLATFORMS:
        assert main(["image", "compare", *places, "--platform", f"linux/{name}"]) == 0


def test_one_broken_image_leaves_no_index(tmp_path: Path) -> None:
    layout = make_index(tmp_path / "source")
    (root,) = ImageLayout(layout.root).select(None)
    child = oci.Index.parse(ImageLayout(layout.root).read_blob(root, 1 << 20)).manifests[1]
    manifest = oci.Manifest.parse(ImageLayout(layout.root).read_blob(child, 1 << 20))
    blob = layout.blob_path(manifest.layers[0].digest)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\1")
    with pytest.raises((CorruptBlobError, FormatError)):
        convert_all(layout.root, f"oci:{tmp_path / 'out'}", ConvertOptions(work_dir=tmp_path))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("obdlab-*"))


def test_no_index_gives_one_image(tmp_path: Path) -> None:
    make_layout(tmp_path / "source", [[member("a", b"1")]])
    convert_all(tmp_path / "source", f"oci:{tmp_path / 'out'}", ConvertOptions(work_dir=tmp_path))
    (entry,) = ImageLayout(tmp_path / "out").select(None)
    assert entry.media_type == oci.OCI_MANIFEST


@pytest.mark.registry
def test_referrers_are_found_by_their_subject(tmp_path: Path, registry_server: RegistryServer) -> None:
    layout = make_index(tmp_path / "source")
    (root,) = ImageLayout(layout.root).select(None)
    reference = Reference.parse(f"{registry_server.host}/convert/referrer:obd")
    options = ConvertOptions(referrer=True, work_dir=tmp_path)
    digest = convert_all(tmp_path / "source", str(reference), options)
    with closing(RegistryClient()) as client:
        (found,) = client.referrers(client.repository(reference), root.digest, oci.NATIVE_ARTIFACT)
        assert found.digest == digest
        index = oci.Index.parse(client.get_manifest(reference).data)
        child = oci.Manifest.parse(client.get_manifest(reference.with_digest(index.manifests[0].digest)).data)
    assert index.subject is not None
    assert (index.subject.digest, index.artifact_type) == (root.digest, oci.NATIVE_ARTIFACT)
    assert child.subject is not None
    assert child.artifact_type == oci.NATIVE_ARTIFACT


def test_docker_has_no_referrers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "convert", "--docker", "--referrer", "a", "b"]) == 2
    assert "--referrer needs" in capsys.readouterr().err
