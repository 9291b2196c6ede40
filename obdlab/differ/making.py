"""Diff: a snapshot's changes to its image become an overlaybd layer in containerd's content store."""

from __future__ import annotations

import logging
import os
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.containerd.client import Containerd
from obdlab.differ.filling import LAYER_TYPES, Layer
from obdlab.errors import DeviceError
from obdlab.formats.oci import OCI_LAYER
from obdlab.image.config import COMMIT_FILE, SEALED_FILE
from obdlab.snapshotter import overlaybd
from obdlab.snapshotter.errors import FailedPreconditionError, NotFoundError, UnsupportedError
from obdlab.snapshotter.store import Kind
from obdlab.snapshotter.writable import WritableDevice
from obdlab.system import mount
from obdlab.system.freeze import frozen, thaw
from obdlab.system.sparsecopy import copy_sparse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from obdlab.differ.filling import Caller, DifferOptions, Work
    from obdlab.differ.jobs import Jobs
    from obdlab.differ.sides import Sides
    from obdlab.settings.settings import Settings
    from obdlab.snapshotter.core import Snapshotter
    from obdlab.snapshotter.mounts import Mount
    from obdlab.snapshotter.store import Reader, Snapshot

logger = logging.getLogger(__name__)

#: containerd's collector takes a blob that neither a lease nor an image holds. containerd does not pass on its
#: client's lease, so the client has this long to name the blob.
LEASE_S = 3600.0
_INIT = "-init"
_CHECKPOINT = "checkpoint-"
#: Writers wait while the layer's files are copied. On file systems that share copies (xfs, btrfs) that takes no time.
_MOST_FROZEN_S = 120.0


@dataclass(frozen=True, slots=True)
class _Source:
    # The snapshot and its parent, and the files of its layer. ``index`` is '' for a layer that is sealed. ``inits``
    # are the layers of Docker's init snapshots below it, bottom first.
    snapshot: Snapshot
    parent: Snapshot | None
    inits: tuple[Path, ...]
    file: Path
    index: str = ""
    #: ``file`` is the upper directory of an overlay.
    is_overlay: bool = False


