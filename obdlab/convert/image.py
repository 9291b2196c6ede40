"""A whole image: every layer of an OCI image as an overlaybd layer, with config and manifest, at its destination."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.convert.apply import ApplyStatistics
from obdlab.convert.database import opened, options_digest
from obdlab.convert.layer import BuiltLayer, LayerOptions
from obdlab.convert.pipeline import ConvertedLayer, ConvertStoppedError, Group, Pipeline, groups_of
from obdlab.convert.progress import Progress, Silent
from obdlab.convert.reuse import Reuse, known_manifest, note_manifest
from obdlab.convert.storedtrees import StoredTrees, hold_trees, with_trees
from obdlab.convert.turbo.image import convert_to_turbo
from obdlab.convert.workdir import FinishedLayers, work_directory
from obdlab.errors import FormatError
from obdlab.formats import oci
from obdlab.formats.lsmt.index import MAX_LAYERS
from obdlab.registry.platform import host_platform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.convert.base import Base, Below
    from obdlab.convert.database import Database
    from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource
    from obdlab.convert.layer import TurboTarget

__all__ = ["ConvertOptions", "ConvertStoppedError", "ConvertedImage", "ConvertedLayer", "convert_image"]

# Not /tmp, which may be in memory.
_DEFAULT_WORK_DIR = Path("/var/tmp")


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Options of converting an image."""

    layer: LayerOptions = field(default_factory=LayerOptions)
    #: The platform to take from an index; None: this machine's.
    platform: oci.Platform | None = None
    #: Write Docker's media types instead of OCI's.
    docker: bool = False
    #: Name the source as the new manifest's subject, so that a registry lists the new one as referring to it.
    referrer: bool = False
    #: Most layers of the image: the lowest are kept as they are, all above are merged into one. 0: as many as the
    #: source has.
    flatten: int = 0
    #: Give layers hash trees, by which readers check them, if the destination is a registry; not with ``docker``.
    hash_trees: bool = True
    #: Mount options of the image's file system, comma separated.
    mount_options: str = ""
    #: File systems (of FILE_SYSTEMS) of a turboOCI image, whose layers point into those of the source; empty: an
    #: overlaybd image.
    turbo: tuple[str, ...] = ()
    #: Let layers of a turboOCI image have several gzip members; the original cannot read such an image.
    several_members: bool = False
    #: Let layers of a turboOCI image be zstd-compressed; the original cannot read such an image.
    zstd_layers: bool = False
    #: Database of earlier conversions, see :func:`obdlab.convert.database.open_database`; "" uses none.
    database: str = ""
    #: A base that is converted already; the image must be built on it.
    base: Base | None = None
    #: Directory for building layers; it holds all of them, uncompressed and compressed.
    work_dir: Path = _DEFAULT_WORK_DIR

    def digest(self) -> str:
        """Return 64 hex digits that identify all options that affect a manifest's bytes."""
        return options_digest(
            {
                "layer": self.layer.digest(),
                "docker": self.docker,
                "referrer": self.referrer,
                "flatten": self.flatten,
                "mount_options": self.mount_options,
                **({"turbo": self.turbo} if self.turbo else {}),
                **({"several_members": True} if self.turbo and self.several_members else {}),
                **({"zstd_layers": True} if self.turbo and self.zstd_layers else {}),
                **({"hash_trees": True} if self.hash_trees else {}),
            }
        )

    @property
    def artifact_type(self) -> str:
        """Type of the new manifest as one that refers to the source."""
        return oci.TURBO_ARTIFACT if self.turbo else oci.NATIVE_ARTIFACT


@dataclass(frozen=True, slots=True)
class ConvertedImage:
    """The finished image; ``digest`` is that of its manifest, ``document`` the manifest as stored."""

    name: str
    digest: str
    document: bytes
    manifest: oci.Manifest
    platform: oci.Platform
    layers: tuple[ConvertedLayer, ...]
    seconds: float

    @property
    def is_turbo(self) -> bool:
        """True for a turboOCI image."""
        return any(layer.turbo_target is not None for layer in self.manifest.layers)

    @property
    def size(self) -> int:
        """Bytes of all layer blobs."""
        return sum(layer.built.size for layer in self.layers)


def convert_image(
    source: ImageSource,
    destination: ImageDestination,
    *,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
) -> ConvertedImage:
    """Convert the image at ``source`` and store it at ``destination``.

    Layers are built one on another; meanwhile later layers are downloaded and finished ones uploaded. The manifest is
    stored last, so the destination never names an incomplete image. From an index, one platform is converted. Raises
    SourceError and CorruptBlobError for source and destination, FormatError for a malformed image (naming layer and
    offset), ApplyError. On errors all files on this machine are removed.
    """
    options = options or ConvertOptions()
    descriptor, manifest = source.find(options.platform or host_platform())
    return convert_manifest(source, descriptor, manifest, destination, options, progress or Silent())


