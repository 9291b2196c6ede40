"""The snapshotter itself, without any wire: containerd's contract over plain layers and overlaybd images.

A snapshot is a row in the store and a directory. Whatever takes long (attaching a device, counting files, deleting)
happens outside of the store's transactions; a row and its directory appear and change together, inside one.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from obdlab.errors import ObdlabError
from obdlab.image.config import ImageConfig, UpperConfig
from obdlab.snapshotter import overlaybd, writable
from obdlab.snapshotter.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from obdlab.snapshotter.filters import compile_filters
from obdlab.snapshotter.layout import CONFIG_NAME, WRITABLE_NAME
from obdlab.snapshotter.mounts import Mount, device_mounts, kernel_overlay_options, snapshot_mounts
from obdlab.snapshotter.store import Kind, Reader, Snapshot, Store, Usage, Writer
from obdlab.snapshotter.writable import Mode, WritableDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from obdlab.snapshotter.layout import Layout
    from obdlab.snapshotter.writable import FsSpec

logger = logging.getLogger(__name__)

_LABEL_PATH = "labels."


class ImageMounts(Protocol):
    """What mounts overlaybd images (``obdlab.snapshotter.images.ImageDevices``)."""

    def expect(self) -> None:
        """Get ready to mount: an image has been pulled."""

    def mount(
        self, snapshot_id: int, spec: FsSpec, asked_s: float, mode: Mode = Mode.OVERLAYFS, *, make: bool = False
    ) -> Path:
        """Have the snapshot's device attached and mounted as ``mode`` wants it, as asked for at ``asked_s``."""

    def release(self, snapshot_id: int) -> bool:
        """Unmount and detach, telling whether the device is gone, or raise FailedPreconditionError if it is used."""


