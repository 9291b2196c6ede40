"""The meaning of snapshot labels for overlaybd layers, and the device configuration made from them.

(overlaybd snapshotter, labels and building of config.v1.json; OCI image conventions of overlaybd.)
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import FormatError
from obdlab.formats.decimal import decimal
from obdlab.formats.hashtree import TreeReference
from obdlab.formats.oci import (
    ACCELERATION_LAYER,
    BLOB_DIGEST,
    BLOB_FS_TYPE,
    BLOB_SIZE,
    FASTOCI_TARGET_DIGEST,
    HASH_TREE,
    HOT_LAYER,
    TRACE_LABEL,
    TURBO_TARGET_DIGEST,
    chain_id_over,
    is_digest,
)
from obdlab.formats.tar import WRAP_SIZE, parse_wrap
from obdlab.image.config import COMMIT_FILE, ImageConfig, LowerConfig, UpperConfig
from obdlab.registry.reference import Reference, canonical_host, is_loopback, is_metadata
from obdlab.snapshotter.errors import InvalidArgumentError
from obdlab.snapshotter.fallback import LABEL_FALLBACK
from obdlab.snapshotter.fslabel import spec_of_label
from obdlab.snapshotter.writable import LABEL_COMMIT_PATH, FsSpec, Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

LABEL_TARGET = "containerd.io/snapshot.ref"
LABEL_IMAGE_REF = "containerd.io/snapshot/image-ref"
LABEL_CRI_IMAGE_REF = "containerd.io/snapshot/cri.image-ref"
#: BuildKit names the image by this label alone, for a snapshotter called "stargz".
LABEL_STARGZ_REF = "containerd.io/snapshot/remote/stargz.reference"
LABEL_REMOTE = "containerd.io/snapshot/remote"
REMOTE_SNAPSHOT = "remote snapshot"
_REFERENCES = (LABEL_CRI_IMAGE_REF, LABEL_IMAGE_REF, LABEL_STARGZ_REF)
LABEL_DOWNLOAD = "containerd.io/snapshot/overlaybd/download-remote-blob"

#: Only this service sets them: repairs make configurations from them, builders run programs on the path.
_OWN_LABELS = frozenset({LABEL_REMOTE, LABEL_COMMIT_PATH, LABEL_FALLBACK})

# The original's converter names the layers it remembers in a database like this. containerd computes the names of
# pulled layers, "sha256:<hex>", so no image can ask for such a name.
_CONVERTER_PREFIX = "overlaybd-conv-"
# The key that clients use to unpack a layer; containerd puts a namespace and a number before it.
_UNPACKING = re.compile(r"([^/]+/[0-9]+/)?extract-", re.ASCII)
_MAX_BLOB_SIZE = 1 << 62
_MAGIC_SIZE = 24
#: Bytes of a file that :func:`is_layer` looks at.
LAYER_HEAD = WRAP_SIZE + _MAGIC_SIZE


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How images are reached and mounted, by default or for want of a label."""

    #: Registries to use over plain HTTP besides loopback ones.
    plain_http_hosts: frozenset[str] = frozenset()
    #: ``type[;mount options[;mkfs options]]``
    default_fs: str = "ext4"
    #: Default kind of a container's writable part.
    mode: Mode = Mode.OVERLAYFS
    #: Writable layers are single sparse files instead of a log and its index.
    sparse: bool = False
    #: The device is detached with its last container.
    auto_remove_devices: bool = False
    #: Files of removed snapshots stay until Cleanup.
    async_remove: bool = False
    #: Limit of a container's overlay, 0 for no limit.
    quota_bytes: int = 0
    #: Directories in which labels may place writable layers.
    active_roots: tuple[Path, ...] = ()
    #: Directories in which labels may name traces. The default is the working directory of the original's tool.
    trace_roots: tuple[Path, ...] = (Path("/tmp/ctr-record-trace"),)
    #: File systems that an image's bottom turboOCI layer may have, the preferred one first.
    turbo_file_systems: tuple[str, ...] = ("erofs", "ext4")
    #: The directory with containerd's content, if targets of turboOCI layers may be read from it. containerd passes
    #: annotations of images as labels, so any image may then name a layer that another image brought to this host.
    content_store: Path | None = None
    #: turboOCI layers whose blob does not name its target are committed with the target that a label names.
    turbo_targets_by_label: bool = False
    #: Seconds of an image's first start on this host that are recorded, and published with the image; 0: none are.
    record_starts_s: int = 0


