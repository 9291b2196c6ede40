"""Overlaybd images as mounted devices: attached when a container first wants one, shared by all that do."""

from __future__ import annotations

import hashlib
import logging
import os
import select
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices import mount
from obdlab.errors import DeviceError, ObdlabError
from obdlab.snapshotter.errors import FailedPreconditionError

if TYPE_CHECKING:
    from obdlab.service.client import AttachedDevice, DeviceService
    from obdlab.snapshotter.layout import Layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Live:
    path: Path
    pidfd: int


@dataclass(frozen=True, slots=True)
class _Failure:
    cause: str
    ended_s: float


class ImageDevices:
    """Mounts images at their snapshots' mount points.

    Calls for different snapshots may come from several threads at once; for one snapshot the caller takes turns.
    """

    def __init__(self, layout: Layout, devices: DeviceService, *, start_host_early: bool = False) -> None:
        """Serve images below ``layout``. ``start_host_early`` spares the first container the device host's start."""
        self._layout = layout
        self._devices = devices
        # Names of devices differ between the roots of a host.
        self._prefix = hashlib.sha256(os.fsencode(layout.root)).hexdigest()[:8]
        self._live: dict[int, _Live] = {}
        self._failures: dict[int, _Failure] = {}
        self._start_host_early = start_host_early
        self._host_start: threading.Thread | None = None
        self._guard = threading.Lock()

    def expect(self) -> None:
        """Have everything running that a first mount needs; called when an image has been pulled. Returns at once."""
        with self._guard:
            if self._start_host_early and self._host_start is None:
                self._host_start = threading.Thread(target=self._start_host, name="start-host")
                self._host_start.start()

    def mount(self, snapshot_id: int, fs_spec: str, asked_s: float) -> None:
        """Have the image's device attached and its file system mounted, read-only.

        Does nothing if that is so; brings the mount back after a reboot or the death of the device's server. If it
        fails, nothing of the attempt stays. Raises ObdlabError with the cause, also to callers who ``asked_s``
        (monotonic) before an attempt failed: each trying anew, they would wait for the same registry in a row.
        """
        target = self._layout.mountpoint(snapshot_id)
        if self._is_live(snapshot_id, target):
            return
        failure = self._failures.get(snapshot_id)
        if failure is not None and asked_s <= failure.ended_s:
            raise DeviceError(failure.cause)
        try:
            device = self._attach(snapshot_id, target)
            self._mount_device(device, snapshot_id, target, fs_spec)
        except ObdlabError as error:
            self._failures[snapshot_id] = _Failure(str(error), time.monotonic())
            raise
        self._failures.pop(snapshot_id, None)

    def release(self, snapshot_id: int) -> None:
        """Unmount the image and take its device away.

        A device that only other mount namespaces hold goes when they let go of it. Raises FailedPreconditionError,
        having changed nothing, while something in this one still uses the image.
        """
        target = self._layout.mountpoint(snapshot_id)
        users = _users(target)
        if users:
            raise FailedPreconditionError(f"image snapshot is in use: mounted on {', '.join(users)}")
        try:
            while mount.unmount(target):
                pass
        except DeviceError as error:
            raise FailedPreconditionError(f"image snapshot is in use: {error}") from error
        for device in self._devices_of(snapshot_id):
            if not self._devices.release(device.device_id):
                logger.info("device %s stays until its last user is gone", device.device_id)
        self._forget(snapshot_id)
        self._failures.pop(snapshot_id, None)

    def _start_host(self) -> None:
        try:
            self._devices.start_host()
        except ObdlabError as error:  # the first mount will say so to somebody who can act on it
            logger.warning("device host: %s", error)

    def _attach(self, snapshot_id: int, target: Path) -> AttachedDevice:
        if self._host_start is not None:
            self._host_start.join()  # two starts at a time would take twice as long; it has a deadline
        config = self._layout.config(snapshot_id)
        for device in self._devices_of(snapshot_id):
            if device.alive:
                return self._devices.attach(config, device.device_id)
        _unmount_all(target)
        # A dead device keeps its name until its last user, who gets I/O errors whatever is done, is gone; whoever
        # starts now gets a device with another name.
        taken = {device.device_id for device in self._devices_of(snapshot_id)}
        name = f"{self._prefix}-{snapshot_id}"
        names = (name, *(f"{name}.{number}" for number in range(1, len(taken) + 1)))
        return self._devices.attach(config, next(each for each in names if each not in taken))

    def _devices_of(self, snapshot_id: int) -> list[AttachedDevice]:
        config = self._layout.config(snapshot_id)
        return [device for device in self._devices.list() if device.config == config]

    def _mount_device(self, device: AttachedDevice, snapshot_id: int, target: Path, fs_spec: str) -> None:
        try:
            self._mount(device, target, fs_spec)
            self._remember(snapshot_id, device)
        except ObdlabError:
            self._undo(device.device_id, target)
            raise

    def _mount(self, device: AttachedDevice, target: Path, fs_spec: str) -> None:
        entries = mount.mounts_at(target)
        if entries and entries[-1].source == str(device.path):
            return
        if entries:
            logger.warning("%s: was mounted from %s, which is gone; mounting again", target, entries[-1].source)
            _unmount_all(target)
        _type, _, rest = fs_spec.partition(";")
        self._devices.mount(device, target, options=rest.partition(";")[0])

    def _undo(self, device_id: str, target: Path) -> None:
        try:
            _unmount_all(target)
            self._devices.release(device_id)
        except ObdlabError:
            logger.exception("device %s stays after a failed mount", device_id)

    def _is_live(self, snapshot_id: int, target: Path) -> bool:
        with self._guard:
            live = self._live.get(snapshot_id)
        if live is None:
            return False
        # The server comes first: a mount without one would not answer.
        if not _alive(live.pidfd):
            self._forget(snapshot_id)
            return False
        try:
            return target.stat().st_dev == live.path.stat().st_rdev
        except OSError:
            return False

    def _remember(self, snapshot_id: int, device: AttachedDevice) -> None:
        try:
            live = _Live(device.path, os.pidfd_open(device.pid))
        except ProcessLookupError as error:
            raise DeviceError(f"{device.path}: its server (process {device.pid}) died") from error
        self._forget(snapshot_id)
        with self._guard:
            self._live[snapshot_id] = live

    def _forget(self, snapshot_id: int) -> None:
        with self._guard:
            live = self._live.pop(snapshot_id, None)
        if live is not None:
            os.close(live.pidfd)


# Overlays keep a lower file system without needing its mount: unmounting would succeed and only hide the use.
def _users(target: Path) -> list[str]:
    entries = mount.mounts()
    devices = {entry.device for entry in entries if entry.mountpoint == target}
    return [
        str(entry.mountpoint)
        for entry in entries
        if (entry.device in devices and entry.mountpoint != target)
        or (entry.fs_type == "overlay" and str(target) in _lowers(entry.super_options))
    ]


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
