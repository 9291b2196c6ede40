"""A pull that fetches only metadata if the snapshotter can provide the layers by itself.

The flow is that of containerd's own clients (Prepare with a target snapshot; ALREADY_EXISTS means "nothing to
download"). So plain images, and snapshotters without this feature, work as with an ordinary pull.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.command import command
from obdlab.containerd import gclabels
from obdlab.containerd.errors import UnavailableError
from obdlab.containerd.images import Image
from obdlab.foreign import is_proxy_unconnected
from obdlab.formats.oci import ACCELERATION_LAYER, UNKNOWN_TYPE, Descriptor, check_digest
from obdlab.image.from_manifest import find_trace
from obdlab.pull.errors import PullError
from obdlab.pull.fetch import LayerFetcher
from obdlab.pull.resolve import resolve
from obdlab.pull.unpack import LayerResult, Outcome, Unpacker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.containerd.client import Containerd, LeasedContainerd
    from obdlab.formats.oci import Platform
    from obdlab.pull.fetch import Progress
    from obdlab.pull.resolve import ResolvedImage
    from obdlab.registry.client import RegistryClient
    from obdlab.registry.reference import Reference

# The lease keeps content of a killed pull for this time, as that of containerd's own clients.
_LEASE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class PullResult:
    """A finished pull. Bytes are those received from the registry; metadata is index, manifest and config."""

    name: str
    digest: str
    layers: tuple[LayerResult, ...]
    metadata_bytes: int
    layer_bytes: int

    @property
    def fetched_bytes(self) -> int:
        """All downloaded bytes."""
        return self.metadata_bytes + self.layer_bytes

    @property
    def still_lazy(self) -> tuple[LayerResult, ...]:
        """Layers made by an earlier pull, whose data the snapshotter reads from a registry."""
        return tuple(layer for layer in self.layers if layer.outcome is Outcome.PRESENT and layer.origin)

    def count(self, outcome: Outcome) -> int:
        """Return the number of layers with this outcome."""
        return sum(layer.outcome is outcome for layer in self.layers)


def rpull(
    containerd: Containerd,
    registry: RegistryClient,
    reference: Reference,
    *,
    snapshotter: str,
    platform: Platform,
    progress: Progress | None = None,
    download: bool = False,
) -> PullResult:
    """Make the image runnable in ``snapshotter``, without fetching layers that it provides lazily.

    With ``download`` the blobs of overlaybd layers are fetched too, and the ordinary layers that turboOCI layers
    point into: the image then runs without its registry, unless it was pulled lazily before
    (``PullResult.still_lazy``), as snapshots that others may use are not made again.

    A second call finds all layers present and fetches only the documents. A failure, or KeyboardInterrupt, leaves
    nothing new behind: no snapshot, blob or lease. Raises PullError, FormatError (the image), SourceError (the
    registry), ContainerdError.
    """
    if not _exists(containerd, snapshotter):  # checked before anything is fetched
        raise PullError(f"containerd has no snapshotter {snapshotter!r}: is it in its config.toml?")
    image = resolve(registry, reference, platform)
    with containerd.lease(expire_s=_LEASE_S) as leased:
        source = gclabels.of_source(image.repository.host, image.repository.name)
        with (
            LayerFetcher(leased, registry, image.repository, source, progress) as fetcher,
            _naming_a_dead_snapshotter(snapshotter),
        ):
            trace = "" if download else _trace_of(registry, image)
            targets = _targets_of(registry, image) if download else {}
            unpacker = Unpacker(leased, snapshotter, image, fetcher, download=download, trace=trace, targets=targets)
            layers = unpacker.run()
            if download:
                fetcher.bring([*(layer for layer in image.layers if layer.is_overlaybd), *targets.values()])
        _store_documents(leased, image, snapshotter, source)
        top = image.top
        leased.images.put(Image(str(reference), top.media_type, top.digest, len(top.data), {}))
    return PullResult(str(reference), top.digest, layers, image.metadata_size, fetcher.fetched_bytes)


# An image does not say how large they are.
def _targets_of(registry: RegistryClient, image: ResolvedImage) -> dict[str, Descriptor]:
    digests = {check_digest(layer.turbo_target, image.name) for layer in image.layers if layer.turbo_target}
    sizes = {digest: registry.blob_size(image.repository, digest) for digest in sorted(digests)}
    return {digest: Descriptor(UNKNOWN_TYPE, digest, size) for digest, size in sizes.items()}


# A trace may speed up starts, but they do not depend on it.
def _trace_of(registry: RegistryClient, image: ResolvedImage) -> str:
    if not image.layers[-1].is_overlaybd or image.layers[-1].annotations.get(ACCELERATION_LAYER) == "yes":
        return ""
    found = find_trace(registry, image.reference, image.manifest.digest)
    return f"{found.digest},{found.size}" if found.digest else ""


def _exists(containerd: Containerd, snapshotter: str) -> bool:
    try:
        return containerd.snapshots(snapshotter).exists()
    except UnavailableError as error:
        raise UnavailableError(f"is containerd running at {containerd.address}? ({error})") from error


# containerd answers for a snapshot from its own records first, so only making one shows that the snapshotter is dead.
@contextmanager
def _naming_a_dead_snapshotter(snapshotter: str) -> Iterator[None]:
    try:
        yield
    except UnavailableError as error:
        if not is_proxy_unconnected(str(error)):  # the snapshotter's own error: a registry that cannot be reached
            raise
        raise UnavailableError(
            f"snapshotter {snapshotter!r} does not answer: is `{command('serve', 'snapshotter')}` running on the "
            f"socket that containerd's proxy plugin names? ({error})"
        ) from error


def _store_documents(
    containerd: LeasedContainerd, image: ResolvedImage, snapshotter: str, source: dict[str, str]
) -> None:
    # The garbage collector goes image -> index -> manifest -> config -> snapshot. The labels also hold layers that
    # were never downloaded, if another pull stores them.
    content, manifest = containerd.content, image.parsed_manifest
    top_snapshot = gclabels.of_config(snapshotter, image.chain_ids[-1])
    content.write(manifest.config.digest, image.config, source | top_snapshot)
    children = gclabels.of_manifest(manifest)
    content.write(image.manifest.digest, image.manifest.data, source | children)
    if image.index and image.parsed_index:
        children = gclabels.of_index(entry.digest for entry in image.parsed_index.manifests)
        content.write(image.index.digest, image.index.data, source | children)