@dataclass(frozen=True, slots=True)
class RemoteLayer:
    """An overlaybd layer that stays in its registry. ``size`` in bytes.

    An ``acceleration`` layer has no blocks: it lists reads to fetch ahead, and an image works without it.
    """

    digest: str
    size: int
    reference: Reference
    acceleration: bool = False
    #: A blob beside the layer: a trace of the image up to this layer.
    trace: LowerConfig = field(default_factory=LowerConfig)
    hot: bool = False
    #: The root of the layer's hash tree, and the digest of the tree's file.
    hash_tree: str = ""


def of_client(labels: Mapping[str, str]) -> dict[str, str]:
    """Return a client's labels without the ones that only this service may set."""
    return {label: value for label, value in labels.items() if label not in _OWN_LABELS}


def pull_target(labels: Mapping[str, str]) -> str:
    """Return the name under which a pull wants the layer committed, or '' if this is no pull."""
    return labels.get(LABEL_TARGET, "")


def is_unpacked(key: str, labels: Mapping[str, str]) -> bool:
    """Return True if a new snapshot is for a layer that is being pulled, not for a container."""
    return bool(pull_target(labels)) or _UNPACKING.match(key) is not None


def is_proven(layer: RemoteLayer, labels: Mapping[str, str], below: Mapping[str, str] | None) -> bool:
    """Return True if a pulled layer's digest alone proves the name that the layer is to be committed under.

    containerd finds layers by chain ID, across images. Under the chain ID of another image's layer, a hostile image
    would put its own files into that image's containers. A blob that is an uncompressed tar is its own diff ID, so
    its digest and the chain ID below give the chain ID. ``below`` holds the labels of the parent, None for a bottom
    layer.

    A layer of another form (compressed) proves nothing here: its diff ID is the digest of bytes that are not at hand.
    """
    target = pull_target(labels)
    if target.startswith(_CONVERTER_PREFIX):
        return True
    parent = "" if below is None else pull_target(below)
    if below is not None and not is_digest(parent):
        return False
    return target == chain_id_over(parent, layer.digest)


def wants_download(labels: Mapping[str, str]) -> bool:
    """Return True if the client of a pull wants to download the layer's blob itself."""
    return labels.get(LABEL_DOWNLOAD) == "download"


def image_reference(labels: Mapping[str, str]) -> str:
    """Return the reference of a snapshot's image, from the kubelet's label or else a client's, or ''."""
    return next((labels[label] for label in _REFERENCES if labels.get(label)), "")


def remote_layer(labels: Mapping[str, str], options: ImageOptions) -> RemoteLayer | None:
    """Return the overlaybd layer that the labels of a pull describe, or None for a layer that must be downloaded.

    None is for plain layers, for layers whose labels name no image and hence no registry, and for turboOCI layers.
    Raises InvalidArgumentError if the labels contradict each other.
    """
    digest, size = labels.get(BLOB_DIGEST), labels.get(BLOB_SIZE)
    if (digest is None and size is None) or TURBO_TARGET_DIGEST in labels or FASTOCI_TARGET_DIGEST in labels:
        return None
    if not is_digest(digest):
        raise InvalidArgumentError(f"label {BLOB_DIGEST}: not a digest (got {digest!r})")
    reference = registry_reference(labels)
    if reference is None:
        return None
    if labels.get(BLOB_FS_TYPE):  # refuse now an image that no container could start from
        spec_of_label(labels[BLOB_FS_TYPE], options.default_fs)
    acceleration = labels.get(ACCELERATION_LAYER) == "yes"
    trace, hot = trace_of(labels), labels.get(HOT_LAYER) == "yes"
    tree = _hash_tree(labels.get(HASH_TREE, ""))
    return RemoteLayer(str(digest), _blob_size(size), reference, acceleration, trace, hot, tree)


def _hash_tree(label: str) -> str:
    # A malformed one is not ignored: the layer would be read unchecked.
    if not label:
        return ""
    try:
        return str(TreeReference.parse(label))
    except FormatError as error:
        raise InvalidArgumentError(f"label {HASH_TREE}: {error}") from error


def trace_of(labels: Mapping[str, str]) -> LowerConfig:
    """Return the blob of the trace that a client's label names; an empty one for a missing or malformed label."""
    digest, _, text = labels.get(TRACE_LABEL, "").partition(",")
    size = decimal(text, _MAX_BLOB_SIZE)
    return LowerConfig(digest=digest, size=size) if is_digest(digest) and size is not None else LowerConfig()


def fs_spec(labels: Mapping[str, str], options: ImageOptions, image: Mapping[str, str] | None = None) -> FsSpec:
    """Return the file system of a snapshot's device, from its labels or those of the ``image`` below it."""
    text = labels.get(BLOB_FS_TYPE) or (image or {}).get(BLOB_FS_TYPE)
    return spec_of_label(text, options.default_fs) if text else FsSpec.parse(options.default_fs)