def convert_manifest(
    source: ImageSource,
    descriptor: oci.Descriptor,
    manifest: oci.Manifest,
    destination: ImageDestination,
    options: ConvertOptions,
    progress: Progress,
    *,
    tagged: bool = True,
) -> ConvertedImage:
    """Convert one manifest of ``source``, given by ``descriptor``; otherwise as :func:`convert_image`.

    Without ``tagged`` it is stored by its digest only.
    """
    if options.docker and options.referrer:
        raise FormatError("docker's manifests cannot refer to another", blob=destination.name)
    makes_trees = destination.keeps_trees and not options.docker and not options.turbo
    options = replace(options, hash_trees=options.hash_trees and makes_trees)
    begin = time.monotonic()
    config = source.config(manifest)
    _check_platform(source.name, config.platform, options.platform)
    below = None if options.base is None else options.base.below(source.name, manifest, config)
    groups = _groups(manifest, config, options, below, source.name)
    count = len(groups) + (0 if below is None else len(below.layers))
    if not 1 <= count <= MAX_LAYERS:
        raise FormatError(
            "image has a number of layers that no device can stack",
            blob=source.name,
            got=count,
            wanted=f"1 to {MAX_LAYERS} (--flatten makes fewer)",
        )
    identity = options.digest() if below is None else options_digest({"on": below.digests, "by": options.digest()})
    with opened(options.database) as database:
        needed = [layer for group in groups for layer in group.layers] if options.turbo else []
        known = known_manifest(destination, database, descriptor.digest, identity, needed)
        if known is not None:
            of_base = _of_base(below, [False] * (count - len(groups)))
            layers = (*of_base, *map(ConvertedLayer.known, groups, known.layers[len(of_base) :]))
            converted = known
        else:
            layers = _convert_layers(source, destination, database, groups, options, progress, below)
            subject = _subject(descriptor) if options.referrer else None
            trees = StoredTrees(destination, database) if options.hash_trees else None
            lowest = () if below is None else with_trees(below.layers, trees)
            converted = _store_config(destination, manifest, config, layers, options, subject, lowest)
        data = converted.to_bytes()
        stored = oci.Descriptor(converted.media_type, oci.digest_of(data), len(data), platform=config.platform)
        destination.put_manifest(stored, data, tagged=tagged)
        hold_trees(destination, stored, converted)
        note_manifest(destination, database, descriptor.digest, identity, stored.digest)
    seconds = time.monotonic() - begin
    return ConvertedImage(destination.name, stored.digest, data, converted, config.platform, layers, seconds)


def _convert_layers(
    source: ImageSource,
    destination: ImageDestination,
    database: Database | None,
    groups: Sequence[Group],
    options: ConvertOptions,
    progress: Progress,
    below: Below | None,
) -> tuple[ConvertedLayer, ...]:
    describe = functools.partial(_layer_descriptor, options=options)
    if options.turbo:
        return convert_to_turbo(
            source,
            destination,
            groups,
            describe,
            options.layer,
            options.turbo,
            progress,
            options.work_dir,
            several_members=options.several_members,
            zstd=options.zstd_layers,
        )
    with work_directory(options.work_dir) as work_dir:
        stored = [] if below is None else below.store(destination, work_dir, progress)
        reuse = Reuse(destination, database, FinishedLayers(work_dir), options.layer)
        trees = StoredTrees(destination, database) if options.hash_trees else None
        pipeline = Pipeline(source, destination, reuse, options.layer, describe, progress, work_dir, below, trees)
        return (*_of_base(below, stored), *pipeline.run(groups))


def _of_base(below: Below | None, stored: Sequence[bool]) -> tuple[ConvertedLayer, ...]:
    if below is None:
        return ()
    return tuple(
        ConvertedLayer(
            part[-1].digest if part else layer.digest,
            len(part),
            sum(each.size for each in part),
            BuiltLayer(None, layer.digest, layer.size, 0, 0, ApplyStatistics()),
            copied,
            "base",
        )
        for layer, part, copied in zip(below.layers, below.parts(), stored, strict=True)
    )


