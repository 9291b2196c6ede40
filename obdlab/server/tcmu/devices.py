"""Attaches images as devices of an overlaybd TCMU daemon, ours (``obdlab serve tcmu``) or the original.

Has the same calls as :class:`obdlab.server.client.DeviceService` has for the devices of a run directory. State lives
in configfs alone, under the paths and values of overlaybd-snapshotter: a device is named after its snapshot, whose
directory holds the image's configuration.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices.tcmu import configfs, iscsi, uio
from obdlab.devices.tcmu.configfs import Target
from obdlab.devices.usage import wait_unused
from obdlab.errors import DeviceError
from obdlab.server.client import AttachedDevice, DeviceService
from obdlab.server.tcmu.daemon import holders
from obdlab.server.tcmu.devconfig import HANDLER, failure_of, image_of, result_file
from obdlab.settings.settings import DAEMON_KIND
from obdlab.system import mount

if TYPE_CHECKING:
    from obdlab.devices.tcmu.uio import UioName
    from obdlab.image.config import ImageConfig
    from obdlab.server.client import Devices
    from obdlab.settings.settings import Settings

_SERVED_S = 30.0
_PAUSE_S = 0.02
_SECTOR = 512


def devices_for(run_dir: Path, settings: Settings) -> Devices:
    """Return the maker of devices that the settings ask for."""
    return TcmuDevices(settings) if settings.device_kind == DAEMON_KIND else DeviceService(run_dir, settings)


def take_down(target: Target) -> None:
    """Remove a device, its disk and its iSCSI exports. A missing device is fine.

    Raises DeviceError, having changed nothing, while a file system of this host is mounted from it.
    """
    disk = configfs.disk_of(target)
    if disk is not None:
        wait_unused(disk)
        numbers = [number for number, name in uio.devices().items() if name.backstore == target.backstore]
        if not any(holders(number) for number in numbers):  # no server would answer the removal's requests
            configfs.set_offline(disk)
            configfs.settle(target, disk, 0.0)
    iscsi.unexport(target)
    configfs.remove(target)


class TcmuDevices:
    """The overlaybd devices of this host. ``tenant`` is the snapshotter's, part of every name; -1: no tenant.

    The daemon has its own settings for opening their images; ``settings`` are those of the snapshotter.
    """

    def __init__(self, settings: Settings, *, tenant: int = -1) -> None:
        self.settings = settings
        self._tenant = tenant

    def check_place(self) -> None:
        """Do nothing: the daemon keeps its own files."""

    def start_host(self) -> None:
        """Do nothing: the daemon is started by other means."""

    def prime(self, image: ImageConfig, *, start: bool = False) -> None:
        """Do nothing: the daemon has a cache of its own."""

    def attach(self, config_path: Path, device_id: str | None = None, *, timeout_s: float = 150.0) -> AttachedDevice:
        """Make an image a SCSI disk, or find its present one. ``device_id`` is not used.

        The daemon opens it, with its own deadline. Raises DeviceError, with the daemon's reason, if it refuses, no
        daemon runs, or a device of that snapshot has another image.
        """
        config = config_path.absolute()
        target = Target.of(_snapshot_of(config), self._tenant)
        if target.backstore.exists():
            return self._attached(target, config)
        result_file(config).unlink(missing_ok=True)  # of an earlier attempt
        try:
            configfs.attach(target.device_id, config, tenant=self._tenant)
        except DeviceError as error:
            reason = failure_of(config)
            raise DeviceError(f"cannot attach {config}: {error}" + (f" ({reason})" if reason else "")) from error
        return self._attached(target, config)

    def is_unpacked(self, config_path: Path) -> bool:
        """Return False: the daemon serves all images."""
        return False

    def mount(self, device: AttachedDevice, target: Path, *, options: str = "", read_only: bool = True) -> None:
        """Mount the device's file system on the directory ``target``. Raises DeviceError."""
        mount.mount(device.path, target, read_only=read_only, options=options)

    def detach(self, device_id: str) -> bool:
        """Take a device away. Return False if it is missing.

        Raises DeviceError, naming its users, while it is in use.
        """
        target = Target.of(device_id, self._tenant)
        if not target.backstore.exists():
            return False
        take_down(target)
        return True

    def release(self, device_id: str) -> bool:
        """Detach a device that this mount namespace has unmounted. Return True if it is gone.

        A device in use elsewhere stays, for the next attach of its image or :meth:`detach`.
        """
        try:
            self.detach(device_id)
        except DeviceError:
            return False
        return True

    def list(self) -> list[AttachedDevice]:
        """Return the devices of this tenant."""
        found = []
        for number, name in uio.devices().items():
            target = self._target_of(name)
            disk = configfs.disk_of(target) if target is not None else None
            if target is not None and disk is not None:
                found.append(_description(target, disk, image_of(name.config)[0], number))
        return found

    def _target_of(self, name: UioName) -> Target | None:
        if name.handler != HANDLER:
            return None
        try:
            target = Target.of(name.device.removeprefix("dev_"), self._tenant)
        except DeviceError:  # made under foreign names
            return None
        return target if target.backstore == name.backstore else None

    def _attached(self, target: Target, config: Path) -> AttachedDevice:
        deadline = time.monotonic() + _SERVED_S
        while True:
            device = next((each for each in self.list() if each.device_id == target.device_id), None)
            if device is not None and device.config != config:
                raise DeviceError(f"{target.backstore}: serves {device.config} (wanted {config})")
            if device is not None and device.alive:
                return device
            if time.monotonic() > deadline:
                trouble = "no daemon serves it" if device is not None else "half made, and left so by whoever made it"
                raise DeviceError(f"{target.backstore}: {trouble} (waited {_SERVED_S:g} s)")
            time.sleep(_PAUSE_S)


# The layout of overlaybd-snapshotter: <root>/snapshots/<id>/block/config.v1.json.
def _snapshot_of(config: Path) -> str:
    name = config.parent.parent.name
    if config.parent.name != "block" or not name.isdecimal():
        raise DeviceError(f"{config}: no image of a snapshot (wanted .../<id>/block/config.v1.json)")
    return name


def _description(target: Target, disk: Path, config: Path, number: int) -> AttachedDevice:
    servers = holders(number)
    return AttachedDevice(
        device_id=target.device_id,
        path=disk,
        size=_number(disk, "size") * _SECTOR,
        read_only=bool(_number(disk, "ro")),
        pid=servers[0] if servers else 0,
        config=config,
        kind=DAEMON_KIND,
        alive=bool(servers),
    )


def _number(disk: Path, name: str) -> int:
    try:
        return int(Path("/sys/block", disk.name, name).read_text())
    except (OSError, ValueError):  # being removed
        return 0
