"""turboOCI layers: their labels, the files that a client unpacks of their blobs, and the device's configuration.

A client downloads such a layer's small blob and unpacks it into the snapshot's directory, as it does with a plain
layer. The snapshot becomes a layer of an image's device when it is committed.
(overlaybd snapshotter, turboOCI.)
"""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.command import command
from obdlab.errors import FormatError
from obdlab.formats.oci import (
    BLOB_DIGEST,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_LAYER_ZSTD,
    FASTOCI_TARGET_DIGEST,
    FASTOCI_TARGET_MEDIA_TYPE,
    IN_CONTENT_STORE,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    TURBO_TARGET_DIGEST,
    TURBO_TARGET_MEDIA_TYPE,
    TURBO_TARGET_PLACE,
    is_digest,
)
from obdlab.formats.turbofiles import (
    INDEXES,
    MARKER,
    MAX_TARGET_FILE,
    SUMS_FILE,
    TARGET_FILE,
    NamedTarget,
    filesystem_of,
    meta_name,
)
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.snapshotter.errors import FailedPreconditionError, InvalidArgumentError
from obdlab.snapshotter.overlaybd import (
    LABEL_IMAGE_REF,
    ImageOptions,
    blobs_url,
    extended,
    fs_spec,
    pull_target,
    registry_reference,
    trace_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obdlab.registry.reference import Reference

_COMPRESSIONS = {
    OCI_LAYER: "",
    DOCKER_LAYER: "",
    OCI_LAYER_GZIP: "gzip",
    DOCKER_LAYER_GZIP: "gzip",
    OCI_LAYER_ZSTD: "zstd",
    DOCKER_LAYER_ZSTD: "zstd",
}
_MODPROBE_S = 10.0
_FILE_SYSTEMS = Path("/proc/filesystems")


@dataclass(frozen=True, slots=True)
class TurboLayer:
    """A turboOCI layer as its labels describe it. Its files are in the ordinary layer ``target``."""

    digest: str
    target: str
    #: "gzip" or "zstd" for a compressed target, "" for a plain tar.
    compression: str
    #: The image whose repository has the target; None if only containerd's content store has it.
    reference: Reference | None
    #: The label says that containerd's content store has the target; it is read there if the options allow that.
    stored: bool = False
    #: A blob beside the target: a trace of the image up to this layer.
    trace: LowerConfig = field(default_factory=LowerConfig)


def is_turbo(labels: Mapping[str, str]) -> bool:
    """Return True if a pull's labels name the target of a turboOCI layer."""
    return bool(pull_target(labels)) and bool(_target(labels))


def turbo_layer(labels: Mapping[str, str]) -> TurboLayer:
    """Return the layer that these labels of a pull describe.

    Raises InvalidArgumentError if a label is malformed, and FailedPreconditionError for a layer that cannot be
    served: its target is of an unknown type, or no label names the image, whose repository has the target.
    """
    digest, target = labels.get(BLOB_DIGEST, ""), _target(labels)
    for label, value in ((BLOB_DIGEST, digest), (TURBO_TARGET_DIGEST, target)):
        if not is_digest(value):
            raise InvalidArgumentError(f"label {label}: not a digest (got {value[:80]!r})")
    media_type = labels.get(TURBO_TARGET_MEDIA_TYPE) or labels.get(FASTOCI_TARGET_MEDIA_TYPE, "")
    if media_type not in _COMPRESSIONS:
        raise FailedPreconditionError(
            f"turboOCI layer {digest}: the target's media type is not one that can be read in parts "
            f"(got {media_type[:80]!r}, wanted a layer that is a tar, tar+gzip or tar+zstd)"
        )
    reference = registry_reference(labels)
    stored = labels.get(TURBO_TARGET_PLACE) == IN_CONTENT_STORE
    if reference is None and not stored:
        raise FailedPreconditionError(
            f"turboOCI layer {digest}: the client does not say which image it pulls, so that there is no registry to "
            f"read the image's files from (wanted the label {LABEL_IMAGE_REF}; {command('image', 'pull', 'IMAGE')}, "
            "ctr rpull and the kubelet set it, ctr images pull does not)"
        )
    trace = LowerConfig() if stored else trace_of(labels)
    return TurboLayer(digest, target, _COMPRESSIONS[media_type], reference, stored, trace)


def check_not_turbo(fs: Path, name: str) -> None:
    """Raise FailedPreconditionError if a client unpacked a turboOCI layer as if it were a plain one."""
    if os.path.lexists(fs / MARKER):
        raise FailedPreconditionError(
            f"layer {name!r} is a turboOCI layer, which the client unpacked without its labels: as a plain layer "
            "it would show metadata in place of the image's files "
            f"(wanted {command('image', 'pull', 'IMAGE')}, ctr rpull or the kubelet)"
        )


def turbo_config(
    below: ImageConfig | None,
    layer: TurboLayer,
    directory: Path,
    options: ImageOptions,
    labels_below: Mapping[str, str],
) -> ImageConfig:
    """Return the device configuration of an image up to the turboOCI layer unpacked in ``directory``'s ``fs``.

    ``below`` is the configuration of the image without this layer, ``labels_below`` are those of its topmost
    snapshot. Raises FailedPreconditionError if the blob lacks a file, has something else in its place, or names
    another target than the labels, and if a target should be in containerd's content store and is not.
    """
    fs = directory / "fs"
    name = _meta_name(below, fs, options, labels_below, layer)
    _check_file(fs, name, layer.digest)
    index = INDEXES.get(layer.compression, "")
    if index:
        _check_file(fs, index, layer.digest)
    for other in INDEXES.values():
        if other != index and os.path.lexists(fs / other):
            raise FailedPreconditionError(
                f"turboOCI layer {layer.digest}: label {TURBO_TARGET_MEDIA_TYPE} contradicts the blob (got the "
                f"type of a layer with compression {layer.compression or 'none'!r}, but the blob has {other})"
            )
    has_sums = os.path.lexists(fs / SUMS_FILE)
    if has_sums:
        _check_file(fs, SUMS_FILE, layer.digest)
    size = named_size(fs, layer, options)
    file = str(_stored_target(layer, size, options)) if _is_read_here(layer, options) else ""
    lower = LowerConfig(
        dir=str(fs),
        file=str(fs / name),
        target_file=file,
        target_digest="" if file else layer.target,
        target_size=size,
        gzip_index=str(fs / index) if index else "",
        tar_sums=str(fs / SUMS_FILE) if has_sums else "",
    )
    url = blobs_url(layer.reference, options) if layer.reference else below.repo_blob_url if below else ""
    return replace(extended(below, lower, directory, url), trace=layer.trace)


def _target(labels: Mapping[str, str]) -> str:
    return labels.get(TURBO_TARGET_DIGEST) or labels.get(FASTOCI_TARGET_DIGEST, "")


# All layers of a device change one file system: the nearest turboOCI layer below decides, or else, over ordinary
# overlaybd layers, their label. A bottom layer takes the first configured one that it has and the kernel can mount.
def _meta_name(
    below: ImageConfig | None, fs: Path, options: ImageOptions, labels_below: Mapping[str, str], layer: TurboLayer
) -> str:
    if below is not None:
        for lower in reversed(below.lowers):
            if lower.is_turbo:
                return meta_name(filesystem_of(Path(lower.file).name), layer.compression)
        return meta_name(fs_spec(labels_below, options).fs_type, layer.compression)
    for file_system in options.turbo_file_systems:
        name = meta_name(file_system, layer.compression)
        if os.path.lexists(fs / name) and (file_system != "erofs" or _has_erofs()):
            return name
    wanted = " or ".join(meta_name(each, layer.compression) for each in options.turbo_file_systems)
    raise FailedPreconditionError(
        f"turboOCI layer {layer.digest}: has no metadata that can be mounted here (got {sorted(os.listdir(fs))[:5]}, "
        f"wanted {wanted})"
    )


@cache
def _has_erofs() -> bool:
    if _knows_erofs():
        return True
    try:
        subprocess.run(["modprobe", "-q", "erofs"], capture_output=True, timeout=_MODPROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return _knows_erofs()


def _knows_erofs() -> bool:
    try:
        return "erofs" in _FILE_SYSTEMS.read_text().split()
    except OSError:
        return False


# containerd shares a committed layer by its chain ID, which the blob's content alone decides; the labels are those of
# the image that was pulled first. By its label that image could choose the files of all others with this layer.
def named_size(fs: Path, layer: TurboLayer, options: ImageOptions) -> int:
    """Return the size of the target, 0 if the unpacked blob does not name the target.

    Raises FailedPreconditionError if it names another one than the labels, or none and the options do not allow that.
    """
    if not os.path.lexists(fs / TARGET_FILE):
        if options.turbo_targets_by_label:
            return 0
        raise FailedPreconditionError(
            f"turboOCI layer {layer.digest}: its blob does not name the layer with its files (no {TARGET_FILE}: made "
            "by the original, or by an earlier version), so that only a label does, which any image with this blob "
            f"can set; convert the image again with {command('image', 'convert')} --as turbo-oci or --as overlaybd, "
            "or set turboTargetsByLabel in the snapshotter's configuration if all images here are trusted"
        )
    _check_file(fs, TARGET_FILE, layer.digest)
    with (fs / TARGET_FILE).open("rb") as file:
        data = file.read(MAX_TARGET_FILE)
    try:
        named = NamedTarget.parse(data, f"turboOCI layer {layer.digest}")
    except FormatError as error:
        raise FailedPreconditionError(str(error)) from error
    if named.digest != layer.target:
        raise FailedPreconditionError(
            f"turboOCI layer {layer.digest}: label {TURBO_TARGET_DIGEST} names another layer than the blob "
            f"(got {layer.target}, wanted {named.digest})"
        )
    return named.size


# The label alone decides nothing: an annotation of the image may have set it.
def _is_read_here(layer: TurboLayer, options: ImageOptions) -> bool:
    if layer.stored and options.content_store is None and layer.reference is None:
        raise FailedPreconditionError(
            f"turboOCI layer {layer.digest}: the layer with its files would be read from containerd's content store, "
            "which the snapshotter's configuration does not allow (set contentStore, usually to "
            "/var/lib/containerd/io.containerd.content.v1.content)"
        )
    return layer.stored and options.content_store is not None


# containerd checked the bytes when it stored them, and keeps them while an image's manifest names them.
def _stored_target(layer: TurboLayer, size: int, options: ImageOptions) -> Path:
    assert options.content_store is not None
    path = options.content_store.joinpath("blobs", *layer.target.split(":"))
    try:
        found = path.lstat()
    except OSError as error:
        raise FailedPreconditionError(
            f"turboOCI layer {layer.digest}: the layer with its files is not in containerd's content store "
            f"({path}: {error.strerror}; is contentStore in the configuration that of containerd's root?)"
        ) from error
    if not stat.S_ISREG(found.st_mode) or (size and found.st_size != size):
        raise FailedPreconditionError(
            f"turboOCI layer {layer.digest}: the layer with its files has another size in containerd's content store "
            f"(got {found.st_size} bytes at {path}, wanted {size})"
        )
    return path


# The blob is not trusted: a link could make the device read a file of the host.
def _check_file(fs: Path, name: str, digest: str) -> None:
    try:
        mode = os.lstat(fs / name).st_mode
    except OSError as error:
        raise FailedPreconditionError(
            f"turboOCI layer {digest}: has no {name} ({error.strerror}; all layers of an image need the metadata of "
            "one file system, and those with compressed targets an index)"
        ) from error
    if not stat.S_ISREG(mode):
        raise FailedPreconditionError(f"turboOCI layer {digest}: {name} is not a regular file")
