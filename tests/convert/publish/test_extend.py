"""An image with one layer more: what is copied, what the manifest says, and damage that is noticed."""

from __future__ import annotations

import json
import tarfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.convert.endpoints.layout import ImageLayout, digest_of_file
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.publish.extend import TopLayer, add_layer
from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats import oci
from obdlab.registry.client import RegistryClient
from tests.layers.golden import GOLDEN
from tests.traces.test_hotlayer import EXT4


def write_image(root: Path, *, docker: bool = False) -> oci.Manifest:
    """An overlaybd image of the golden layers, in a layout."""
    media_type = oci.DOCKER_LAYER if docker else oci.OCI_LAYER
    layers = []
    with closing(RegistryClient()) as client, closing(open_destination(f"oci:{root}:v1", client)) as place:
        for path in EXT4:
            data = path.read_bytes()
            annotations = {
                oci.BLOB_DIGEST: oci.digest_of(data),
                oci.BLOB_SIZE: str(len(data)),
                oci.BLOB_FS_TYPE: "ext4;noatime",
            }
            layers.append(oci.Descriptor(media_type, oci.digest_of(data), len(data), annotations=annotations))
            place.put_file(layers[-1], path, lambda _: None)
        document = json.loads((GOLDEN / "image" / "config.json").read_bytes())
        document["rootfs"]["diff_ids"] = [layer.digest for layer in layers]
        document["history"] = [{"created_by": "l1"}, {"created_by": "l2"}]
        config = oci.to_json(document)
        config_type = oci.DOCKER_CONFIG if docker else oci.OCI_CONFIG
        described = oci.Descriptor(config_type, oci.digest_of(config), len(config))
        place.put_bytes(described, config)
        manifest = oci.Manifest(
            config=described,
            layers=tuple(layers),
            media_type=oci.DOCKER_MANIFEST if docker else oci.OCI_MANIFEST,
            annotations={} if docker else {"kept": "yes"},
        )
        data = manifest.to_bytes()
        place.put_manifest(oci.Descriptor(manifest.media_type, oci.digest_of(data), len(data)), data)
    return manifest


def top_layer(directory: Path) -> TopLayer:
    path = directory / "top"
    path.write_bytes(b"the layer on top")
    return TopLayer(path, oci.digest_of(path.read_bytes()), path.stat().st_size, "made here", {"own": "1"})


def extend(
    source: Path, destination: Path, manifest: oci.Manifest, layer: TopLayer, transport: str = "oci"
) -> oci.Manifest:
    with closing(RegistryClient()) as client:
        with (
            closing(open_source(f"{transport}:{source}:v1", client)) as image,
            closing(open_destination(f"oci:{destination}:v1", client)) as place,
        ):
            stored = add_layer(image, manifest, layer, place, destination.parent)
        with closing(open_source(f"oci:{destination}:v1", client)) as made:
            root, found = made.root()
            assert root is not None
            assert (root.digest, root.media_type) == (stored.digest, stored.media_type)
            assert isinstance(found, oci.Manifest)
            config = made.config(found)
            assert config.diff_ids == tuple(each.digest for each in found.layers)
            assert [step["created_by"] for step in config.document["history"]] == ["l1", "l2", "made here"]
            for each in found.layers:
                file = made.fetch(each, destination.parent, lambda _: None)
                assert len(file.read(each.size)) == each.size  # and with the last byte comes the check
                made.release(file)
            return found


@pytest.mark.parametrize("docker", [False, True])
def test_the_layer_is_on_top_of_those_that_were_there(tmp_path: Path, docker: bool) -> None:
    manifest = write_image(tmp_path / "source", docker=docker)
    layer = top_layer(tmp_path)
    made = extend(tmp_path / "source", tmp_path / "out", replace(manifest, subject=manifest.config), layer)
    assert made.layers[:-1] == manifest.layers
    assert (made.layers[-1].digest, made.layers[-1].size) == (layer.digest, layer.size)
    assert made.layers[-1].annotations == {
        oci.OVERLAYBD_VERSION: oci.VERSION_NATIVE,
        oci.BLOB_DIGEST: layer.digest,
        oci.BLOB_SIZE: str(layer.size),
        oci.BLOB_FS_TYPE: "ext4;noatime",
        "own": "1",
    }
    assert {each.media_type for each in made.layers} == {manifest.layers[0].media_type}
    assert (made.media_type, made.config.media_type) == (manifest.media_type, manifest.config.media_type)
    assert made.annotations == manifest.annotations
    assert made.subject is None


def archived(root: Path) -> Path:
    path = root.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        tar.add(root, ".")
    return path


def test_layers_of_an_archive_are_copied_alone(tmp_path: Path) -> None:
    manifest = write_image(tmp_path / "source")
    source = archived(tmp_path / "source")
    made = extend(source, tmp_path / "out", manifest, top_layer(tmp_path), "oci-archive")
    paths = [ImageLayout(tmp_path / "out").blob_path(layer.digest) for layer in made.layers]
    assert [digest_of_file(path) for path in paths] == [layer.digest for layer in made.layers]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "source.tar", "top"]


def test_a_damaged_layer_of_an_archive_is_not_copied(tmp_path: Path) -> None:
    manifest = write_image(tmp_path / "source")
    layer = (tmp_path / "source/blobs/sha256" / manifest.layers[1].digest.removeprefix("sha256:")).read_bytes()
    source = archived(tmp_path / "source")
    data = source.read_bytes()
    source.write_bytes(data.replace(layer, layer[:-1] + bytes([layer[-1] ^ 1])))
    assert source.read_bytes() != data
    with pytest.raises(CorruptBlobError):
        extend(source, tmp_path / "out", manifest, top_layer(tmp_path), "oci-archive")
    assert not ImageLayout(tmp_path / "out").blob_path(manifest.layers[1].digest).exists()
    assert not list(tmp_path.glob("obdlab-extend-*"))


def test_a_damaged_layer_is_not_copied(tmp_path: Path) -> None:
    manifest = write_image(tmp_path / "source")
    blob = tmp_path / "source/blobs/sha256" / manifest.layers[1].digest.removeprefix("sha256:")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CorruptBlobError):
        extend(tmp_path / "source", tmp_path / "out", manifest, top_layer(tmp_path))
    assert not list(tmp_path.glob("obdlab-extend-*"))


def test_a_full_image_gets_no_other_layer(tmp_path: Path) -> None:
    manifest = write_image(tmp_path / "source")
    full = replace(manifest, layers=manifest.layers * 200)
    with pytest.raises(FormatError, match="cannot get another layer"):
        extend(tmp_path / "source", tmp_path / "out", full, top_layer(tmp_path))
