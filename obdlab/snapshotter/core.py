"""The snapshotter itself, without any wire: containerd's contract over plain layers and overlaybd images.

A snapshot is a row in the store and a directory. Slow work (attaching a device, counting files, deleting) happens
outside of the store's transactions; a row and its directory appear and change together, inside one.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.formats.oci import BLOB_DIGEST
from obdlab.observe.counters import Counter
from obdlab.snapshotter import fallback, overlaybd, turbo, writable
from obdlab.snapshotter.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    HasChildrenError,
    InvalidArgumentError,
    NotFoundError,
)
from obdlab.snapshotter.filters import compile_filters
from obdlab.snapshotter.layout import CONFIG_NAME
from obdlab.snapshotter.mounts import Mount, kernel_overlay_options, snapshot_mounts
from obdlab.snapshotter.owndevices import OwnDevices
from obdlab.snapshotter.quota import quota_asked
from obdlab.snapshotter.snapshots import ImageMounts, Snapshots
from obdlab.snapshotter.startrecording import StartRecordings
from obdlab.snapshotter.store import Kind, Reader, Snapshot, Usage
from obdlab.snapshotter.tracing import use_trace
from obdlab.snapshotter.writable import Mode, WritableDevice

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from obdlab.image.config import ImageConfig
    from obdlab.snapshotter.layout import Layout

logger = logging.getLogger(__name__)

#: Images and layers that are not read lazily, by reason.
FALLBACKS = Counter("snapshotter_fallbacks")

_LABEL_PATH = "labels."
_MAX_LOGGED = 300


class Snapshotter:
    """containerd's snapshot contract. All methods may be called from several threads."""

    def __init__(self, layout: Layout, images: ImageMounts, options: overlaybd.ImageOptions) -> None:
        """Open the store below a locked root and drop what a crash left half made."""
        self._snapshots = Snapshots(layout, images, options)
        self._own_devices = OwnDevices(self._snapshots)
        self._layout = layout
        self._images = images
        self._options = options
        #: Records first starts of images; its ``publish`` is the service's.
        self.starts = StartRecordings(self._snapshots, options.record_starts_s)
        self._store = self._snapshots.store
        self._locks = self._snapshots.locks
        self._overlay_options = kernel_overlay_options()
        images.on_fallback = self._note_fallback
        self._own_devices.recover()
        self.cleanup()

    @property
    def snapshots(self) -> Snapshots:
        """The rows and directories."""
        return self._snapshots

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Make an active snapshot and return how to mount it.

        With the labels of an overlaybd layer that is being pulled, the layer is committed at once under the target
        name. AlreadyExistsError then makes the client skip the download. A turboOCI layer's small blob is downloaded.
        """
        labels = overlaybd.of_client(labels)
        if turbo.is_turbo(labels):
            return self._create_turbo(key, parent, labels)
        if overlaybd.pull_target(labels):
            layer = overlaybd.remote_layer(labels, self._options)
            if layer is None:
                labels = self._pulled_whole(parent, labels, fallback.NOT_OVERLAYBD)
            elif layer.acceleration or not overlaybd.wants_download(labels):
                if self._commit_remote(key, parent, labels, layer):
                    raise AlreadyExistsError(f"target snapshot {overlaybd.pull_target(labels)!r} is ready")
                labels = self._pulled_whole(parent, labels, fallback.UNPROVEN)
        mode = self._own_devices.mode(parent, labels)
        if mode is not Mode.OVERLAYFS:
            return self._own_devices.create(mode, key, parent, labels, self.remove)
        if writable.LABEL_WRITABLE in labels:  # the snapshot gets an overlay all the same
            labels = {label: value for label, value in labels.items() if label != writable.LABEL_WRITABLE}
        return self._create(Kind.ACTIVE, key, parent, labels)

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Make a read-only snapshot and return how to mount it."""
        return self._create(Kind.VIEW, key, parent, overlaybd.of_client(labels))

    def mounts(self, key: str) -> list[Mount]:
        """Return how to mount an active snapshot or a view. Attaches its image's device again if that went away."""
        with self._store.read() as reader:
            snapshot = reader.get(key)
            if snapshot.kind is Kind.COMMITTED:
                raise FailedPreconditionError(f"snapshot {key!r} is neither active nor a view")
            own_id, *lower_ids = reader.chain(key)
            image = self._snapshots.image_below(reader, lower_ids)
        if self._layout.has_device(own_id):
            return self._own_devices.mount(snapshot, image)
        if turbo.is_turbo(snapshot.labels):
            return self._mounts(snapshot.kind, own_id, ())
        with self._mounted(image):
            return self._mounts(snapshot.kind, own_id, lower_ids)

    def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Turn the active snapshot ``key`` into the committed snapshot ``name``, with these labels.

        An overlaybd layer that the client downloaded itself becomes part of its image's device.
        """
        labels = overlaybd.of_client(labels)
        with self._store.read() as reader:
            own_id, *lower_ids = reader.chain(key)
        if self._layout.has_device(own_id):
            self._own_devices.commit(name, key, labels, own_id)
            return
        usage = self._layout.usage(own_id)
        with self._store.write() as writer:
            snapshot = writer.get(key)
            if snapshot.id != own_id:
                raise NotFoundError(f"snapshot {key!r} was removed and made again meanwhile")
            if snapshot.kind is not Kind.ACTIVE:
                raise FailedPreconditionError(f"snapshot {key!r} is not active (got {snapshot.kind.name.lower()})")
            fs = self._layout.fs(own_id)
            layer = turbo.turbo_layer(snapshot.labels) if turbo.is_turbo(snapshot.labels) else None
            is_plain = layer is None and not overlaybd.is_downloaded_layer(fs)
            if is_plain:
                turbo.check_not_turbo(fs, name)
            reason = snapshot.labels.get(fallback.LABEL_FALLBACK)
            if reason and is_plain:
                labels = {**labels, fallback.LABEL_FALLBACK: reason}
            writer.commit(key, name, labels, usage)
            if is_plain:
                return
            below = self._snapshots.config_below(lower_ids, f"layer {name!r}")
            directory = self._layout.directory(own_id)
            if layer is None:
                config = overlaybd.local_config(below, directory)
            else:
                labels_below = writer.by_id(lower_ids[0]).labels if lower_ids else {}
                config = turbo.turbo_config(below, layer, directory, self._options, labels_below)
            self._layout.delete(self._layout.block(own_id))  # left by a commit that was cut short
            writer.on_rollback(partial(self._layout.delete, self._layout.block(own_id)))
            config.save(self._layout.add_block(directory) / CONFIG_NAME)
        for image_id in lower_ids[:1]:
            self._release_unused(image_id)

    def remove(self, key: str) -> None:
        """Forget a snapshot without children and delete its files, unmounting its image first."""
        with self._store.read() as reader:
            snapshot = reader.get(key)
            snapshot_id = snapshot.id
            image = self._snapshots.image_below(reader, reader.chain(key)[1:])
        with self._locks.hold(snapshot_id):
            with self._store.read() as reader:
                if reader.count_children(snapshot_id):
                    raise HasChildrenError(key)
            device = WritableDevice.load(self._layout.writable(snapshot_id))
            if self._layout.is_image(snapshot_id):
                self._images.release(snapshot_id)
            with self._store.write() as writer:
                if writer.remove(key).id != snapshot_id:
                    raise NotFoundError(f"snapshot {key!r} was removed and made anew meanwhile")
            if device is not None:
                writable.drop(device.upper)  # a label may have put it outside the snapshot's directory
            if not self._options.async_remove:
                self._snapshots.delete(snapshot_id)
        if self._options.auto_remove_devices and image is not None and snapshot.kind is not Kind.COMMITTED:
            self._release_idle(image.id)

    def stat(self, key: str) -> Snapshot:
        """Return the row of a snapshot."""
        with self._store.read() as reader:
            return reader.get(key)

    def update(self, key: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Change the labels that ``paths`` name (``labels`` or ``labels.<key>``); without paths, replace all."""
        for path in paths:
            if path != "labels" and not (path.startswith(_LABEL_PATH) and path != _LABEL_PATH):
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
        """Return the disk space of a snapshot itself. An active snapshot is measured now."""
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
            self._snapshots.delete_directory(directory)

    def is_well(self) -> bool:
        """Return True if calls can be answered: the metadata can be read, and the devices' directories are safe."""
        try:
            self._images.check_place()
            return self._layout.snapshots.is_dir() and bool(self.counts())
        except (ObdlabError, OSError) as error:
            logger.error("not well: %s", error)
            return False

    def counts(self) -> dict[str, int]:
        """Return how many snapshots there are of each kind."""
        with self._store.read() as reader:
            return {kind.name.lower(): number for kind, number in reader.counts().items()}

    def close(self) -> None:
        """Stop using the root. Devices and mounts stay: containers run on them. Closing twice is allowed."""
        self.starts.close()
        self._store.close()
        self._layout.close()

    def _create(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        with self._store.read() as reader:
            image = self._image_for_new(reader, key, parent)
        quota = self._quota(kind, key, labels)
        # The lock keeps Remove from taking the image down before the new snapshot has become its child.
        recorded = kind is Kind.ACTIVE and not overlaybd.is_unpacked(key, labels)
        with self._mounted(image, labels, recorded=recorded), self._store.write() as writer:
            snapshot, lower_ids = self._snapshots.add(writer, kind, key, parent, labels, quota_bytes=quota)
            below = self._snapshots.image_below(writer, lower_ids)
            if (below and below.id) != (image and image.id):
                raise FailedPreconditionError(f"parent snapshot {parent!r} of {key!r} changed meanwhile, try again")
            return self._mounts(kind, snapshot.id, lower_ids)

    # The layer's blob is unpacked into an empty directory, not over the image below: nothing has to be mounted, and
    # files of the same names below are not in the way.
    def _create_turbo(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        layer = turbo.turbo_layer(labels)
        with self._store.write() as writer:
            snapshot, lower_ids = self._snapshots.add(writer, Kind.ACTIVE, key, parent, labels)
            self._snapshots.config_below(lower_ids, f"layer {layer.digest}")
            return self._mounts(Kind.ACTIVE, snapshot.id, ())

    @staticmethod
    def _pulled_whole(parent: str, labels: Mapping[str, str], reason: str) -> dict[str, str]:
        reference = overlaybd.image_reference(labels)[:_MAX_LOGGED]
        image = repr(reference) if reference else "that the client does not name"
        if reason == fallback.UNPROVEN:
            name = overlaybd.pull_target(labels)[:_MAX_LOGGED]
            text = f"layer {labels.get(BLOB_DIGEST)} does not prove the name {name!r}"
            logger.warning("image %s: %s, the client fetches and checks it", image, text)
        else:
            level = logging.INFO if parent else logging.WARNING  # once for an image
            logger.log(level, "image %s: not labelled as an overlaybd image, its layers are pulled whole", image)
        FALLBACKS.add(label=reason)
        return {**labels, fallback.LABEL_FALLBACK: reason}

    def _note_fallback(self, image_id: int, reason: str) -> None:
        FALLBACKS.add(label=reason)
        with self._store.write() as writer:
            snapshot = writer.by_id(image_id)
            writer.set_labels(snapshot.key, {**snapshot.labels, fallback.LABEL_FALLBACK: reason})

    # Containers get a quota; layers that are being unpacked do not.
    def _quota(self, kind: Kind, key: str, labels: Mapping[str, str]) -> int:
        if kind is not Kind.ACTIVE or overlaybd.is_unpacked(key, labels):
            return 0
        return quota_asked(labels, self._options.quota_bytes)

    def _image_for_new(self, reader: Reader, key: str, parent: str) -> Snapshot | None:
        # Fail before a device is attached for nothing. The write transaction checks all of it again.
        if reader.find(key) is not None:
            raise AlreadyExistsError(f"snapshot {key!r} already exists")
        if not parent or reader.find(parent) is None:
            return None
        return self._snapshots.image_below(reader, reader.chain(parent))

    @contextmanager
    def _mounted(
        self, image: Snapshot | None, labels: Mapping[str, str] | None = None, *, recorded: bool = False
    ) -> Iterator[None]:
        if image is None:
            yield
            return
        asked_s = time.monotonic()
        with self._images.admitted(image.id), self._locks.hold(image.id):
            if not self._layout.is_image(image.id):
                raise NotFoundError(f"image snapshot {image.key!r} was removed meanwhile")
            if labels is not None and not overlaybd.pull_target(labels):  # labels of a new container
                use_trace(self._snapshots, image, labels)
            with self.starts.recording(image) if recorded else nullcontext():
                self._images.mount(image.id, overlaybd.fs_spec(image.labels, self._options), asked_s)
            yield

    def _mounts(self, kind: Kind, own_id: int, lower_ids: Sequence[int]) -> list[Mount]:
        fs, work = self._layout.fs(own_id), self._layout.work(own_id)
        return snapshot_mounts(kind, fs, work, self._snapshots.lowers(lower_ids), self._overlay_options)

    # Returns False, having changed nothing, if the layer's digest does not prove its target name.
    def _commit_remote(self, key: str, parent: str, labels: Mapping[str, str], layer: overlaybd.RemoteLayer) -> bool:
        target = overlaybd.pull_target(labels)
        made: list[ImageConfig] = []

        def fill(directory: Path, own_id: int, lower_ids: Sequence[int]) -> None:
            below = self._snapshots.config_below(lower_ids, f"layer {layer.digest}")
            if layer.acceleration and below is None:
                raise FailedPreconditionError(f"acceleration layer {layer.digest} has no image below it")
            config = overlaybd.remote_config(below, layer, self._layout.directory(own_id), self._options)
            config.save(self._layout.add_block(directory) / CONFIG_NAME)
            made.append(config)

        if key == target:  # AlreadyExistsError would make the client believe that the layer is there
            raise InvalidArgumentError(f"snapshot {key!r}: a pull wants another name for its target")
        with self._store.write() as writer:
            if writer.find(target) is not None:
                raise AlreadyExistsError(f"target snapshot {target!r} is ready")
            below = writer.get(parent).labels if parent else None
            if not overlaybd.is_proven(layer, labels, below):
                return False
            committed_labels = {**labels, overlaybd.LABEL_REMOTE: overlaybd.REMOTE_SNAPSHOT}
            self._snapshots.add(writer, Kind.ACTIVE, key, parent, labels, fill)
            writer.commit(key, target, committed_labels, Usage())
        self._images.prime(made[-1])
        return True

    # Releases an image without containers.
    def _release_idle(self, image_id: int) -> None:
        with self._locks.hold(image_id):
            with self._store.read() as reader:
                if reader.has_containers(image_id):
                    return
            try:
                self._images.release(image_id)
            except ObdlabError as error:
                logger.info("device of layer %d stays: %s", image_id, error)

    # Unpacking a layer mounts the image below it. That mount is of no use once the layer is there.
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
