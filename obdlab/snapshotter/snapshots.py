"""The snapshots of one root, rows and directories together, and the layers below each: the base of all operations.

A row and its directory appear and change together, inside a transaction of the store.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

from obdlab import plugins
from obdlab.image.config import ImageConfig
from obdlab.snapshotter import overlaybd
from obdlab.snapshotter.errors import FailedPreconditionError
from obdlab.snapshotter.layout import ORIGINAL_NAME, RootError
from obdlab.snapshotter.quota import Quotas
from obdlab.snapshotter.store import Store
from obdlab.snapshotter.writable import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from obdlab.image.config import ImageConfig
    from obdlab.snapshotter.layout import Layout
    from obdlab.snapshotter.store import Kind, Reader, Snapshot, Writer
    from obdlab.snapshotter.writable import FsSpec


class ImageMounts(Protocol):
    """Mounts overlaybd images (``obdlab.snapshotter.imagemounts.ImageDevices``)."""

    #: Called with the snapshot id of an image that is not read lazily, and the reason.
    on_fallback: Callable[[int, str], None]

    def admitted(self, snapshot_id: int) -> AbstractContextManager[None]:
        """Return a context manager around all that may wait for the image's registry. Raises BusyRegistryError."""

    def mount(
        self, snapshot_id: int, spec: FsSpec, asked_s: float, mode: Mode = Mode.OVERLAYFS, *, make: bool = False
    ) -> Path:
        """Attach and mount the snapshot's device according to ``mode``; the request came at ``asked_s``."""

    def check_place(self) -> None:
        """Raise ObdlabError if the devices' directories are refused, so that no image can be mounted."""

    def prime(self, image: ImageConfig) -> None:
        """Fetch the first reads of an image whose top layer was pulled, in the background: it starts sooner."""

    def release(self, snapshot_id: int) -> bool:
        """Unmount and detach. Return True if the device is gone. Raises FailedPreconditionError if it is in use."""


class KeyedLocks:
    """One lock per snapshot id. It exists as long as a thread holds or wants it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[int, tuple[threading.Lock, int]] = {}

    @contextmanager
    def hold(self, key: int) -> Iterator[None]:
        """Wait for the lock of a key, and hold it."""
        with self._guard:
            lock, users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._locks[key]
                if users == 1:
                    del self._locks[key]
                else:
                    self._locks[key] = (lock, users - 1)


class Snapshots:
    """Store, directories, devices and locks of a root. ``options`` apply to its images."""

    def __init__(self, layout: Layout, images: ImageMounts, options: overlaybd.ImageOptions) -> None:
        """Open the store below a locked root. Raises StoreError, QuotaError if the configured quota is impossible."""
        self.layout = layout
        self.images = images
        self.options = options
        self.quotas = Quotas(layout.snapshots)
        if options.quota_bytes:
            self.quotas.check(options.quota_bytes)
        _take_over(layout, options.mode)
        self.store = Store(layout.metadata)
        self.locks = KeyedLocks()

    def image_below(self, reader: Reader, lower_ids: Sequence[int]) -> Snapshot | None:
        """Return the nearest overlaybd image among a snapshot's ancestors."""
        for lower_id in lower_ids:
            if self.layout.is_image(lower_id):
                return reader.by_id(lower_id)
        return None

    def lowers(self, lower_ids: Sequence[int]) -> list[Path]:
        """Return the lower directories of an overlay, nearest first.

        An image's device shows the layers below it too, so the list ends there.
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

        ``fill(directory, id, ancestors)`` adds files to the directory before it gets its name.
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
        """Delete the files and the quota of a snapshot that is no longer in the store."""
        self.delete_directory(self.layout.directory(snapshot_id))

    def delete_directory(self, directory: Path) -> None:
        """Delete a directory without a snapshot, and its quota."""
        project = self.quotas.project_of(directory / "fs")
        self.layout.delete(directory)
        if project:
            self.quotas.forget(project)

    def config_below(self, lower_ids: Sequence[int], layer: str) -> ImageConfig | None:
        """Return the configuration of the image below an overlaybd layer; None for a bottom layer.

        Raises FailedPreconditionError, naming the ``layer``, if the layer cannot lie there.
        """
        if not lower_ids:
            return None
        if not self.layout.is_image(lower_ids[0]):
            raise FailedPreconditionError(f"overlaybd {layer} lies on a layer that is none")
        below = ImageConfig.load(self.layout.config(lower_ids[0]))
        if below.acceleration_layer:
            raise FailedPreconditionError(f"overlaybd {layer} lies on an acceleration layer, which must be the top")
        return below

    # The upper directory of an overlay is its "/", so its owner is inherited from layer to layer.
    def _owner(self, lower_ids: Sequence[int]) -> tuple[int, int] | None:
        for lower in self.lowers(lower_ids)[:1]:
            status = lower.stat()
            return status.st_uid, status.st_gid
        return None


# Never ignores the original's metadata: beside an empty store, its images would be lost to containerd.
def _take_over(layout: Layout, default_mode: Mode) -> None:
    if not (layout.root / ORIGINAL_NAME).exists():
        return
    take_over: Callable[[Layout, Mode], int | None] | None = plugins.load("obdlab.roots", ORIGINAL_NAME)
    if take_over is None:
        raise RootError(f"{layout.root}: no installed package takes over {ORIGINAL_NAME} (obdlab.roots)")
    take_over(layout, default_mode)
