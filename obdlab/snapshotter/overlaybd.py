"""What snapshot labels say of overlaybd layers, and the device configuration made from it.

(overlaybd snapshotter, labels and building of config.v1.json; OCI image conventions of overlaybd.)
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import FormatError
from obdlab.formats.decimal import decimal
from obdlab.formats.oci import (
    ACCELERATION_LAYER,
    BLOB_DIGEST,
    BLOB_FS_TYPE,
    BLOB_SIZE,
    FASTOCI_TARGET_DIGEST,
    HOT_LAYER,
    TRACE_LABEL,
    TURBO_TARGET_DIGEST,
    chain_id_over,
    is_digest,
)
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.registry.reference import Reference, canonical_host, is_loopback, is_metadata
from obdlab.snapshotter.errors import FailedPreconditionError, InvalidArgumentError
from obdlab.snapshotter.fallback import LABEL_FALLBACK
from obdlab.snapshotter.fslabel import spec_of_label
from obdlab.snapshotter.writable import LABEL_COMMIT_PATH, FsSpec, Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

LABEL_TARGET = "containerd.io/snapshot.ref"
LABEL_IMAGE_REF = "containerd.io/snapshot/image-ref"
LABEL_CRI_IMAGE_REF = "containerd.io/snapshot/cri.image-ref"
LABEL_REMOTE = "containerd.io/snapshot/remote"
REMOTE_SNAPSHOT = "remote snapshot"
LABEL_DOWNLOAD = "containerd.io/snapshot/overlaybd/download-remote-blob"

#: Others rely on them: repairs make configurations from them, builders run programs on the path.
_OWN_LABELS = frozenset({LABEL_REMOTE, LABEL_COMMIT_PATH, LABEL_FALLBACK})

COMMIT_FILE = "overlaybd.commit"

# The original's converter names the layers it remembers in a database like this. containerd computes the names of
# pulled layers, "sha256:<hex>", so no image can ask for such a name.
_CONVERTER_PREFIX = "overlaybd-conv-"
_MAX_BLOB_SIZE = 1 << 62
_MAGIC_SIZE = 24


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How images are reached and mounted where their labels do not say."""

    #: Registries spoken to over plain HTTP besides this machine's own.
    plain_http_hosts: frozenset[str] = frozenset()
    #: ``type[;mount options[;mkfs options]]``
    default_fs: str = "ext4"
    #: What containers write to where their labels do not say.
    mode: Mode = Mode.OVERLAYFS
    #: Writable layers are single sparse files instead of a log and its index.
    sparse: bool = False
    #: A device goes with the last container on it.
    auto_remove_devices: bool = False
    #: Files of removed snapshots wait for Cleanup.
    async_remove: bool = False
    #: What a container may write to its overlay, 0 for no limit.
    quota_bytes: int = 0
    #: Where labels may have writable layers lie.
    active_roots: tuple[Path, ...] = ()
    #: Where labels may have traces read and written. The default is the working directory of the original's tool.
    trace_roots: tuple[Path, ...] = (Path("/tmp/ctr-record-trace"),)


@dataclass(frozen=True, slots=True)
class RemoteLayer:
    """An overlaybd layer that stays in its registry. ``size`` in bytes.

    An ``acceleration`` layer has no blocks: it tells what to fetch ahead, and an image works without it.
    """

    digest: str
    size: int
    reference: Reference
    acceleration: bool = False
    #: A blob beside it with a trace of the image up to here.
    trace: LowerConfig = field(default_factory=LowerConfig)
    hot: bool = False


def of_client(labels: Mapping[str, str]) -> dict[str, str]:
    """Return a client's labels without those that only this service gives."""
    return {label: value for label, value in labels.items() if label not in _OWN_LABELS}


def pull_target(labels: Mapping[str, str]) -> str:
    """Return the name a pull wants the layer committed under, or '' if this is no pull."""
    return labels.get(LABEL_TARGET, "")


def is_proven(layer: RemoteLayer, labels: Mapping[str, str], below: Mapping[str, str] | None) -> bool:
    """Return True if a pulled layer's digest alone proves the name that the layer is to be committed under.

    containerd finds layers by chain ID, whatever image brought them: under the chain ID of another image's layer, a
    hostile image would put its own files into that image's containers. A blob that is an uncompressed tar is its own
    diff ID, so its digest and the chain ID below give the chain ID. ``below`` holds the labels of the parent, None
    for a bottom layer.

    A layer of another form (compressed, or turboOCI once that is served) proves nothing here: its diff ID is the
    digest of bytes that are not at hand. A turboOCI layer's small blob has to be fetched whole and hashed for that,
    here, before this may return True for it.
    """
    target = pull_target(labels)
    if target.startswith(_CONVERTER_PREFIX):
        return True
    parent = "" if below is None else pull_target(below)
    if below is not None and not is_digest(parent):
        return False
    return target == chain_id_over(parent, layer.digest)


def wants_download(labels: Mapping[str, str]) -> bool:
    """Tell whether the client of a pull wants to bring the layer's blob itself."""
    return labels.get(LABEL_DOWNLOAD) == "download"


def image_reference(labels: Mapping[str, str]) -> str:
    """Return the image a snapshot belongs to, as the kubelet or else the client calls it, or ''."""
    return labels.get(LABEL_CRI_IMAGE_REF) or labels.get(LABEL_IMAGE_REF, "")


