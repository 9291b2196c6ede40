"""Turns the layers of an image into snapshots, downloading only those that the snapshotter does not provide."""

from __future__ import annotations

import enum
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol

from obdlab.containerd.errors import AlreadyExistsError, ContainerdError, FailedPreconditionError, NotFoundError
from obdlab.containerd.snapshots import Kind
from obdlab.formats.oci import (
    ACCELERATION_LAYER,
    BLOB_DIGEST,
    BLOB_SIZE,
    FASTOCI_TARGET_DIGEST,
    HASH_TREE,
    IN_CONTENT_STORE,
    TRACE_LABEL,
    TURBO_TARGET_DIGEST,
    TURBO_TARGET_PLACE,
)
from obdlab.pull.errors import PullError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from obdlab.containerd.client import LeasedContainerd
    from obdlab.containerd.snapshots import Mount
    from obdlab.formats.oci import Descriptor

#: Descriptor annotations under this prefix become labels of the snapshot.
SNAPSHOT_PREFIX = "containerd.io/snapshot/"
TARGET_LABEL = "containerd.io/snapshot.ref"
IMAGE_LABEL = "containerd.io/snapshot/image-ref"
CRI_IMAGE_LABEL = "containerd.io/snapshot/cri.image-ref"
DOWNLOAD_LABEL = "containerd.io/snapshot/overlaybd/download-remote-blob"

# The snapshotter's label on layers that it reads from a registry.
_REMOTE_LABEL = "containerd.io/snapshot/remote"
# Labels set by a client or a snapshotter; annotations of an image must not set them.
_CLIENT_LABELS = frozenset({CRI_IMAGE_LABEL, DOWNLOAD_LABEL, TRACE_LABEL, TURBO_TARGET_PLACE, _REMOTE_LABEL})
_PREPARE_TRIES = 3


class Outcome(enum.Enum):
    """The way a layer became a snapshot."""

    PRESENT = "present"
    LAZY = "lazy"
    UNPACKED = "unpacked"


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One layer of a finished pull."""

    digest: str
    size: int
    outcome: Outcome
    #: The image from whose registry the snapshotter reads the layer's data; '' if the data is local.
    origin: str = ""
    #: The snapshotter checks a layer that was present by another hash tree than this image's, or by none.
    other_tree: bool = False


class UnpackedImage(Protocol):
    """An image whose layers become snapshots; lists are bottom first."""

    @property
    def name(self) -> str:
        """The image's name, for its layers' labels and for errors."""

    @property
    def layers(self) -> Sequence[Descriptor]:
        """Descriptors of the layers."""

    @property
    def diff_ids(self) -> Sequence[str]:
        """Digests of the layers' uncompressed tars."""

    @property
    def chain_ids(self) -> Sequence[str]:
        """Names of the layers' snapshots."""


class Fetcher(Protocol):
    """Brings layers into the content store."""

    def start(self, layers: Sequence[Descriptor]) -> None:
        """Begin to fetch these layers."""

    def wait(self, layer: Descriptor) -> None:
        """Wait until the content store has a layer that was begun."""