class Snapshotter:
    """containerd's snapshot contract. All methods may be called from several threads."""

    def __init__(self, layout: Layout, images: ImageMounts, options: overlaybd.ImageOptions) -> None:
        """Open the store below a locked root and drop what a crash left half made."""
        self._layout = layout
        self._images = images
        self._options = options
        self._store = Store(layout.metadata)
        self._locks = _KeyedLocks()
        self._overlay_options = kernel_overlay_options()
        self._recover()
        self.cleanup()

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Make an active snapshot and return how to mount it.

        With the labels of an overlaybd layer that is being pulled, the layer is committed at once under the name
        asked for and AlreadyExistsError tells the client that there is nothing to download.
        """
        if overlaybd.pull_target(labels):
            layer = overlaybd.remote_layer(labels)
            if layer is not None and (layer.acceleration or not overlaybd.wants_download(labels)):
                self._commit_remote(key, parent, labels, layer)
                self._images.expect()
                raise AlreadyExistsError(f"target snapshot {overlaybd.pull_target(labels)!r} is ready")
        mode = self._mode(parent, labels)
        if mode is not Mode.OVERLAYFS:
            return self._create_writable(mode, key, parent, labels)
        if writable.LABEL_WRITABLE in labels:  # it does not become one
            labels = {label: value for label, value in labels.items() if label != writable.LABEL_WRITABLE}
        return self._create(Kind.ACTIVE, key, parent, labels)

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Make a read-only snapshot and return how to mount it."""
        return self._create(Kind.VIEW, key, parent, labels)

    def mounts(self, key: str) -> list[Mount]:
        """Return how to mount an active snapshot or a view, bringing its image's device back if it went away."""
        with self._store.read() as reader:
            snapshot = reader.get(key)
            if snapshot.kind is Kind.COMMITTED:
                raise FailedPreconditionError(f"snapshot {key!r} is neither active nor a view")
            own_id, *lower_ids = reader.chain(key)
            image = self._image_below(reader, lower_ids)
        if self._layout.has_device(own_id):
            return self._mount_writable(snapshot, image)
        with self._mounted(image):
            return self._mounts(snapshot.kind, own_id, lower_ids)

    def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Turn the active snapshot ``key`` into the committed snapshot ``name``, with these labels.

        An overlaybd layer that a client downloaded, knowing no other way, becomes part of its image's device.
        """
        with self._store.read() as reader:
            own_id, *lower_ids = reader.chain(key)
        if self._layout.has_device(own_id):
            self._commit_writable(name, key, labels, own_id)
            return
        usage = self._layout.usage(own_id)
        with self._store.write() as writer:
            writer.commit(key, name, labels, usage)
            if not overlaybd.is_downloaded_layer(self._layout.fs(own_id)):
                return
            config = overlaybd.local_config(
                self._config_below(lower_ids, f"layer {name!r}"), self._layout.directory(own_id)
            )
            self._layout.delete(self._layout.block(own_id))  # of a commit that was cut short
            writer.on_rollback(partial(self._layout.delete, self._layout.block(own_id)))
            config.save(self._layout.add_block(self._layout.directory(own_id)) / CONFIG_NAME)
        for image_id in lower_ids[:1]:
            self._release_unused(image_id)

    def remove(self, key: str) -> None:
        """Forget a snapshot without children and delete its files, unmounting its image first."""
        with self._store.read() as reader:
            snapshot = reader.get(key)
            snapshot_id = snapshot.id
            image = self._image_below(reader, reader.chain(key)[1:])
        with self._locks.hold(snapshot_id):
            with self._store.read() as reader:
                if reader.count_children(snapshot_id):
                    raise FailedPreconditionError(f"snapshot {key!r} has children")
            device = WritableDevice.load(self._layout.writable(snapshot_id))
            if self._layout.is_image(snapshot_id):
                self._images.release(snapshot_id)
            with self._store.write() as writer:
                if writer.remove(key).id != snapshot_id:
                    raise NotFoundError(f"snapshot {key!r} was removed and made anew meanwhile")
            if device is not None:
                writable.drop(device.upper)  # it may lie elsewhere
            if not self._options.async_remove:
                self._layout.delete(self._layout.directory(snapshot_id))
        if self._options.auto_remove_devices and image is not None and snapshot.kind is not Kind.COMMITTED:
            self._release_idle(image.id)

    def stat(self, key: str) -> Snapshot:
        """Return what is known of a snapshot."""
        with self._store.read() as reader:
            return reader.get(key)

    def update(self, key: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Change labels: those named by ``paths`` (``labels`` or ``labels.<key>``), or all if there are none."""
        for path in paths:
            if path != "labels" and not path.startswith(_LABEL_PATH):
                raise InvalidArgumentError(f"snapshot {key!r}: only labels can be updated (got {path!r})")
        with self._store.write() as writer:
            result = dict(writer.get(key).labels)
            for path in paths or ("labels",):
                if path == "labels":
                    result = dict(labels)
                else:
                    label = path.removeprefix(_LABEL_PATH)
                    result[label] = labels.get(label, "")
            return writer.set_labels(key, result)

    def walk(self, filters: Sequence[str] = ()) -> list[Snapshot]:
        """Return the snapshots that match any of the filters, oldest first."""
        matches = compile_filters(filters)
        with self._store.read() as reader:
            snapshots = reader.all()
        return [snapshot for snapshot in snapshots if matches(snapshot)]

    def usage(self, key: str) -> Usage:
        """Return the disk space of a snapshot itself; that of an active one is measured now."""
        snapshot = self.stat(key)
        if snapshot.kind is Kind.ACTIVE or self._layout.is_image(snapshot.id):
            return self._layout.usage(snapshot.id)
        return snapshot.usage

    def cleanup(self) -> None:
        """Delete directories that belong to no snapshot."""
        with self._store.write() as writer:  # directories get their rows under this lock
            leftovers = self._layout.unknown(writer.ids())
        for directory in leftovers:
            logger.info("deleting leftover %s", directory)
            self._layout.delete(directory)

    def close(self) -> None:
        """Stop using the root. Devices and mounts stay: containers run on them. Closing twice is allowed."""
        self._store.close()
        self._layout.close()

    def _create(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        with self._store.read() as reader:
            image = self._image_for_new(reader, key, parent)
        # The lock keeps Remove from taking the image down before the new snapshot has become its child.
        with self._mounted(image), self._store.write() as writer:
            snapshot, lower_ids = self._add(writer, kind, key, parent, labels)
            if self._image_below(writer, lower_ids) != image:
                raise FailedPreconditionError(f"parent snapshot {parent!r} of {key!r} changed meanwhile, try again")
            return self._mounts(kind, snapshot.id, lower_ids)

    def _image_for_new(self, reader: Reader, key: str, parent: str) -> Snapshot | None:
        # Fail before a device is attached for nothing; the write transaction checks all of it again.
        if reader.find(key) is not None:
            raise AlreadyExistsError(f"snapshot {key!r} already exists")
        if not parent or reader.find(parent) is None:
            return None
        return self._image_below(reader, reader.chain(parent))

    def _image_below(self, reader: Reader, lower_ids: Sequence[int]) -> Snapshot | None:
        for lower_id in lower_ids:
            if self._layout.is_image(lower_id):
                return reader.by_id(lower_id)
        return None

    @contextmanager
    def _mounted(self, image: Snapshot | None) -> Iterator[None]:
        if image is None:
            yield
            return
        asked_s = time.monotonic()
        with self._locks.hold(image.id):
            if not self._layout.is_image(image.id):
                raise NotFoundError(f"image snapshot {image.key!r} was removed meanwhile")
            self._images.mount(image.id, overlaybd.fs_spec(image.labels, self._options), asked_s)
            yield

    def _mode(self, parent: str, labels: Mapping[str, str]) -> Mode:
        if overlaybd.pull_target(labels) or labels.get(writable.LABEL_TYPE) == "image":
            return Mode.OVERLAYFS
        mode = writable.mode_asked(labels, self._options.mode)
        if mode is Mode.OVERLAYFS or not parent:
            return mode
        with self._store.read() as reader:
            below = reader.find(parent)
        is_image = below is not None and self._layout.is_image(below.id)
        return mode if is_image else Mode.OVERLAYFS

    def _create_writable(self, mode: Mode, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        spec = overlaybd.fs_spec(labels, self._options)
        if not parent and spec.fs_type == "erofs":
            raise InvalidArgumentError(f"snapshot {key!r}: erofs cannot be written to")
        with self._store.write() as writer:
            snapshot, lower_ids = self._add(
                writer,
                Kind.ACTIVE,
                key,
                parent,
                labels,
                lambda *made: self._fill_writable(mode, labels, writer, spec, *made),
            )
            image = self._image_below(writer, lower_ids)
        try:
            return self._mount_writable(snapshot, image, make=not parent and not spec.made_here)
        except BaseException:
            with suppress(ObdlabError):  # what went wrong before matters more
                self.remove(key)
            raise

    def _fill_writable(
        self,
        mode: Mode,
        labels: Mapping[str, str],
        writer: Writer,
        spec: FsSpec,
        directory: Path,
        own_id: int,
        lower_ids: Sequence[int],
    ) -> None:
        home = self._layout.directory(own_id)
        below = ImageConfig.load(self._layout.config(lower_ids[0])) if lower_ids else None
        upper = writable.upper_for(labels, home / "block", has_parent=below is not None)
        block = self._layout.add_block(directory)
        # In its own place until the directory gets its name.
        data, index = (
            block / path.name if path.parent == home / "block" else path
            for path in (Path(upper.data), Path(upper.index))
        )
        if writable.make_upper(
            data,
            index,
            upper.vsize_gb,
            sparse=self._options.sparse,
            make_ext4=below is None and spec.made_here,
        ):
            writer.on_rollback(partial(data.unlink, missing_ok=True))
            writer.on_rollback(partial(index.unlink, missing_ok=True))
        WritableDevice(mode, upper).save(block / WRITABLE_NAME)
        overlaybd.writable_config(below, upper, home).save(block / CONFIG_NAME)

    def _mount_writable(self, snapshot: Snapshot, image: Snapshot | None, *, make: bool = False) -> list[Mount]:
        asked_s = time.monotonic()
        spec = overlaybd.fs_spec(snapshot.labels, self._options, image.labels if image else None)
        with self._locks.hold(snapshot.id):
            device = WritableDevice.load(self._layout.writable(snapshot.id))
            if device is None:
                raise NotFoundError(f"snapshot {snapshot.key!r} was removed or committed meanwhile")
            path = self._images.mount(snapshot.id, spec, asked_s, device.mode, make=make)
            return device_mounts(device.mode, self._layout.mountpoint(snapshot.id), path, spec.fs_type)

    def _commit_writable(self, name: str, key: str, labels: Mapping[str, str], own_id: int) -> None:
        with self._locks.hold(own_id):
            device = WritableDevice.load(self._layout.writable(own_id))
            with self._store.read() as reader:
                if device is None or reader.get(key).id != own_id:
                    raise NotFoundError(f"snapshot {key!r} was removed or committed meanwhile")
                if reader.find(name) is not None:  # before the device is taken away for nothing
                    raise AlreadyExistsError(f"snapshot {name!r} already exists")
            if not self._images.release(own_id):
                raise FailedPreconditionError(f"snapshot {key!r}: its device is still in use")
            sealed = self._layout.fs(own_id) / writable.SEALED_FILE
            sealed.unlink(missing_ok=True)
            writable.seal(device.upper, sealed)
            active = ImageConfig.load(self._layout.config(own_id))
            lowers = active.lowers[:-1] if active.acceleration_layer else active.lowers
            below = replace(active, lowers=lowers, upper=UpperConfig(), acceleration_layer=False) if lowers else None
            committed = overlaybd.local_config(below, self._layout.directory(own_id))
            kept = {label: value for label, value in labels.items() if label != writable.LABEL_WRITABLE}
            kept[writable.LABEL_COMMIT_PATH] = str(sealed)
            with self._store.write() as writer:
                writer.on_rollback(partial(sealed.unlink, missing_ok=True))
                writer.on_rollback(partial(active.save, self._layout.config(own_id)))
                committed.save(self._layout.config(own_id))
                writer.commit(key, name, kept, self._layout.usage(own_id))
            self._drop_upper(own_id, device)

    def _drop_upper(self, own_id: int, device: WritableDevice) -> None:
        writable.drop(device.upper)
        self._layout.writable(own_id).unlink()  # last: until then the next start does all of it again

    # What a crash left of commits: those in the store are finished, others undone. Opening its layer undoes the seal.
    def _recover(self) -> None:
        with self._store.read() as reader:
            snapshots = [snapshot for snapshot in reader.all() if self._layout.has_device(snapshot.id)]
        for snapshot in snapshots:
            try:
                device = WritableDevice.load(self._layout.writable(snapshot.id))
            except FailedPreconditionError as error:  # its own calls fail with this; the others' must not
                logger.error("snapshot %r: %s", snapshot.key, error)
                continue
            sealed = self._layout.fs(snapshot.id) / writable.SEALED_FILE
            if device is None:
                continue
            if snapshot.kind is Kind.COMMITTED:
                self._drop_upper(snapshot.id, device)
            elif sealed.exists():
                config = ImageConfig.load(self._layout.config(snapshot.id))
                if not config.upper.active:
                    lowers = config.lowers[:-1]
                    replace(config, lowers=lowers, upper=device.upper).save(self._layout.config(snapshot.id))
                sealed.unlink()

    def _mounts(self, kind: Kind, own_id: int, lower_ids: Sequence[int]) -> list[Mount]:
        fs, work = self._layout.fs(own_id), self._layout.work(own_id)
        return snapshot_mounts(kind, fs, work, self._lowers(lower_ids), self._overlay_options)

    def _lowers(self, lower_ids: Sequence[int]) -> list[Path]:
        # An image's device shows the layers below it too, so it ends the list.
        lowers: list[Path] = []
        for lower_id in lower_ids:
            if self._layout.is_image(lower_id):
                lowers.append(self._layout.mountpoint(lower_id))
                break
            lowers.append(self._layout.fs(lower_id))
        return lowers

    def _add(
        self,
        writer: Writer,
        kind: Kind,
        key: str,
        parent: str,
        labels: Mapping[str, str],
        fill: Callable[[Path, int, Sequence[int]], None] | None = None,
    ) -> tuple[Snapshot, list[int]]:
        snapshot = writer.create(kind, key, parent, labels)
        lower_ids = list(writer.chain(key)[1:])
        directory = self._layout.new_directory(kind, self._owner(lower_ids))
        for path in (directory, self._layout.directory(snapshot.id)):
            writer.on_rollback(partial(self._layout.delete, path))
        self._layout.write_image_reference(directory, overlaybd.image_reference(labels))
        if fill is not None:
            fill(directory, snapshot.id, lower_ids)
        self._layout.adopt(directory, snapshot.id)
        return snapshot, lower_ids

    def _owner(self, lower_ids: Sequence[int]) -> tuple[int, int] | None:
        # In an overlay the upper directory is what "/" looks like, so its owner carries on from layer to layer.
        for lower in self._lowers(lower_ids)[:1]:
            status = lower.stat()
            return status.st_uid, status.st_gid
        return None

    def _commit_remote(self, key: str, parent: str, labels: Mapping[str, str], layer: overlaybd.RemoteLayer) -> None:
        target = overlaybd.pull_target(labels)

        def fill(directory: Path, own_id: int, lower_ids: Sequence[int]) -> None:
            below = self._config_below(lower_ids, f"layer {layer.digest}")
            if layer.acceleration:
                if below is None:
                    raise FailedPreconditionError(f"acceleration layer {layer.digest} has no image below it")
                logger.warning("layer %s: its list of what to fetch ahead has no effect yet", layer.digest)
            config = overlaybd.remote_config(below, layer, self._layout.directory(own_id), self._options)
            config.save(self._layout.add_block(directory) / CONFIG_NAME)

        with self._store.write() as writer:
            if writer.find(target) is not None:
                raise AlreadyExistsError(f"target snapshot {target!r} is ready")
            committed_labels = {**labels, overlaybd.LABEL_REMOTE: overlaybd.REMOTE_SNAPSHOT}
            self._add(writer, Kind.ACTIVE, key, parent, labels, fill)
            writer.commit(key, target, committed_labels, Usage())

    def _config_below(self, lower_ids: Sequence[int], layer: str) -> ImageConfig | None:
        if not lower_ids:
            return None
        if not self._layout.is_image(lower_ids[0]):
            raise FailedPreconditionError(f"overlaybd {layer} lies on a layer that is none")
        below = ImageConfig.load(self._layout.config(lower_ids[0]))
        if below.acceleration_layer:
            raise FailedPreconditionError(f"overlaybd {layer} lies on an acceleration layer, which must be the top")
        return below

    # Of an image that no container is on any more.
    def _release_idle(self, image_id: int) -> None:
        with self._locks.hold(image_id):
            with self._store.read() as reader:
                if reader.has_containers(image_id):
                    return
            try:
                self._images.release(image_id)
            except ObdlabError as error:
                logger.info("device of layer %d stays: %s", image_id, error)

    # Unpacking a layer mounts the image below it, which nobody wants once the layer is there.
    def _release_unused(self, image_id: int) -> None:
        with self._locks.hold(image_id):
            with self._store.read() as reader:
                children = reader.count_children(image_id)
            if children > 1:
                return
            try:
                self._images.release(image_id)
            except ObdlabError as error:  # the commit stands
                logger.info("device of layer %d stays: %s", image_id, error)


class _KeyedLocks:
    """One lock per snapshot id, there as long as somebody wants it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[int, tuple[threading.Lock, int]] = {}

    @contextmanager
    def hold(self, key: int) -> Iterator[None]:
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