def remote_config(
    below: ImageConfig | None, layer: RemoteLayer, directory: Path, options: ImageOptions
) -> ImageConfig:
    """Return the device configuration of an image up to a layer that stays in its registry.

    ``below`` is the configuration of the image without this layer, None for a bottom layer; ``directory`` is the
    future directory of the layer's snapshot.
    """
    lower = LowerConfig(
        digest=layer.digest, size=layer.size, dir=str(directory / "fs"), hot=layer.hot, hash_tree=layer.hash_tree
    )
    config = extended(below, lower, directory, blobs_url(layer.reference, options))
    return replace(config, acceleration_layer=layer.acceleration, trace=layer.trace)


def writable_config(below: ImageConfig | None, upper: UpperConfig, directory: Path) -> ImageConfig:
    """Return the device configuration of a container that writes to ``upper``; ``directory`` is its snapshot's."""
    result_file = str(directory / "block" / "init-debug.log")
    return replace(below or ImageConfig(), upper=upper, result_file=result_file)


def local_config(below: ImageConfig | None, directory: Path) -> ImageConfig:
    """Return the device configuration of an image up to a layer whose blob lies in ``directory``'s ``fs``."""
    lower = LowerConfig(dir=str(directory / "fs"))
    return extended(below, lower, directory, below.repo_blob_url if below else "")


def extended(below: ImageConfig | None, lower: LowerConfig, directory: Path, repo_blob_url: str) -> ImageConfig:
    """Return the configuration of the image ``below`` with one more lower, for the snapshot in ``directory``."""
    return ImageConfig(
        repo_blob_url=repo_blob_url,
        lowers=(*(below.lowers if below else ()), lower),
        result_file=str(directory / "block" / "init-debug.log"),
    )


def is_downloaded_layer(fs: Path) -> bool:
    """Return True if a client unpacked an overlaybd layer here: the directory holds only the layer's blob."""
    with os.scandir(fs) as entries:
        if [entry.name for entry in islice(entries, 2)] != [COMMIT_FILE]:
            return False
    try:
        # The layer is not trusted: open() must not follow a link or wait for a pipe.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(fs / COMMIT_FILE, flags)
    except OSError:
        return False
    with open(descriptor, "rb") as file:
        return stat.S_ISREG(os.fstat(descriptor).st_mode) and is_layer(file.read(LAYER_HEAD))


def is_layer(head: bytes) -> bool:
    """Return True if a file with these first ``LAYER_HEAD`` bytes is an overlaybd layer, bare or in a tar."""
    # Imported late: they bring numpy, 14 MiB that a service for plain images does not need.
    from obdlab.formats.lsmt.layout import MAGIC as LSMT
    from obdlab.formats.zfile.layout import MAGIC as ZFILE

    try:
        window = parse_wrap(head[:WRAP_SIZE])
    except FormatError:
        return False
    at = 0 if window is None else window.offset
    return head[at : at + _MAGIC_SIZE] in (LSMT, ZFILE)


def blobs_url(reference: Reference, options: ImageOptions) -> str:
    """Return the URL of an image repository's blobs, with plain HTTP for loopback and configured hosts."""
    repository = reference.repo
    plain = is_loopback(reference.host) or reference.host in map(canonical_host, options.plain_http_hosts)
    return type(repository)(repository.host, repository.name, plain_http=plain).blobs_url


def _blob_size(text: str | None) -> int:
    size = decimal(text or "", _MAX_BLOB_SIZE)
    if not size:
        raise InvalidArgumentError(f"label {BLOB_SIZE}: not a size in bytes (got {(text or '')[:80]!r})")
    return size


def registry_reference(labels: Mapping[str, str]) -> Reference | None:
    """Return the reference of the image whose repository has a layer's blobs; None if no label names an image.

    Raises InvalidArgumentError for a reference that is malformed or must not be used.
    """
    # containerd lets a layer's annotations pass for labels of the client. Of the two labels, only CRI's overrides an
    # annotation. Credentials and requests go to the host that is named here.
    named = {}
    for label in _REFERENCES:
        text = labels.get(label)
        if text:
            named[label] = _parsed_reference(label, text)
    first = next(iter(named), "")
    for label, reference in named.items():
        if reference.repo != named[first].repo:
            raise InvalidArgumentError(
                f"label {label}: another repository than that of {first} "
                f"(got {reference.repo}, wanted {named[first].repo})"
            )
    return named.get(first)


def _parsed_reference(label: str, text: str) -> Reference:
    try:
        reference = Reference.parse(text)
    except FormatError as error:
        raise InvalidArgumentError(f"label {label}: {error}") from error
    if is_metadata(reference.host):
        raise InvalidArgumentError(
            f"label {label}: no registry is at a link-local address (got {reference.host!r}): services that hand out "
            "a machine's credentials answer there"
        )
    return reference