class Unpacker:
    """Makes the snapshots of one image in one snapshotter, under a lease."""

    def __init__(
        self,
        containerd: LeasedContainerd,
        snapshotter: str,
        image: UnpackedImage,
        fetcher: Fetcher,
        *,
        download: bool = False,
        trace: str = "",
        targets: Mapping[str, Descriptor] | None = None,
    ) -> None:
        """Prepare to fetch layers that the snapshotter does not provide; ``download`` also fetches all others' blobs.

        ``trace`` ("digest,size") is a blob in the image's repository to replay at its starts. ``targets`` are those
        of the image's turboOCI layers, by digest, which then are fetched too: the snapshotter reads them from the
        content store.
        """
        self._containerd = containerd
        self._snapshots = containerd.snapshots(snapshotter)
        self._snapshotter = snapshotter
        self._image = image
        self._fetcher = fetcher
        self._download = download
        self._trace = trace
        self._targets = targets or {}

    def run(self) -> tuple[LayerResult, ...]:
        """Make a committed snapshot of every layer, bottom first.

        A failure leaves no active snapshot; the lease removes the committed ones.
        """
        layers, chain = self._image.layers, self._image.chain_ids
        if self._present(chain[-1]):  # it has all its parents
            return tuple(map(self._as_present, layers, chain))
        results: list[LayerResult] = []
        for number, (layer, name) in enumerate(zip(layers, chain, strict=True)):
            # Over a missing layer no snapshot can be present; asking is the most expensive step here.
            above_present = not results or results[-1].outcome is Outcome.PRESENT
            if above_present and self._present(name):
                results.append(self._as_present(layer, name))
            else:
                results.append(self._make(number))
        return tuple(results)

    def _make(self, number: int) -> LayerResult:
        layer, name = self._image.layers[number], self._image.chain_ids[number]
        parent = self._image.chain_ids[number - 1] if number else ""
        labels = snapshot_labels(layer, name, self._image.name)
        if layer.turbo_target in self._targets:
            labels[TURBO_TARGET_PLACE] = IN_CONTENT_STORE
        if self._trace and number == len(self._image.layers) - 1:
            labels[TRACE_LABEL] = self._trace
        download = self._download or not self._is_proven(number)
        if download:
            labels[DOWNLOAD_LABEL] = "download"
        for _ in range(_PREPARE_TRIES):
            key = f"extract-{time.time_ns() % 10**9}-{os.urandom(3).hex()} {name}"
            try:
                mounts = self._snapshots.prepare(key, parent, labels)
            except AlreadyExistsError:
                if self._committed(name):  # containerd has put it under the lease
                    return LayerResult(layer.digest, layer.size, Outcome.LAZY, self._image.name)
                # Another client made it and it was removed again, or the key was taken, or only its record exists.
                self._forget_lost(number)
                continue
            if layer.is_overlaybd and not download:
                self._refuse(layer, key)
            # No layer above can be a snapshot yet, so all of them must be fetched.
            above = self._image.layers[number:]
            self._fetcher.start([part for each in above for part in (each, *self._target_of(each))])
            self._fill(layer, self._image.diff_ids[number], name, key, mounts, labels)
            return LayerResult(layer.digest, layer.size, Outcome.UNPACKED)
        raise PullError(
            f"{self._snapshotter}: says that snapshot {name} exists already, yet there is none "
            f"(layer {layer.digest}, {_PREPARE_TRIES} tries)"
        )

    # A snapshotter reads a lazy layer's blob without having seen all of it. If the blob's digest is the diff ID, the
    # blob is the one that the config describes, and other images find it by that name. Any other blob is fetched,
    # unpacked and compared. A turboOCI layer's diff ID is that of its uncompressed blob, which would have to be
    # fetched for comparing.
    def _is_proven(self, number: int) -> bool:
        layer = self._image.layers[number]
        if not layer.is_overlaybd:
            return True
        blob = (layer.annotations[BLOB_DIGEST], layer.annotations.get(BLOB_SIZE, str(layer.size)))
        if blob != (layer.digest, str(layer.size)):
            raise PullError(
                f"{self._image.name}: layer {layer.digest} of {layer.size} bytes is said to be another blob "
                f"(got {blob[0]} of {blob[1]} bytes in its annotations)"
            )
        return self._image.diff_ids[number] == layer.digest

    # A snapshotter whose root was emptied has lost snapshots that containerd still has on record: their names are
    # taken.
    def _forget_lost(self, number: int) -> None:
        for name in reversed(self._image.chain_ids[number:]):
            if self._committed(name):
                continue
            try:
                self._snapshots.remove(name)
            except NotFoundError:
                continue
            except FailedPreconditionError as error:
                raise PullError(
                    f"{self._snapshotter}: has lost snapshot {name}, which containerd has on record (was the "
                    "snapshotter's directory emptied?); remove the containers and images on it, and pull again "
                    f"({error})"
                ) from error

    # Unpacked it would be a file in an otherwise empty root file system: the image could be pulled, but not run.
    def _refuse(self, layer: Descriptor, key: str) -> NoReturn:
        with suppress(ContainerdError):
            self._snapshots.remove(key)
        raise PullError(
            f"{self._image.name}: layer {layer.digest} is an overlaybd layer, which snapshotter "
            f"{self._snapshotter!r} does not mount (wanted one that does, such as obdlab's)"
        )

    def _fill(
        self, layer: Descriptor, diff_id: str, name: str, key: str, mounts: list[Mount], labels: dict[str, str]
    ) -> None:
        try:
            for part in (layer, *self._target_of(layer)):
                self._fetcher.wait(part)
            got = self._containerd.differ.apply(layer.media_type, layer.digest, layer.size, mounts)
            if got != diff_id:
                raise PullError(f"layer {layer.digest}: unpacks to other bytes (got {got}, wanted diff ID {diff_id})")
            self._commit(name, key, labels)
        except BaseException:
            with suppress(ContainerdError):  # the error being raised matters more
                self._snapshots.remove(key)
            raise

    def _target_of(self, layer: Descriptor) -> tuple[Descriptor, ...]:
        target = self._targets.get(layer.turbo_target or "")
        return () if target is None else (target,)

    def _commit(self, name: str, key: str, labels: dict[str, str]) -> None:
        try:
            self._snapshots.commit(name, key, labels)
        except AlreadyExistsError:  # another client was faster
            self._snapshots.remove(key)
            if not self._present(name):
                raise

    def _present(self, name: str) -> bool:
        if not self._committed(name):
            return False
        self._containerd.hold_snapshot(self._snapshotter, name)
        return self._committed(name)  # it might have been removed before it was held

    def _as_present(self, layer: Descriptor, name: str) -> LayerResult:
        # A trace layer does not count: it is small, never needed and never unpacked.
        is_data = layer.is_overlaybd and layer.annotations.get(ACCELERATION_LAYER) != "yes"
        labels = self._snapshots.stat(name).labels if is_data or layer.turbo_target else {}
        if layer.turbo_target:
            self._check_target(layer, name, labels)
        origin = labels.get(IMAGE_LABEL) or labels.get(CRI_IMAGE_LABEL, "")
        lazy = _REMOTE_LABEL in labels or (bool(layer.turbo_target) and TURBO_TARGET_PLACE not in labels)
        # Of a turboOCI layer the blob has the sums, and the name of the snapshot is the blob's.
        other_tree = _REMOTE_LABEL in labels and labels.get(HASH_TREE, "") != layer.annotations.get(HASH_TREE, "")
        return LayerResult(layer.digest, layer.size, Outcome.PRESENT, origin if lazy else "", other_tree)

    # The snapshot's name is that of the layer's small blob. A snapshotter that believes labels may have made it with
    # the target that another image named.
    def _check_target(self, layer: Descriptor, name: str, labels: Mapping[str, str]) -> None:
        got = labels.get(TURBO_TARGET_DIGEST) or labels.get(FASTOCI_TARGET_DIGEST)
        if got != layer.turbo_target:
            raise PullError(
                f"{self._image.name}: turboOCI layer {layer.digest} is there as snapshot {name}, which another "
                f"image made with another layer for its files (got {got}, wanted {layer.turbo_target}); remove the "
                "containers and images on it, and pull again"
            )

    def _committed(self, name: str) -> bool:
        try:
            return self._snapshots.stat(name).kind is Kind.COMMITTED
        except NotFoundError:
            return False


def snapshot_labels(layer: Descriptor, name: str, reference: str) -> dict[str, str]:
    """Return the labels for preparing a layer's snapshot: its target name, its image, its annotations.

    Annotations cannot set labels that only a client may set. ``reference`` is empty for an image of no registry.
    """
    labels = {
        key: value
        for key, value in layer.annotations.items()
        if key.startswith(SNAPSHOT_PREFIX) and key not in _CLIENT_LABELS
    }
    labels.pop(IMAGE_LABEL, None)
    return labels | {TARGET_LABEL: name} | ({IMAGE_LABEL: reference} if reference else {})