def remote_layer(labels: Mapping[str, str], options: ImageOptions) -> RemoteLayer | None:
    """Return the overlaybd layer that the labels of a pull describe, or None for one that must be downloaded.

    That is a plain layer, or one of which no label says what image, hence what registry, it is from. Raises
    InvalidArgumentError if the labels contradict themselves and FailedPreconditionError for layers of a kind that
    cannot be served: unpacked like plain ones they would put rubbish into the container.
    """
    digest, size = labels.get(BLOB_DIGEST), labels.get(BLOB_SIZE)
    if digest is None and size is None:
        return None
    for label in (TURBO_TARGET_DIGEST, FASTOCI_TARGET_DIGEST):
        if label in labels:
            raise FailedPreconditionError(
                f"layer {digest} is a turboOCI layer, an index to the ordinary layer {labels[label]}, which this "
                "snapshotter cannot serve (wanted the ordinary image, or one made by obdlab convert)"
            )
    if not is_digest(digest):
        raise InvalidArgumentError(f"label {BLOB_DIGEST}: not a digest (got {digest!r})")
    reference = _reference(labels)
    if reference is None:
        return None
    if labels.get(BLOB_FS_TYPE):  # refused here, it keeps an image away that no container could start from
        spec_of_label(labels[BLOB_FS_TYPE], options.default_fs)
    acceleration = labels.get(ACCELERATION_LAYER) == "yes"
    trace, hot = _trace(labels.get(TRACE_LABEL, "")), labels.get(HOT_LAYER) == "yes"
    return RemoteLayer(str(digest), _blob_size(size), reference, acceleration, trace, hot)


def _trace(label: str) -> LowerConfig:
    # An image works without.
    digest, _, text = label.partition(",")
    size = decimal(text, _MAX_BLOB_SIZE)
    return LowerConfig(digest=digest, size=size) if is_digest(digest) and size is not None else LowerConfig()


def fs_spec(labels: Mapping[str, str], options: ImageOptions, image: Mapping[str, str] | None = None) -> FsSpec:
    """Return the file system of a snapshot's device, or of the ``image`` below it, by their labels."""
    text = labels.get(BLOB_FS_TYPE) or (image or {}).get(BLOB_FS_TYPE)
    return spec_of_label(text, options.default_fs) if text else FsSpec.parse(options.default_fs)


def remote_config(
    below: ImageConfig | None, layer: RemoteLayer, directory: Path, options: ImageOptions
) -> ImageConfig:
    """Return the device configuration of an image up to a layer that stays in its registry.

    ``below`` is that of the image without it, or None for the bottom layer; ``directory`` is where the layer's
    snapshot will lie.
    """
    lower = LowerConfig(digest=layer.digest, size=layer.size, dir=str(directory / "fs"), hot=layer.hot)
    config = _config(below, lower, directory, blobs_url(layer.reference, options))
    return replace(config, acceleration_layer=layer.acceleration, trace=layer.trace)


def writable_config(below: ImageConfig | None, upper: UpperConfig, directory: Path) -> ImageConfig:
    """Return the device configuration of a container that writes to ``upper``; ``directory`` is its snapshot's."""
    result_file = str(directory / "block" / "init-debug.log")
    return replace(below or ImageConfig(), upper=upper, result_file=result_file)


def local_config(below: ImageConfig | None, directory: Path) -> ImageConfig:
    """Return the device configuration of an image up to a layer whose blob lies in ``directory``'s ``fs``."""
    lower = LowerConfig(dir=str(directory / "fs"))
    return _config(below, lower, directory, below.repo_blob_url if below else "")


def _config(below: ImageConfig | None, lower: LowerConfig, directory: Path, repo_blob_url: str) -> ImageConfig:
    return ImageConfig(
        repo_blob_url=repo_blob_url,
        lowers=(*(below.lowers if below else ()), lower),
        result_file=str(directory / "block" / "init-debug.log"),
    )


def is_downloaded_layer(fs: Path) -> bool:
    """Tell whether a client unpacked an overlaybd layer here: the blob out of its tar, and nothing else."""
    with os.scandir(fs) as entries:
        if [entry.name for entry in islice(entries, 2)] != [COMMIT_FILE]:
            return False
    try:
        # The layer may be anybody's: a link would be followed, a pipe waited for.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(fs / COMMIT_FILE, flags)
    except OSError:
        return False
    # Late, because they bring numpy: 14 MiB that a service for plain images has no use for.
    from obdlab.formats.lsmt.layout import MAGIC as LSMT
    from obdlab.formats.zfile.layout import MAGIC as ZFILE

    with open(descriptor, "rb") as file:
        return stat.S_ISREG(os.fstat(descriptor).st_mode) and file.read(_MAGIC_SIZE) in (LSMT, ZFILE)


def blobs_url(reference: Reference, options: ImageOptions) -> str:
    """Return where the blobs of an image's repository are, over plain HTTP where that is right."""
    repository = reference.repo
    plain = is_loopback(reference.host) or reference.host in map(canonical_host, options.plain_http_hosts)
    return type(repository)(repository.host, repository.name, plain_http=plain).blobs_url


def _blob_size(text: str | None) -> int:
    size = decimal(text or "", _MAX_BLOB_SIZE)
    if not size:
        raise InvalidArgumentError(f"label {BLOB_SIZE}: not a size in bytes (got {(text or '')[:80]!r})")
    return size


# containerd lets a layer's annotations pass for labels of the client. Of the two, only CRI's is set over whatever an
# annotation says; credentials and requests go to the host that is named here.
def _reference(labels: Mapping[str, str]) -> Reference | None:
    named = {}
    for label in (LABEL_CRI_IMAGE_REF, LABEL_IMAGE_REF):
        text = labels.get(label)
        if text:
            named[label] = _parsed_reference(label, text)
    references = list(named.values())
    if len({reference.repo for reference in references}) > 1:
        raise InvalidArgumentError(
            f"label {LABEL_IMAGE_REF}: another repository than that of {LABEL_CRI_IMAGE_REF} "
            f"(got {references[1].repo}, wanted {references[0].repo})"
        )
    return references[0] if references else None


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
