"""An overlaybd image with one more layer on top: the data of a start as a hot layer, or a trace for replay."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.convert.base import copy_layer
from obdlab.convert.endpoints.disks import target_of
from obdlab.convert.progress import Silent
from obdlab.convert.storedtrees import hold_trees, trees_like, with_trees
from obdlab.errors import FormatError
from obdlab.formats import oci
from obdlab.formats.lsmt.index import MAX_LAYERS
from obdlab.registry.platform import host_platform

if TYPE_CHECKING:
    from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource
    from obdlab.convert.progress import Progress


@dataclass(frozen=True, slots=True)
class TopLayer:
    """A layer to add: its blob in a file, and its description."""

    path: Path
    digest: str
    size: int
    #: Text for the image's history.
    created_by: str
    #: Annotations beside those of every overlaybd layer.
    annotations: dict[str, str]


def add_layer(
    source: ImageSource,
    manifest: oci.Manifest,
    layer: TopLayer,
    destination: ImageDestination,
    work_dir: Path,
    progress: Progress | None = None,
) -> oci.Descriptor:
    """Store the image ``manifest`` of ``source`` with ``layer`` on top at ``destination``; return its descriptor.

    Blobs that the destination lacks are copied. Raises FormatError for an image that cannot get another layer; errors
    of reading and storing pass through. The manifest is stored last.
    """
    check_extendable(manifest, source.name)
    _check_targets(source, manifest, destination)
    if len(manifest.layers) >= MAX_LAYERS:
        raise FormatError("image cannot get another layer", blob=source.name, got=len(manifest.layers))
    with tempfile.TemporaryDirectory(prefix="obdlab-extend-", dir=work_dir) as directory:
        _copy_layers(source, manifest, destination, directory, progress or Silent())
    described = _described(layer, manifest)
    destination.put_file(described, layer.path, lambda _: None)
    config = _config(source.config(manifest), layer)
    config_descriptor = replace(manifest.config, digest=oci.digest_of(config), size=len(config))
    destination.put_bytes(config_descriptor, config)
    layers = with_trees((*manifest.layers, described), trees_like(destination, manifest))
    extended = replace(manifest, config=config_descriptor, layers=layers, subject=None, artifact_type="")
    data = extended.to_bytes()
    stored = oci.Descriptor(extended.media_type, oci.digest_of(data), len(data))
    destination.put_manifest(stored, data)
    hold_trees(destination, stored, extended)
    return stored


def check_extendable(manifest: oci.Manifest, name: str) -> None:
    """Raise FormatError unless the image is an overlaybd one whose top layer holds blocks of a file system."""
    if not manifest.is_overlaybd:
        raise FormatError("not an overlaybd image; convert it first", blob=name)
    if manifest.layers[-1].annotations.get(oci.ACCELERATION_LAYER) == "yes":
        raise FormatError("image has a trace already: give the one it was made from", blob=name)


def manifest_of(source: ImageSource, platform: oci.Platform | None) -> oci.Manifest:
    """Return an image's manifest for extending it, from an index that of the platform (None: this machine's)."""
    manifest = source.manifest(platform or host_platform(), overlaybd=True)
    check_extendable(manifest, source.name)
    return manifest


def _copy_layers(
    source: ImageSource, manifest: oci.Manifest, destination: ImageDestination, directory: str, progress: Progress
) -> None:
    for number, layer in enumerate(manifest.layers):
        copy_layer(source, layer, destination, Path(directory), f"layer {number}", progress)
        if layer.turbo_target is not None:
            target = target_of(source, layer.turbo_target)
            copy_layer(source, target, destination, Path(directory), f"target of layer {number}", progress)


def _check_targets(source: ImageSource, manifest: oci.Manifest, destination: ImageDestination) -> None:
    same = destination.place is not None and destination.place == source.place
    if any(layer.turbo_target for layer in manifest.layers) and not (same or destination.keeps_unnamed):
        raise FormatError(
            "a turboOCI image must stay in the repository that holds its files",
            blob=destination.name,
            got=source.name,
            wanted="a source in the same repository",
        )


def _described(layer: TopLayer, manifest: oci.Manifest) -> oci.Descriptor:
    annotations = {
        oci.OVERLAYBD_VERSION: oci.VERSION_NATIVE,
        oci.BLOB_DIGEST: layer.digest,
        oci.BLOB_SIZE: str(layer.size),
    }
    fs_type = manifest.layers[0].annotations.get(oci.BLOB_FS_TYPE)
    if fs_type:
        annotations[oci.BLOB_FS_TYPE] = fs_type
    docker = manifest.layers[0].media_type in (oci.DOCKER_LAYER, oci.DOCKER_LAYER_GZIP)
    media_type = oci.DOCKER_LAYER if docker else oci.OCI_LAYER
    return oci.Descriptor(media_type, layer.digest, layer.size, annotations=annotations | layer.annotations)


def _config(config: oci.Config, layer: TopLayer) -> bytes:
    # The original puts its entry first; readers do not depend on the order.
    document: dict[str, Any] = dict(config.with_diff_ids([*config.diff_ids, layer.digest]).document)
    if "history" in document:
        entry = {"created_by": layer.created_by}
        if "created" in document:
            entry = {"created": document["created"]} | entry
        document["history"] = [*document["history"], entry]
    return oci.to_json(document)
