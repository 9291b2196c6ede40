"""Overlaybd images as mounted devices: attached for an image's first container and shared by all its containers."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import DeviceError, ObdlabError, restored
from obdlab.snapshotter import fallback
from obdlab.snapshotter.errors import FailedPreconditionError
from obdlab.snapshotter.indexfetch import Priming
from obdlab.snapshotter.shares import Shares, registry_of
from obdlab.snapshotter.writable import MkfsError, Mode
from obdlab.system import abi, mount, programs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from obdlab.image.config import ImageConfig
    from obdlab.server.client import AttachedDevice, Devices
    from obdlab.snapshotter.layout import Layout
    from obdlab.snapshotter.writable import FsSpec

logger = logging.getLogger(__name__)

_MKFS_TIMEOUT_S = 120.0
_MS_RDONLY, _MS_REMOUNT, _MS_BIND = 1, 32, 4096


# A device that the kernel serves alone, from an unpacked disk, has no process (None).
@dataclass(frozen=True, slots=True)
class _Live:
    path: Path
    pidfd: int | None


@dataclass(frozen=True, slots=True)
class _Failure:
    cause: ObdlabError
    ended_s: float


class ImageDevices:
    """Mounts images at their snapshots' mount points.

    Different snapshots may be used from several threads at once; for one snapshot the caller serialises calls.
    """

    def __init__(self, layout: Layout, devices: Devices) -> None:
        """Serve images below ``layout``."""
        self._layout = layout
        self._devices = devices
        self._live: dict[int, _Live] = {}
        self._failures: dict[int, _Failure] = {}
        self._host_start: threading.Thread | None = None
        self._guard = threading.Lock()
        self._attaching: set[int] = set()
        self._priming = Priming(devices, self._is_started)
        self._shares = Shares()
        #: Called with the snapshot id of an image that is not read lazily, and the reason.
        self.on_fallback: Callable[[int, str], None] = lambda _, __: None

    def start_host(self) -> None:
        """Start the device host early, so that the first container need not wait for it. Returns at once."""
        self._host_start = threading.Thread(target=self._start_host, name="start-host")
        self._host_start.start()

    def check_place(self) -> None:
        """Raise DeviceError if the run directory or the cache directory is refused."""
        self._devices.check_place()

    def prime(self, image: ImageConfig) -> None:
        """Fetch the first reads of an image whose top layer was pulled, in the background, if the settings allow it.

        Returns at once.
        """
        if self._devices.settings.index_at_pull:
            self._priming.add(image)

    @contextmanager
    def admitted(self, snapshot_id: int) -> Iterator[None]:
        """Count the caller among those that may wait for the image's registry, for the block.

        To be held around the lock of the snapshot, as callers wait for that lock, too. Raises BusyRegistryError.
        """
        with self._guard:
            is_there = snapshot_id in self._live
        registry = "" if is_there else self._registry_of(snapshot_id)
        if not registry:
            yield
            return
        with self._shares.call(registry):
            yield

    def mount(
        self, snapshot_id: int, spec: FsSpec, asked_s: float, mode: Mode = Mode.OVERLAYFS, *, make: bool = False
    ) -> Path:
        """Attach the snapshot's device if needed, mount its file system and return the device.

        An image is mounted read-only. A container's own device is mounted writable or, in mode ``dev``, not at all;
        ``make`` makes its file system first. Does nothing if device and mount are there; mounts again after a reboot
        or the death of the device's server. A failed attempt leaves nothing behind. Raises ObdlabError with the
        cause, also for callers whose ``asked_s`` (monotonic) is before the end of a failed attempt: if each tried
        again, they would wait for the same registry one after the other.
        """
        target = self._layout.mountpoint(snapshot_id)
        live = self._live_device(snapshot_id, None if mode is Mode.DEV else target)
        if live is not None:
            return live
        failure = self._failures.get(snapshot_id)
        if failure is not None and asked_s <= failure.ended_s:
            raise restored(failure.cause.code, str(failure.cause)) from failure.cause
        with self._guard:
            self._attaching.add(snapshot_id)
        try:
            registry = self._registry_of(snapshot_id)
            with self._shares.attach(registry, self._devices.settings.open_deadline_s) if registry else nullcontext():
                path = self._mount_anew(snapshot_id, target, spec, mode, make=make)
        except ObdlabError as error:
            self._failures[snapshot_id] = _Failure(error, time.monotonic())
            raise
        finally:
            with self._guard:
                self._attaching.discard(snapshot_id)
        self._failures.pop(snapshot_id, None)
        return path

    def _is_started(self, image: ImageConfig) -> bool:
        with self._guard:
            started = self._attaching | set(self._live)
        return image.lowers[-1].dir in {str(self._layout.fs(snapshot_id)) for snapshot_id in started}

    def _mount_anew(self, snapshot_id: int, target: Path, spec: FsSpec, mode: Mode, *, make: bool) -> Path:
        if mode is Mode.OVERLAYFS:
            cause = fallback.missing_devices(self._devices.settings.device_kind)
            if cause or self._layout.unpacked(snapshot_id).exists():
                return self._mount_unpacked(snapshot_id, target, cause)
        try:
            device = self._attach(snapshot_id, target)
        except ObdlabError as error:
            if not fallback.is_without_ranges(error):
                raise
            config = self._layout.config(snapshot_id)
            logger.warning("%s: not read lazily, its blobs are fetched whole: %s", config, error)
            fallback.fetch_blobs(config, self._devices.settings)
            self.on_fallback(snapshot_id, fallback.NO_RANGES)
            device = self._attach(snapshot_id, target)
        self._mount_device(device, snapshot_id, spec, mode, make=make)
        return device.path

    def _mount_unpacked(self, snapshot_id: int, target: Path, cause: str) -> Path:
        unpacked = self._layout.unpacked(snapshot_id)
        if not unpacked.exists():
            config = self._layout.config(snapshot_id)
            logger.warning("%s: not read lazily, its files are unpacked: no block devices here (%s)", config, cause)
            fallback.unpack(config, unpacked, self._devices.settings)
            self.on_fallback(snapshot_id, fallback.NO_DEVICES)
        if _identity(target) != _identity(unpacked):
            try:
                abi.mount(str(unpacked), target, "", _MS_BIND, "")
                abi.mount(str(unpacked), target, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | mount.MS_IMAGE, "")
            except OSError as error:
                _unmount_all(target)
                raise DeviceError(f"{target}: cannot be mounted from {unpacked} ({error.strerror})") from error
        return unpacked

    def release(self, snapshot_id: int) -> bool:
        """Unmount the image and detach its device. Return True if the device is gone.

        A device that only other mount namespaces hold goes when they release it. Raises FailedPreconditionError,
        having changed nothing, while this namespace still uses the image.
        """
        target = self._layout.mountpoint(snapshot_id)
        devices = self._devices_of(snapshot_id)
        unpacked = self._layout.unpacked(snapshot_id)
        if unpacked.exists():
            users = _overlay_users(target) + _bind_users(target, unpacked)
        else:
            users = _users(target, [device.path for device in devices])
        if users:
            raise FailedPreconditionError(f"image snapshot is in use: mounted on {', '.join(users)}")
        try:
            while mount.unmount(target):
                pass
        except DeviceError as error:
            raise FailedPreconditionError(f"image snapshot is in use: {error}") from error
        gone = True
        for device in devices:
            if not self._devices.release(device.device_id):
                logger.info("device %s stays until its last user is gone", device.device_id)
                gone = False
        self._forget(snapshot_id)
        self._failures.pop(snapshot_id, None)
        return gone

    # Returns '' if the registry is not needed.
    def _registry_of(self, snapshot_id: int) -> str:
        config = self._layout.config(snapshot_id)
        return "" if self._devices.is_unpacked(config) else registry_of(config)

    def _start_host(self) -> None:
        try:
            self._devices.start_host()
        except ObdlabError as error:  # the first mount fails with the same cause and reports it to its client
            logger.warning("device host: %s", error)

    def _attach(self, snapshot_id: int, target: Path) -> AttachedDevice:
        config = self._layout.config(snapshot_id)
        if self._host_start is not None and not self._devices.is_unpacked(config):
            self._host_start.join()  # two starts at a time would take twice as long; the start has a deadline
        for device in self._devices_of(snapshot_id):
            if device.alive:
                return self._devices.attach(config, device.device_id)
        _unmount_all(target)
        # A dead device keeps its name until its last user is gone; that user gets I/O errors in any case. A new
        # container gets a device with another name.
        taken = {device.device_id for device in self._devices_of(snapshot_id)}
        name = f"{self._layout.short_name}-{snapshot_id}"
        names = (name, *(f"{name}.{number}" for number in range(1, len(taken) + 1)))
        return self._devices.attach(config, next(each for each in names if each not in taken))

    def _devices_of(self, snapshot_id: int) -> list[AttachedDevice]:
        config = self._layout.config(snapshot_id)
        return [device for device in self._devices.list() if device.config == config]

    def _mount_device(
        self, device: AttachedDevice, snapshot_id: int, spec: FsSpec, mode: Mode, *, make: bool
    ) -> None:
        target = self._layout.mountpoint(snapshot_id)
        try:
            if mode is not Mode.OVERLAYFS:
                if device.read_only:
                    raise DeviceError(f"{device.path}: came up read-only, a container was to write to it")
                self._layout.backstore_mark(snapshot_id).write_text(str(device.path))
            if make:
                _make_file_system(spec, device.path)
            if mode is not Mode.DEV:
                options = spec.writable_options() if mode is Mode.DIR else spec.mount_options or ""
                self._mount(device, target, options, read_only=mode is Mode.OVERLAYFS)
            self._remember(snapshot_id, device)
        except ObdlabError:
            self._undo(device.device_id, target)
            raise

    def _mount(self, device: AttachedDevice, target: Path, options: str, *, read_only: bool) -> None:
        entries = mount.mounts_at(target)
        if entries and entries[-1].source == str(device.path):
            return
        if entries:
            logger.warning("%s: was mounted from %s, which is gone; mounting again", target, entries[-1].source)
            _unmount_all(target)
        self._devices.mount(device, target, options=options, read_only=read_only)

    def _undo(self, device_id: str, target: Path) -> None:
        try:
            _unmount_all(target)
            self._devices.release(device_id)
        except ObdlabError:
            logger.exception("device %s stays after a failed mount", device_id)

    def _live_device(self, snapshot_id: int, target: Path | None) -> Path | None:
        with self._guard:
            live = self._live.get(snapshot_id)
        if live is None:
            return None
        # Check the server first: stat on a mount without a server would hang.
        if live.pidfd is not None and not _alive(live.pidfd):
            self._forget(snapshot_id)
            return None
        try:
            number = live.path.stat().st_rdev
            return live.path if target is None or target.stat().st_dev == number else None
        except OSError:
            return None

    def _remember(self, snapshot_id: int, device: AttachedDevice) -> None:
        live = _Live(device.path, self._pidfd_of(device))
        self._forget(snapshot_id)
        with self._guard:
            self._live[snapshot_id] = live

    def _pidfd_of(self, device: AttachedDevice) -> int | None:
        try:
            return None if device.graduated else os.pidfd_open(device.pid)
        except ProcessLookupError as error:
            now = next((each for each in self._devices.list() if each.device_id == device.device_id), None)
            if now is not None and now.graduated:  # since it was attached
                return None
            raise DeviceError(f"{device.path}: its server (process {device.pid}) died") from error

    def _forget(self, snapshot_id: int) -> None:
        with self._guard:
            live = self._live.pop(snapshot_id, None)
        if live is not None and live.pidfd is not None:
            os.close(live.pidfd)


def _make_file_system(spec: FsSpec, device: Path) -> None:
    command = spec.mkfs_command(device)
    try:
        programs.run(command, _MKFS_TIMEOUT_S)
    except programs.ProgramError as error:
        raise MkfsError(f"{' '.join(command)}: {error}") from error


# Overlays keep a lower file system alive without its mount: unmounting would succeed and only hide the use.
def _users(target: Path, paths: Sequence[Path]) -> list[str]:
    entries = mount.mounts()
    devices = {entry.device for entry in entries if entry.mountpoint == target}
    sources = {str(path) for path in paths}  # devices mounted by the client itself
    return [
        str(entry.mountpoint)
        for entry in entries
        if ((entry.device in devices or entry.source in sources) and entry.mountpoint != target)
        or (entry.fs_type == "overlay" and str(target) in _lowers(entry.super_options))
    ]


def _overlay_users(target: Path) -> list[str]:
    return [
        str(entry.mountpoint)
        for entry in mount.mounts()
        if entry.fs_type == "overlay" and str(target) in _lowers(entry.super_options)
    ]


# A bind-mounted directory has the device number of its whole file system, so its mounts are found by identity.
def _bind_users(target: Path, directory: Path) -> list[str]:
    wanted = _identity(directory)
    number = directory.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    points = [entry.mountpoint for entry in mount.mounts() if entry.device == device and entry.mountpoint != target]
    return [str(point) for point in points if _identity(point) == wanted]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _lowers(super_options: str) -> list[str]:
    lowers = [option.partition("=")[2] for option in super_options.split(",") if option.startswith("lowerdir")]
    return [directory for lower in lowers for directory in lower.split(":")]


def _unmount_all(target: Path) -> None:
    while mount.unmount(target, lazy=True):
        pass


def _alive(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)