class Making:
    """Makes layers of the snapshots of one root."""

    def __init__(
        self,
        snapshotter: Snapshotter,
        sides: Sides,
        jobs: Jobs,
        work: Work,
        options: DifferOptions,
        settings: Settings,
    ) -> None:
        self._snapshotter = snapshotter
        self._snapshots = snapshotter.snapshots
        self._layout = self._snapshots.layout
        self._sides = sides
        self._jobs = jobs
        self._work = work
        self._options = options
        self._settings = settings

    def recover(self) -> None:
        """Thaw the file systems that a killed service left frozen."""
        with self._snapshots.store.read() as reader:
            rows = [row for row in reader.all() if row.kind is Kind.ACTIVE and self._layout.has_device(row.id)]
        for row in rows:
            for point in self._mountpoints(row.id):
                try:
                    if thaw(point):
                        logger.warning("%s: was left frozen, it goes on", point)
                except OSError as error:
                    logger.warning("%s: %s", point, error)

    def diff(
        self,
        left: Sequence[Mount],
        right: Sequence[Mount],
        media_type: str,
        ref: str,
        labels: Mapping[str, str],
        caller: Caller,
    ) -> Layer:
        """Make the layer of the snapshot that ``right`` shows, whose parent ``left`` must show.

        The layer is an uncompressed tar for other programs, also if the caller asks for a compressed one. Raises
        UnsupportedError for sides that another differ can compare, having changed nothing.
        """
        if media_type and media_type not in LAYER_TYPES:
            raise UnsupportedError(f"layers of type {media_type[:80]!r} are another differ's")
        if ref.startswith(_CHECKPOINT):
            raise UnsupportedError("a checkpoint is restored file by file")
        source = self._source(right)
        if not self._sides.is_parent(left, source.parent.id if source.parent else None):
            raise UnsupportedError(f"snapshot {source.snapshot.key!r} is not compared with its parent")
        namespace = caller.namespace_of(source.snapshot)
        with self._work.directory() as directory:
            if source.snapshot.kind is Kind.ACTIVE and not source.is_overlay:
                source = self._copied(source, directory)
            request = {
                "containerd": self._options.containerd,
                "namespace": namespace,
                "lease": self._lease(namespace),
                "filesystem": self._fs_type(source),
                "labels": dict(labels),
                "work": str(directory),
                **(self._change(source) if source.is_overlay else _pack(source)),
            }
            made = self._jobs.run(request, caller.is_wanted)
        return Layer(str(made["digest"]), int(made["size"]), OCI_LAYER, made["annotations"])

    def _change(self, source: _Source) -> dict[str, object]:
        usage = self._layout.usage(source.snapshot.id)
        below = str(self._layout.config(source.parent.id)) if source.parent else ""
        settings = self._settings.to_json()
        return {"job": "change", "upper": str(source.file), "below": below, "size": usage.size, "settings": settings}

    # A container's overlay directly on an image, or on nothing.
    def _overlay(self, right: Sequence[Mount]) -> _Source:
        snapshot_id = self._sides.directory(right)
        if snapshot_id is not None and self._options.convert:
            with suppress(NotFoundError), self._snapshots.store.read() as reader:
                snapshot = reader.by_id(snapshot_id)
                parent = reader.get(snapshot.parent) if snapshot.parent else None
                if snapshot.kind is Kind.ACTIVE and (parent is None or self._layout.is_image(parent.id)):
                    return _Source(snapshot, parent, (), self._layout.fs(snapshot_id), is_overlay=True)
        raise UnsupportedError(
            "the mounts are not those of a block device of this snapshotter, or of an overlay on one"
        )

    def _source(self, right: Sequence[Mount]) -> _Source:
        snapshot_id = self._sides.device(right)
        if snapshot_id is None:
            return self._overlay(right)
        try:
            with self._snapshots.store.read() as reader:
                snapshot = reader.by_id(snapshot_id)
                parent = reader.get(snapshot.parent) if snapshot.parent else None
                inits = self._inits(reader, parent)
        except NotFoundError as error:
            raise UnsupportedError(str(error)) from error
        device = WritableDevice.load(self._layout.writable(snapshot_id))
        if device is not None and snapshot.kind is Kind.ACTIVE:
            index = device.upper.index if os.path.exists(device.upper.index) else ""  # a sparse layer may have none
            return _Source(snapshot, parent, inits, Path(device.upper.data), index)
        fs = self._layout.fs(snapshot_id)
        for file in (fs / SEALED_FILE, fs / COMMIT_FILE):
            if file.is_file():
                return _Source(snapshot, parent, inits, file)
        raise UnsupportedError(f"snapshot {snapshot.key!r}: its layer is in a registry")

    # Docker's images leave out the snapshot between an image and a container. A layer of blocks is right only on the
    # blocks that it was made on, so this one has the changes of both; on the init snapshot it shows the same.
    def _inits(self, reader: Reader, parent: Snapshot | None) -> tuple[Path, ...]:
        found: list[Path] = []
        while parent is not None and parent.key.endswith(_INIT):
            found.insert(0, self._layout.fs(parent.id) / SEALED_FILE)
            parent = reader.get(parent.parent) if parent.parent else None
        return tuple(found)

    # The device goes on. Without freezing, the copy would be that of a machine that lost power.
    def _copied(self, source: _Source, directory: Path) -> _Source:
        snapshot = source.snapshot
        self._snapshotter.mounts(snapshot.key)  # a device that is gone may have left its last changes unflushed
        with self._snapshots.locks.hold(snapshot.id), ExitStack() as ended:
            if WritableDevice.load(self._layout.writable(snapshot.id)) is None:
                raise FailedPreconditionError(f"snapshot {snapshot.key!r} was removed or committed meanwhile")
            for point in self._mountpoints(snapshot.id)[:1]:
                ended.enter_context(frozen(point))
            self._flush(snapshot.id)
            before = source.file.stat()
            index = ""
            if source.index:  # first: the data it points to is in the other file already
                index = str(directory / "index")
                copy_sparse(Path(source.index), Path(index), _MOST_FROZEN_S)
            copy_sparse(source.file, directory / "data", _MOST_FROZEN_S)
            after = source.file.stat()
        if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
            raise FailedPreconditionError(
                f"snapshot {snapshot.key!r}: was written to while its layer was copied: its mounts cannot be seen "
                "from here, so that they could not be frozen (stop the container first)"
            )
        return _Source(snapshot, source.parent, source.inits, directory / "data", index)

    def _device(self, snapshot_id: int) -> Path | None:
        try:
            return Path(self._layout.backstore_mark(snapshot_id).read_text().strip())
        except OSError:
            return None

    # The host's mounts, in modes ``dir`` and ``dev``. The mark may name a device that now is another snapshot's.
    def _mountpoints(self, snapshot_id: int) -> list[Path]:
        device = self._device(snapshot_id)
        if device is None or not self._sides.is_device_of(device, snapshot_id):
            return []
        return [entry.mountpoint for entry in mount.mounts_of(device)]

    def _flush(self, snapshot_id: int) -> None:
        device = self._device(snapshot_id)
        if device is None:
            return
        try:
            descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DeviceError(f"{device}: cannot be flushed ({error.strerror})") from error

    def _fs_type(self, source: _Source) -> str:
        if source.is_overlay and source.parent is None:
            return self._options.convert
        below = source.parent.labels if source.parent else None
        return overlaybd.fs_spec(source.snapshot.labels, self._snapshots.options, below).fs_type

    def _lease(self, namespace: str) -> str:
        name = f"obdlab-diff-{uuid.uuid4().hex}"
        with Containerd(self._options.containerd, namespace) as client:
            client.leases.create(name, expire_s=LEASE_S)
        return name


def _pack(source: _Source) -> dict[str, object]:
    inits = [str(file) for file in source.inits]
    return {"job": "pack", "file": str(source.file), "index": source.index, "inits": inits}
