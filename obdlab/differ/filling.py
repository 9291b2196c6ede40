"""Apply: a layer blob becomes the file of a snapshot that is being unpacked, and its commit makes a device of it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.containerd.client import DEFAULT_ADDRESS, Containerd
from obdlab.containerd.errors import NotFoundError as NoContentError
from obdlab.errors import ObdlabError
from obdlab.formats.compression import compression_of
from obdlab.formats.oci import (
    BLOB_DIGEST,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_LAYER_ZSTD,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    is_digest,
)
from obdlab.image.config import COMMIT_FILE
from obdlab.snapshotter import overlaybd, turbo, writable
from obdlab.snapshotter.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)
from obdlab.snapshotter.store import Kind
from obdlab.snapshotter.writable import WritableDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from obdlab.differ.jobs import Jobs
    from obdlab.differ.sides import Sides
    from obdlab.settings.settings import Settings
    from obdlab.snapshotter.mounts import Mount
    from obdlab.snapshotter.snapshots import Snapshots
    from obdlab.snapshotter.store import Snapshot

logger = logging.getLogger(__name__)

#: The media types of layers that are tars, or answers in place of one.
LAYER_TYPES = frozenset(
    (OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, DOCKER_LAYER, DOCKER_LAYER_GZIP, DOCKER_LAYER_ZSTD)
)
_WORK = "differ"


@dataclass(frozen=True, slots=True)
class DifferOptions:
    """The containerd whose content is read and written, and the treatment of ordinary layers."""

    containerd: str = DEFAULT_ADDRESS
    #: File system of the block layer that is made of an ordinary bottom layer; '' leaves ordinary layers alone.
    convert: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """A blob of the content store, as a descriptor names it."""

    digest: str
    size: int
    media_type: str
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Caller:
    """A namespace of containerd ('' if the call names it nowhere), and whether the answer is still wanted."""

    namespace: str
    is_wanted: Callable[[], bool]

    def namespace_of(self, snapshot: Snapshot) -> str:
        """Return the call's namespace, or that in the snapshot's key: containerd makes keys ``NAMESPACE/N/KEY``."""
        namespace, number, _ = [*snapshot.key.split("/", 2), "", ""][:3]
        found = self.namespace or (namespace if number.isdecimal() else "")
        if not found:
            raise UnsupportedError(f"snapshot {snapshot.key!r}: not one of containerd's, which has the layers")
        return found


class Work:
    """Directories for unfinished layers, on the snapshots' file system. Those of a killed service are deleted."""

    def __init__(self, root: Path) -> None:
        self._root = root / _WORK
        shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir(mode=0o700)

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """Give a new directory, for the block."""
        with tempfile.TemporaryDirectory(dir=self._root, ignore_cleanup_errors=True) as directory:
            yield Path(directory)


