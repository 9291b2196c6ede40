"""The snapshots of one root, rows and directories together, and what lies below each: what all operations stand on.

A row and its directory appear and change together, inside a transaction of the store.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

from obdlab.image.config import ImageConfig
from obdlab.snapshotter import overlaybd
from obdlab.snapshotter.errors import FailedPreconditionError
from obdlab.snapshotter.importing import take_over
from obdlab.snapshotter.locks import KeyedLocks
from obdlab.snapshotter.quota import Quotas
from obdlab.snapshotter.store import Store
from obdlab.snapshotter.writable import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from obdlab.image.config import LowerConfig
    from obdlab.snapshotter.layout import Layout
    from obdlab.snapshotter.store import Kind, Reader, Snapshot, Writer
    from obdlab.snapshotter.writable import FsSpec


class ImageMounts(Protocol):
    """What mounts overlaybd images (``obdlab.snapshotter.images.ImageDevices``)."""

    #: Told of an image (by its snapshot's id) that is not read lazily, and why.
    on_fallback: Callable[[int, str], None]

    def mount(
        self, snapshot_id: int, spec: FsSpec, asked_s: float, mode: Mode = Mode.OVERLAYFS, *, make: bool = False
    ) -> Path:
        """Have the snapshot's device attached and mounted as ``mode`` wants it, as asked for at ``asked_s``."""

    def prime(self, repo_blob_url: str, layer: LowerConfig) -> None:
        """Have a pulled layer's index fetched in the background, so that its image can be opened sooner."""

    def release(self, snapshot_id: int) -> bool:
        """Unmount and detach, telling whether the device is gone, or raise FailedPreconditionError if it is used."""


class Snapshots:
    """Store, directories, devices and locks of a root. ``options`` say how its images are treated."""

    def __init__(self, layout: Layout, images: ImageMounts, options: overlaybd.ImageOptions) -> None:
        """Open the store below a locked root. Raises StoreError, and QuotaError if the wanted quota cannot be had."""
        self.layout = layout
        self.images = images
        self.options = options
        self.quotas = Quotas(layout.snapshots)
        if options.quota_bytes:
            self.quotas.check(options.quota_bytes)
        take_over(layout, options.mode)
        self.store = Store(layout.metadata)
        self.locks = KeyedLocks()

    def image_below(self, reader: Reader, lower_ids: Sequence[int]) -> Snapshot | None:
        """Return the nearest overlaybd image among a snapshot's ancestors."""
        for lower_id in lower_ids:
            if self.layout.is_image(lower_id):
                return reader.by_id(lower_id)
        return None

    def lowers(self, lower_ids: Sequence[int]) -> list[Path]:
        """Return the directories an overlay is made of, nearest first.

        An image's device shows the layers below it too, so it ends the list.
        """
        lowers: list[Path] = []
        for lower_id in lower_ids:
            if self.layout.is_image(lower_id):
                lowers.append(self.layout.mountpoint(lower_id))
                break
            lowers.append(self.layout.fs(lower_id))
        return lowers

    def add(
        self,
        writer: Writer,
        kind: Kind,
        key: str,
        parent: str,
        labels: Mapping[str, str],
        fill: Callable[[Path, int, Sequence[int]], None] | None = None,
        *,
        quota_bytes: int = 0,
    ) -> tuple[Snapshot, list[int]]:
        """Make row and directory; return the snapshot and the ids of its ancestors, nearest first.

        ``fill(directory, id, ancestors)`` puts more into the directory before it gets its name.
        """
        snapshot = writer.create(kind, key, parent, labels)
        lower_ids = list(writer.chain(key)[1:])
        directory = self.layout.new_directory(kind, self._owner(lower_ids))
        for path in (directory, self.layout.directory(snapshot.id)):
            writer.on_rollback(partial(self.layout.delete, path))
        self.layout.write_image_reference(directory, overlaybd.image_reference(labels))
        if quota_bytes:
            project = self.quotas.limit([directory / "fs", directory / "work"], snapshot.id, quota_bytes)
            writer.on_rollback(partial(self.quotas.forget, project))
        if fill is not None:
            fill(directory, snapshot.id, lower_ids)
        self.layout.adopt(directory, snapshot.id)
        return snapshot, lower_ids

    def delete(self, snapshot_id: int) -> None:
        """Delete the files of a snapshot that is in the store no more, and its quota."""
        self.delete_directory(self.layout.directory(snapshot_id))

    def delete_directory(self, directory: Path) -> None:
        """Delete a directory that belongs to no snapshot, and the quota on it."""
        project = self.quotas.project_of(directory / "fs")
        self.layout.delete(directory)
        if project:
            self.quotas.forget(project)

    def config_below(self, lower_ids: Sequence[int], layer: str) -> ImageConfig | None:
        """Return the configuration of the image that an overlaybd layer goes on; None for a bottom layer.

        Raises FailedPreconditionError, naming the ``layer``, if it cannot lie there.
        """
        if not lower_ids:
            return None
        if not self.layout.is_image(lower_ids[0]):
            raise FailedPreconditionError(f"overlaybd {layer} lies on a layer that is none")
        below = ImageConfig.load(self.layout.config(lower_ids[0]))
        if below.acceleration_layer:
            raise FailedPreconditionError(f"overlaybd {layer} lies on an acceleration layer, which must be the top")
        return below

    # In an overlay the upper directory is what "/" looks like, so its owner carries on from layer to layer.
    def _owner(self, lower_ids: Sequence[int]) -> tuple[int, int] | None:
        for lower in self.lowers(lower_ids)[:1]:
            status = lower.stat()
            return status.st_uid, status.st_gid
        return None
