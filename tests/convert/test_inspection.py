"""What an image is said to be: its kind, its layers' compression, what of it is cached, and damage."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.cache.admin import CacheEntry
from obdlab.convert.endpoints.endpoint import ImageSource
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.inspection import ImageFacts, describe_image, verify_image
from obdlab.convert.progress import Silent
from obdlab.errors import CorruptBlobError
from obdlab.formats import oci
from obdlab.registry.client import RegistryClient
from tests.convert.layouts import make_layout, member
from tests.convert.publish.test_extend import write_image
from tests.layers.golden import GOLDEN

AMD64 = oci.Platform("linux", "amd64")


def describe(layout: Path, cached: dict[str, CacheEntry] | None = None, *, verify: bool = False) -> ImageFacts:
    with closing(RegistryClient()) as client, closing(open_source(f"oci:{layout}", client)) as source:
        facts = describe_image(source, AMD64, cached)
        return verify_image(source, facts, AMD64, Silent()) if verify else facts


def entry(digest: str, cached_bytes: int, *, verified: bool) -> CacheEntry:
    return CacheEntry("registry", digest, 1 << 20, cached_bytes, cached_bytes, 0.0, in_use=False, verified=verified)


def test_layers_of_overlaybd_are_told_by_their_bytes(tmp_path: Path) -> None:
    manifest = write_image(tmp_path / "image")
    facts = describe(tmp_path / "image")
    assert (facts.kind, facts.filesystem, facts.trace) == ("overlaybd", "ext4", "")
    assert [(each.compression, each.block_size) for each in facts.layers] == [("lz4", 4096)] * 2
    assert [each.digest for each in facts.layers] == [each.digest for each in manifest.layers]
    assert facts.size == sum(each.size for each in manifest.layers)
    assert facts.config == manifest.config.digest
    assert "not verified" in facts.verified
    verified = describe(tmp_path / "image", verify=True)
    assert verified == replace(facts, verified=verified.verified)
    assert verified.verified.startswith("verified")


@pytest.mark.parametrize(
    ("path", "compression", "block_size"),
    [("lsmt/l1.plain.lsmt", "none", 0), ("zfile/input.bin", "unknown", 0), ("lsmt/l2.lz4.lsmt", "lz4", 4096)],
)
def test_a_layer_that_is_not_compressed_and_one_that_is_none(
    tmp_path: Path, path: str, compression: str, block_size: int
) -> None:
    data = (GOLDEN / path).read_bytes()
    layer = oci.Descriptor(
        oci.OCI_LAYER,
        oci.digest_of(data),
        len(data),
        annotations={oci.BLOB_DIGEST: oci.digest_of(data), oci.BLOB_SIZE: str(len(data))},
    )
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [layer.digest]}}
    config = json.dumps(document).encode()
    described = oci.Descriptor(oci.OCI_CONFIG, oci.digest_of(config), len(config))
    manifest = oci.Manifest(config=described, layers=(layer,), media_type=oci.OCI_MANIFEST, annotations={})
    with closing(RegistryClient()) as client, closing(open_destination(f"oci:{tmp_path}/image:v1", client)) as place:
        place.put_file(layer, GOLDEN / path, lambda _: None)
        place.put_bytes(described, config)
        text = manifest.to_bytes()
        place.put_manifest(oci.Descriptor(oci.OCI_MANIFEST, oci.digest_of(text), len(text)), text)
    (facts,) = describe(tmp_path / "image").layers
    assert (facts.compression, facts.block_size) == (compression, block_size)


@pytest.mark.parametrize(("how", "compression"), [("gzip", "gzip"), ("zstd", "zstd"), ("plain", "none")])
def test_layers_of_ordinary_images_are_told_by_their_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, compression: str
) -> None:
    make_layout(tmp_path / "image", [[member("a", b"1")]], how=how)
    asked: list[str] = []
    monkeypatch.setattr(ImageSource, "trace", lambda _, digest: asked.append(digest))
    facts = describe(tmp_path / "image", {})
    assert (facts.kind, facts.filesystem, facts.cached_size) == ("plain", "", None)
    (layer,) = facts.layers
    assert (layer.kind, layer.compression, layer.block_size) == ("plain", compression, 0)
    assert (layer.cached_size, layer.cached_verified) == (None, False)
    assert facts.verified == "not verified: a layer is checked against its digest when it is fetched"
    assert asked == []  # traces refer to overlaybd images only
    write_image(tmp_path / "other")
    assert asked == [describe(tmp_path / "other").digest]


def test_what_is_cached_is_counted(tmp_path: Path) -> None:
    bottom, top = write_image(tmp_path / "image").layers
    for cached, sizes, total, text in (
        (None, [None, None], None, "no digest does"),
        ({}, [0, 0], 0, "no digest does"),
        ({top.digest: entry(top.digest, 5000, verified=False)}, [0, 5000], 5000, "no digest does"),
        ({bottom.digest: entry(bottom.digest, 7, verified=True)}, [7, 0], 7, "1 of 2 are here whole"),
    ):
        facts = describe(tmp_path / "image", cached)
        assert [layer.cached_size for layer in facts.layers] == sizes
        assert facts.cached_size == total
        assert facts.verified.endswith(text) or text in facts.verified
        assert ("here whole" in facts.verified) == ("here whole" in text)
        wanted = [
            bool(cached and layer.digest in cached and cached[layer.digest].verified) for layer in (bottom, top)
        ]
        assert [layer.cached_verified for layer in facts.layers] == wanted


def test_damage_at_the_end_of_a_layer_is_found(tmp_path: Path) -> None:
    manifest = write_image(tmp_path / "image")
    blob = tmp_path / "image/blobs/sha256" / manifest.layers[1].digest.removeprefix("sha256:")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    describe(tmp_path / "image")
    with pytest.raises(CorruptBlobError):
        describe(tmp_path / "image", verify=True)