class Filling:
    """Applies layers to the snapshots of one root."""

    def __init__(
        self, snapshots: Snapshots, sides: Sides, jobs: Jobs, work: Work, options: DifferOptions, settings: Settings
    ) -> None:
        self._snapshots = snapshots
        self._layout = snapshots.layout
        self._sides = sides
        self._jobs = jobs
        self._work = work
        self._options = options
        self._settings = settings

    def apply(self, layer: Layer, mounts: Sequence[Mount], caller: Caller) -> tuple[str, int]:
        """Put a layer into the snapshot behind the mounts; return digest and size of its uncompressed tar.

        Raises UnsupportedError for a layer or a snapshot that another differ can fill, having changed nothing.
        """
        if layer.media_type not in LAYER_TYPES:
            raise UnsupportedError(f"layers of type {layer.media_type[:80]!r} are another differ's")
        if not is_digest(layer.digest):
            raise InvalidArgumentError(f"layer: not a digest (got {layer.digest[:80]!r})")
        snapshot, below = self._target(mounts)
        # An ordinary layer that is unpacked to a device becomes a block layer anyway.
        filesystem = "" if self._layout.has_device(snapshot.id) else self._options.convert
        if not self._may_be_ours(layer, snapshot, filesystem, caller):
            raise UnsupportedError(
                f"layer {layer.digest} is an ordinary one (convertLayers is not set, or not for it)"
            )
        with self._work.directory() as directory:
            request = {
                "job": "unpack",
                "containerd": self._options.containerd,
                "namespace": caller.namespace_of(snapshot),
                "digest": layer.digest,
                "size": layer.size,
                "filesystem": filesystem,
                "below": str(below or ""),
                "chain_id": _chain_id(snapshot),
                "settings": self._settings.to_json(),
                "work": str(directory),
            }
            try:
                made = self._jobs.run(request, caller.is_wanted)
            except UnsupportedError as error:
                if filesystem:
                    logger.warning("layer %s stays an ordinary one: %s", layer.digest, error)
                raise
            self._place(Path(made["file"]), snapshot)
        if made["made"]:
            logger.info("layer %s: block layer made", layer.digest)
        return str(made["digest"]), int(made["size"])

    # Returns the snapshot and the configuration of the image below it. A running container is not the place for a
    # layer's file, and on an ordinary layer there can be no block layer. If the snapshotter gives every snapshot a
    # device (rwMode), it also gives one to a snapshot that is for a layer.
    def _target(self, mounts: Sequence[Mount]) -> tuple[Snapshot, Path | None]:
        snapshot_id = self._sides.directory(mounts)
        if snapshot_id is None:
            snapshot_id = self._sides.device(mounts)
        if snapshot_id is None:
            raise UnsupportedError("the mounts are not those of a snapshot that layers are unpacked to")
        try:
            with self._snapshots.store.read() as reader:
                snapshot = reader.by_id(snapshot_id)
                lower_ids = reader.chain(snapshot.key)[1:]
        except NotFoundError as error:
            raise UnsupportedError(str(error)) from error
        what = f"snapshot {snapshot.key!r}"
        if snapshot.kind is not Kind.ACTIVE or not overlaybd.is_unpacked(snapshot.key, snapshot.labels):
            raise UnsupportedError(f"{what}: layers are not unpacked to it")
        if turbo.is_turbo(snapshot.labels):
            raise UnsupportedError(f"{what}: is for a turboOCI layer")
        if not _is_empty(self._layout.fs(snapshot_id)):
            raise UnsupportedError(f"{what}: has files already")
        try:
            below = self._snapshots.config_below(lower_ids, f"layer of {what}")
        except FailedPreconditionError as error:
            raise UnsupportedError(str(error)) from error
        if below is not None and any(lower.is_turbo for lower in below.lowers):
            raise UnsupportedError(f"{what}: lies on turboOCI layers")
        return snapshot, self._layout.config(lower_ids[0]) if below is not None else None

    # Spares a process for most layers if ordinary ones are left alone. A compressed overlaybd layer has the label.
    def _may_be_ours(self, layer: Layer, snapshot: Snapshot, filesystem: str, caller: Caller) -> bool:
        try:
            with Containerd(self._options.containerd, caller.namespace_of(snapshot)) as client:
                if client.content.info(layer.digest).size != layer.size:
                    raise InvalidArgumentError(
                        f"layer {layer.digest}: not of {layer.size} bytes in the content store"
                    )
                head = client.content.read_range(layer.digest, 0, overlaybd.LAYER_HEAD) if layer.size else b""
        except NoContentError as error:
            raise NotFoundError(str(error)) from error
        compression = compression_of(head)
        if compression not in ("", "gzip", "zstd"):
            return False
        if filesystem:
            return True
        if compression:
            return BLOB_DIGEST in layer.annotations or BLOB_DIGEST in snapshot.labels
        return overlaybd.is_layer(head)

    def _place(self, file: Path, snapshot: Snapshot) -> None:
        fs = self._layout.fs(snapshot.id)
        with self._snapshots.locks.hold(snapshot.id):
            with self._snapshots.store.read() as reader:
                found = reader.find(snapshot.key)
            if found is None or found.id != snapshot.id or found.kind is not Kind.ACTIVE or not _is_empty(fs):
                raise FailedPreconditionError(f"snapshot {snapshot.key!r} was changed meanwhile")
            self._drop_device(snapshot)
            try:
                file.chmod(0o644)
                file.rename(fs / COMMIT_FILE)
            except OSError as error:
                raise ObdlabError(f"{fs / COMMIT_FILE}: cannot be made ({error.strerror})") from error

    # The layer takes the place of the device's empty one.
    def _drop_device(self, snapshot: Snapshot) -> None:
        device = WritableDevice.load(self._layout.writable(snapshot.id))
        if device is None:
            return
        if not self._snapshots.images.release(snapshot.id):
            raise FailedPreconditionError(f"snapshot {snapshot.key!r}: its device is still in use")
        self._layout.writable(snapshot.id).unlink()
        writable.drop(device.upper)
        self._layout.delete(self._layout.block(snapshot.id))


# Only a UUID is made of it: a client that is wrong about it fails when containerd compares digests. Clients without a
# label for the name have it in the key.
def _chain_id(snapshot: Snapshot) -> str:
    found = overlaybd.pull_target(snapshot.labels) or snapshot.key.rpartition(" ")[2]
    return found if is_digest(found) else ""


def _is_empty(directory: Path) -> bool:
    try:
        with os.scandir(directory) as entries:
            return next(entries, None) is None
    except OSError:
        return False
