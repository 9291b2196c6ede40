"""Image configurations made from manifests, the original's own among them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.errors import FormatError
from obdlab.formats import oci
from obdlab.image.from_manifest import NotOverlaybdError, config_from_manifest
from obdlab.registry.reference import Repository

GOLDEN = Path(__file__).parents[1] / "golden" / "image"
REPOSITORY = Repository("registry.test", "some/image")


def golden(name: str) -> oci.Manifest:
    return oci.Manifest.parse((GOLDEN / name).read_bytes())


def test_the_originals_manifest() -> None:
    manifest = golden("manifest.json")
    config = config_from_manifest(manifest, REPOSITORY)
    assert config.repo_blob_url == "https://registry.test/v2/some/image/blobs"
    assert [(lower.digest, lower.size) for lower in config.lowers] == [(x.digest, x.size) for x in manifest.layers]
    assert not config.acceleration_layer
    assert not config.upper.active


def test_an_acceleration_layer_on_top_is_marked() -> None:
    config = config_from_manifest(golden("manifest.with-trace.json"), REPOSITORY)
    assert config.acceleration_layer
    assert len(config.lowers) == 4


def with_annotations(**changes: str | None) -> oci.Manifest:
    manifest = golden("manifest.json")
    names = {"digest": oci.BLOB_DIGEST, "size": oci.BLOB_SIZE, "turbo": oci.TURBO_TARGET_DIGEST}
    annotations = dict(manifest.layers[1].annotations)
    for key, value in changes.items():
        annotations.pop(names[key], None)
        if value is not None:
            annotations[names[key]] = value
    changed = replace(manifest.layers[1], annotations=annotations)
    return replace(manifest, layers=(manifest.layers[0], changed, manifest.layers[2]))


def test_an_ordinary_layer_among_them_is_named() -> None:
    manifest = with_annotations(digest=None)
    with pytest.raises(
        NotOverlaybdError, match=rf"^name: .*{manifest.layers[1].digest}.*obdlab image convert name NEW"
    ):
        config_from_manifest(manifest, REPOSITORY, name="name")


def test_no_layers() -> None:
    with pytest.raises(NotOverlaybdError, match="no layers"):
        config_from_manifest(replace(golden("manifest.json"), layers=()), REPOSITORY)


def test_a_turbo_layer_is_refused() -> None:
    with pytest.raises(NotOverlaybdError, match="turboOCI"):
        config_from_manifest(with_annotations(turbo="sha256:" + "a" * 64), REPOSITORY)


@pytest.mark.parametrize("change", [{"digest": "sha256:" + "a" * 64}, {"size": "1"}, {"size": "-1"}, {"size": "x"}])
def test_annotations_that_contradict_the_descriptor(change: dict[str, str]) -> None:
    with pytest.raises(FormatError, match=r"sha256:13d19f.*contradict"):
        config_from_manifest(with_annotations(**change), REPOSITORY)


def test_a_hash_tree_is_in_the_configuration_or_refused_if_malformed() -> None:
    manifest = golden("manifest.json")

    def with_tree(text: str) -> oci.Manifest:
        layer = manifest.layers[0]
        return replace(
            manifest,
            layers=(replace(layer, annotations={**layer.annotations, oci.HASH_TREE: text}), *manifest.layers[1:]),
        )

    tree = "sha256:" + "a" * 64 + ",sha256:" + "b" * 64
    lowers = config_from_manifest(with_tree(tree), REPOSITORY).lowers
    assert [lower.hash_tree for lower in lowers] == [tree, "", ""]
    with pytest.raises(FormatError, match=r"name: hash tree of layer sha256:.*not a digest"):
        config_from_manifest(with_tree(tree[:-1]), REPOSITORY, name="name")


def test_a_layer_without_a_size_annotation_is_as_long_as_its_descriptor_says() -> None:
    assert config_from_manifest(with_annotations(size=None), REPOSITORY).lowers[1].size == 4230144
