"""The new image at its destination: layers, configuration and manifest."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.convert.base import copy_layer
from obdlab.convert.storedtrees import StoredTrees, hold_trees, is_stored, tree_files
from obdlab.errors import ObdlabError
from obdlab.formats import oci

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from obdlab.build.bases import BaseImage
    from obdlab.build.imagesettings import ImageSettings
    from obdlab.build.layerstore import LayerBlob
    from obdlab.convert.endpoints.endpoint import ImageDestination
    from obdlab.convert.progress import Progress

_BASE_DIGEST = "org.opencontainers.image.base.digest"
_BASE_NAME = "org.opencontainers.image.base.name"


@dataclass(frozen=True, slots=True)
class NewImage:
    """An image that is ready to be stored."""

    base: BaseImage | None
    layers: Sequence[LayerBlob]
    settings: ImageSettings
    history: Sequence[Mapping[str, Any]]
    created: str
    platform: oci.Platform


def publish(
    image: NewImage, destination: ImageDestination, work: Path, *, hash_trees: bool, progress: Progress
) -> oci.Descriptor:
    """Store an image whose new layers are at the destination; return its manifest's descriptor.

    Layers of the base that the destination lacks are mounted from the base's repository, if it is on the same host,
    and else copied. The manifest is stored last. Raises SourceError.
    """
    base = image.base
    docker = base is not None and base.manifest.media_type == oci.DOCKER_MANIFEST
    trees = StoredTrees(destination, None) if hash_trees and destination.keeps_trees and not docker else None
    with tempfile.TemporaryDirectory(prefix="base-", dir=work) as directory:
        lowest = tuple(_stored_base(base, destination, Path(directory), progress, with_trees=trees is not None))
    layers = (*lowest, *(_described(layer, lowest, trees, docker=docker) for layer in image.layers))
    config = _config(image)
    config_type = oci.DOCKER_CONFIG if docker else oci.OCI_CONFIG
    config_descriptor = oci.Descriptor(config_type, oci.digest_of(config), len(config))
    destination.put_bytes(config_descriptor, config)
    of_base = {} if base is None or docker else {_BASE_DIGEST: base.digest, _BASE_NAME: base.source.name}
    manifest = oci.Manifest(
        config=config_descriptor,
        layers=layers,
        media_type=oci.DOCKER_MANIFEST if docker else oci.OCI_MANIFEST,
        annotations=of_base,
    )
    data = manifest.to_bytes()
    stored = oci.Descriptor(manifest.media_type, oci.digest_of(data), len(data))
    destination.put_manifest(stored, data)
    hold_trees(destination, stored, manifest)
    return stored


# A layer whose tree cannot be had without reading the layer goes without.
def _stored_base(
    base: BaseImage | None, destination: ImageDestination, directory: Path, progress: Progress, *, with_trees: bool
) -> Iterator[oci.Descriptor]:
    if base is None:
        return
    for number, layer in enumerate(base.manifest.layers):
        copy_layer(base.source, layer, destination, directory, f"base layer {number}", progress)
        keeps = with_trees and _has_tree(base, layer, destination, directory, progress)
        yield layer if keeps else _without_tree(layer)


def _has_tree(
    base: BaseImage, layer: oci.Descriptor, destination: ImageDestination, directory: Path, progress: Progress
) -> bool:
    if oci.HASH_TREE not in layer.annotations:
        return False
    try:
        for file in tree_files(replace(base.manifest, layers=(layer,))):
            copy_layer(base.source, file, destination, directory, "hash tree", progress)
    except ObdlabError:  # a copy of an image may lack it
        return False
    return is_stored(destination, layer)


def _without_tree(layer: oci.Descriptor) -> oci.Descriptor:
    annotations = {key: value for key, value in layer.annotations.items() if key != oci.HASH_TREE}
    return replace(layer, annotations=annotations)


def _described(
    layer: LayerBlob, lowest: Sequence[oci.Descriptor], trees: StoredTrees | None, *, docker: bool
) -> oci.Descriptor:
    file_system = lowest[0].annotations.get(oci.BLOB_FS_TYPE, "ext4") if lowest else "ext4"
    annotations = {
        oci.OVERLAYBD_VERSION: oci.VERSION_NATIVE,
        oci.BLOB_DIGEST: layer.digest,
        oci.BLOB_SIZE: str(layer.size),
        oci.BLOB_FS_TYPE: file_system,
    }
    described = oci.Descriptor(
        oci.DOCKER_LAYER if docker else oci.OCI_LAYER, layer.digest, layer.size, annotations=annotations
    )
    if trees is None:
        return described
    return replace(described, annotations=annotations | {oci.HASH_TREE: trees.of_file(described, layer.path)})


def _config(image: NewImage) -> bytes:
    base = image.base
    document: dict[str, Any] = {} if base is None else dict(base.config.document)
    for key in ("container", "container_config", "docker_version", "parent", "id"):  # of the base's own build
        document.pop(key, None)
    if base is None:
        document |= {"architecture": image.platform.architecture, "os": image.platform.os}
        if image.platform.variant:
            document["variant"] = image.platform.variant
    document["created"] = image.created
    if image.settings.author:
        document["author"] = image.settings.author
    document["config"] = image.settings.document
    known = () if base is None else base.config.diff_ids
    before = document.get("history")
    if not isinstance(before, list):
        before = [{"created_by": "base"}] * len(known)
    document["rootfs"] = {"type": "layers", "diff_ids": [*known, *(layer.digest for layer in image.layers)]}
    document["history"] = [*before, *image.history]
    return oci.to_json(document)
