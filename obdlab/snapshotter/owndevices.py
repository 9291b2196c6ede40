"""Snapshots that write to a device of their own: made, mounted, committed to a layer, and recovered after a crash.

(overlaybd snapshotter, writable modes and commit. The files: :mod:`obdlab.snapshotter.writable`.)
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.image.config import SEALED_FILE, ImageConfig, UpperConfig
from obdlab.snapshotter import fallback, overlaybd, tracing, writable
from obdlab.snapshotter.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from obdlab.snapshotter.layout import CONFIG_NAME, WRITABLE_NAME
from obdlab.snapshotter.mounts import Mount, device_mounts
from obdlab.snapshotter.quota import quota_asked
from obdlab.snapshotter.store import Kind
from obdlab.snapshotter.writable import Mode, WritableDevice
from obdlab.system import mount

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from obdlab.snapshotter.snapshots import Snapshots
    from obdlab.snapshotter.store import Snapshot, Writer
    from obdlab.snapshotter.writable import FsSpec

logger = logging.getLogger(__name__)

_GB = 1 << 30


class OwnDevices:
    """The containers of a root that have their own devices."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self._layout = snapshots.layout
        self._store = snapshots.store
        self._images = snapshots.images
        self._locks = snapshots.locks
        self._options = snapshots.options

    def mode(self, parent: str, labels: Mapping[str, str]) -> Mode:
        """Return the mode of a new snapshot. On a plain layer it is always an overlay."""
        if overlaybd.pull_target(labels) or labels.get(writable.LABEL_TYPE) == "image":
            return Mode.OVERLAYFS
        mode = writable.mode_asked(labels, self._options.mode)
        if mode is Mode.OVERLAYFS or not parent:
            return mode
        with self._store.read() as reader:
            below = reader.find(parent)
        if below is None or not self._layout.is_image(below.id):
            return Mode.OVERLAYFS
        missing = fallback.missing_devices()
        if missing:
            logger.warning("container on %r: no block device for it here (%s), it gets an overlay", parent, missing)
            return Mode.OVERLAYFS
        return mode

    def create(
        self, mode: Mode, key: str, parent: str, labels: Mapping[str, str], remove: Callable[[str], None]
    ) -> list[Mount]:
        """Make a snapshot with its own device; if the device cannot be made, ``remove`` undoes it."""
        spec = overlaybd.fs_spec(labels, self._options)
        if not parent and spec.fs_type == "erofs":
            raise InvalidArgumentError(f"snapshot {key!r}: erofs cannot be written to")
        with self._store.write() as writer:
            snapshot, lower_ids = self._snapshots.add(
                writer,
                Kind.ACTIVE,
                key,
                parent,
                labels,
                lambda *made: self._fill(mode, labels, writer, spec, *made),
            )
            image = self._snapshots.image_below(writer, lower_ids)
        try:
            return self.mount(snapshot, image, make=not parent and not spec.made_here)
        except BaseException:
            with suppress(ObdlabError):  # report the first error
                remove(key)
            raise

    def mount(self, snapshot: Snapshot, image: Snapshot | None, *, make: bool = False) -> list[Mount]:
        """Attach the device if needed and return how to mount it."""
        asked_s = time.monotonic()
        spec = overlaybd.fs_spec(snapshot.labels, self._options, image.labels if image else None)
        with self._images.admitted(snapshot.id), self._locks.hold(snapshot.id):
            device = WritableDevice.load(self._layout.writable(snapshot.id))
            if device is None:
                raise NotFoundError(f"snapshot {snapshot.key!r} was removed or committed meanwhile")
            self._active_config(snapshot.id, device)
            path = self._images.mount(snapshot.id, spec, asked_s, device.mode, make=make)
            # The client mounts the device itself, so detect its file system each time: its user may have changed it.
            fs_type = mount.detect_fs(path)[0] if device.mode is Mode.DEV else spec.fs_type
            if fs_type == "erofs":
                raise FailedPreconditionError(f"snapshot {snapshot.key!r}: its image is EROFS, which is only read")
            return device_mounts(device.mode, self._layout.mountpoint(snapshot.id), path, fs_type)

    def commit(self, name: str, key: str, labels: Mapping[str, str], own_id: int) -> None:
        """Detach the device and make its layer the top of a new image."""
        with self._locks.hold(own_id):
            device = WritableDevice.load(self._layout.writable(own_id))
            with self._store.read() as reader:
                if device is None or reader.get(key).id != own_id:
                    raise NotFoundError(f"snapshot {key!r} was removed or committed meanwhile")
                if reader.find(name) is not None:  # check before the device is detached for nothing
                    raise AlreadyExistsError(f"snapshot {name!r} already exists")
            if not self._images.release(own_id):
                raise FailedPreconditionError(f"snapshot {key!r}: its device is still in use")
            active = self._active_config(own_id, device)
            sealed = self._layout.fs(own_id) / SEALED_FILE
            _drop_seal(sealed, device)
            writable.seal(device.upper, sealed)
            lowers = active.lowers[:-1] if active.acceleration_layer else active.lowers
            below = (
                replace(active, lowers=lowers, upper=UpperConfig(), acceleration_layer=False, record_trace_path="")
                if lowers
                else None
            )
            committed = overlaybd.local_config(below, self._layout.directory(own_id))
            kept = {label: value for label, value in labels.items() if label != writable.LABEL_WRITABLE}
            kept[writable.LABEL_COMMIT_PATH] = str(sealed)
            with self._store.write() as writer:
                writer.on_rollback(partial(sealed.unlink, missing_ok=True))
                writer.on_rollback(partial(active.save, self._layout.config(own_id)))
                committed.save(self._layout.config(own_id))
                writer.commit(key, name, kept, self._layout.usage(own_id))
            self._drop_upper(own_id, device)

    def recover(self) -> None:
        """Finish interrupted commits that are in the store, and undo the others.

        Opening the layer undoes its seal. A snapshot that cannot be recovered is logged: only its own calls fail.
        """
        with self._store.read() as reader:
            snapshots = [snapshot for snapshot in reader.all() if self._layout.has_device(snapshot.id)]
        for snapshot in snapshots:
            try:
                self._recover(snapshot)
            except (ObdlabError, OSError) as error:
                logger.error("snapshot %r: not recovered: %s", snapshot.key, error)

    def _recover(self, snapshot: Snapshot) -> None:
        device = WritableDevice.load(self._layout.writable(snapshot.id))
        sealed = self._layout.fs(snapshot.id) / SEALED_FILE
        if device is None:
            return
        if snapshot.kind is Kind.COMMITTED:
            self._drop_upper(snapshot.id, device)
        elif sealed.exists():
            self._active_config(snapshot.id, device)
            _drop_seal(sealed, device)

    # Returns the configuration of an active snapshot, made again after a commit that was neither finished nor undone.
    def _active_config(self, own_id: int, device: WritableDevice) -> ImageConfig:
        path = self._layout.config(own_id)
        config = ImageConfig.load(path)
        if config.upper.active:
            return config
        with self._store.read() as reader:
            snapshot = reader.by_id(own_id)
        if snapshot.kind is not Kind.ACTIVE:  # its layer is sealed for good
            kind = snapshot.kind.name.lower()
            raise FailedPreconditionError(f"snapshot {snapshot.key!r} is not active (got {kind})")
        own = str(self._layout.fs(own_id))
        lowers = tuple(lower for lower in config.lowers if lower.dir != own)
        active = replace(config, lowers=lowers, upper=device.upper)
        active.save(path)
        return active

    def _fill(
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
        if below is not None:
            below = replace(below, record_trace_path=tracing.trace_path(labels, self._options.trace_roots))
        size_gb = self._size_gb(labels, has_parent=below is not None)
        upper = writable.upper_for(labels, home / "block", size_gb, self._options.active_roots)
        block = self._layout.add_block(directory)
        # These files lie in the new directory until it gets its name.
        data, index = (
            block / path.name if path.parent == home / "block" else path
            for path in (Path(upper.data), Path(upper.index))
        )
        make_ext4 = below is None and spec.made_here
        writable.make_upper(data, index, upper.vsize_gb, sparse=self._options.sparse, make_ext4=make_ext4)
        writer.on_rollback(partial(data.unlink, missing_ok=True))
        writer.on_rollback(partial(index.unlink, missing_ok=True))
        WritableDevice(mode, upper).save(block / WRITABLE_NAME)
        overlaybd.writable_config(below, upper, home).save(block / CONFIG_NAME)

    # A device on nothing is limited by its own size; a device on an image has the image's size.
    def _size_gb(self, labels: Mapping[str, str], *, has_parent: bool) -> int:
        quota = quota_asked(labels, 0)
        if has_parent:
            if quota:
                raise FailedPreconditionError(
                    "disk quota: a writable device has the size of its image, which a quota cannot change "
                    "(wanted no quota, or a container that writes to an overlay)"
                )
            return 0
        size_gb = writable.size_gb(labels)
        if not quota:
            return size_gb
        if quota < _GB:
            raise InvalidArgumentError(f"disk quota: too small for a writable device (got {quota} bytes, wanted 1g)")
        return min(size_gb, quota // _GB)

    def _drop_upper(self, own_id: int, device: WritableDevice) -> None:
        writable.drop(device.upper)
        self._layout.writable(own_id).unlink()  # last: if interrupted before, the next start repeats all of it


def _drop_seal(sealed: Path, device: WritableDevice) -> None:
    if writable.is_only_copy(sealed, device.upper):
        raise FailedPreconditionError(f"{sealed}: the only copy of what the container wrote, it stays")
    sealed.unlink(missing_ok=True)