def _groups(
    manifest: oci.Manifest, config: oci.Config, options: ConvertOptions, below: Below | None, name: str
) -> list[Group]:
    if below is None:
        return groups_of(manifest, config, options.flatten)
    if options.turbo or options.layer.filesystem != "ext4":
        got = "turboOCI" if options.turbo else options.layer.filesystem
        raise FormatError("layers on a base are overlaybd's, of ext4", blob=name, got=got)
    most = options.flatten - len(below.layers) if options.flatten else 0
    if options.flatten and most < 1:
        wanted = f"more than the base's {len(below.layers)}"
        raise FormatError("too few layers to flatten to", blob=name, got=options.flatten, wanted=wanted)
    return groups_of(manifest, config, most, first=len(below.replaced))


# The platform was selected from an index; a single manifest has its platform in the config only.
def _check_platform(name: str, got: oci.Platform, wanted: oci.Platform | None) -> None:
    if wanted is None or (got.os, got.architecture) == (wanted.os, wanted.architecture):
        return
    raise FormatError(
        "image is not for this platform",
        blob=name,
        got=f"{got.os or '?'}/{got.architecture or '?'}",
        wanted=f"{wanted.os}/{wanted.architecture}",
    )


def _subject(descriptor: oci.Descriptor) -> oci.Descriptor:
    return oci.Descriptor(descriptor.media_type, descriptor.digest, descriptor.size)


def _store_config(
    destination: ImageDestination,
    source: oci.Manifest,
    config: oci.Config,
    layers: Sequence[ConvertedLayer],
    options: ConvertOptions,
    subject: oci.Descriptor | None,
    lowest: Sequence[oci.Descriptor],
) -> oci.Manifest:
    merged = [layer.merged for layer in layers]
    config_bytes = _merge_history(config.with_diff_ids([layer.built.diff_id for layer in layers]), merged).to_bytes()
    config_type = oci.DOCKER_CONFIG if options.docker else oci.OCI_CONFIG
    config_descriptor = oci.Descriptor(config_type, oci.digest_of(config_bytes), len(config_bytes))
    manifest = oci.Manifest(
        config=config_descriptor,
        layers=(*lowest, *(_layer_descriptor(layer.built, options) for layer in layers[len(lowest) :])),
        media_type=oci.DOCKER_MANIFEST if options.docker else oci.OCI_MANIFEST,
        # Docker's media type has no annotations.
        annotations={} if options.docker else source.annotations,
        artifact_type="" if subject is None else options.artifact_type,
        subject=subject,
    )
    destination.put_bytes(config_descriptor, config_bytes)
    return manifest


def _layer_descriptor(layer: BuiltLayer, options: ConvertOptions) -> oci.Descriptor:
    if layer.turbo is not None:
        return _turbo_descriptor(layer, layer.turbo, options)
    return oci.Descriptor(
        media_type=oci.DOCKER_LAYER if options.docker else oci.OCI_LAYER,
        digest=layer.digest,
        size=layer.size,
        annotations={
            oci.OVERLAYBD_VERSION: oci.VERSION_NATIVE,
            oci.BLOB_DIGEST: layer.digest,
            oci.BLOB_SIZE: str(layer.size),
            oci.BLOB_FS_TYPE: ";".join(filter(None, (options.layer.filesystem, options.mount_options))),
        }
        | ({oci.HASH_TREE: layer.hash_tree} if layer.hash_tree else {}),
    )


def _turbo_descriptor(layer: BuiltLayer, target: TurboTarget, options: ConvertOptions) -> oci.Descriptor:
    # The names of the blob's files say which file systems it has, so that there is no annotation of it.
    return oci.Descriptor(
        media_type=oci.DOCKER_LAYER_GZIP if options.docker else oci.OCI_LAYER_GZIP,
        digest=layer.digest,
        size=layer.size,
        annotations={
            oci.OVERLAYBD_VERSION: oci.VERSION_TURBO,
            oci.BLOB_DIGEST: layer.digest,
            oci.BLOB_SIZE: str(layer.size),
            oci.TURBO_TARGET_DIGEST: target.digest,
            oci.TURBO_TARGET_MEDIA_TYPE: target.media_type,
            oci.TAR_SUMS: target.sums,
        },
    )


def _merge_history(config: oci.Config, merged: Sequence[int]) -> oci.Config:
    # Of the history steps of merged layers, only the last one counts as having made a layer.
    history = config.document.get("history")
    if all(count == 1 for count in merged) or not isinstance(history, list):
        return config
    added = [{"created_by": "base"} for count in merged if count == 0]
    merged = [count for count in merged if count]
    keeps = [last for count in merged for last in (*[False] * (count - 1), True)]
    steps = []
    for step in history:
        if isinstance(step, dict) and not step.get("empty_layer") and keeps and not keeps.pop(0):
            step = {**step, "empty_layer": True}
        steps.append(step)
    return replace(config, document={**config.document, "history": [*added, *steps]})
