"""A blob as a SCSI disk of this host, served by this process: TCMU backstore and tcm_loop."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices import loop
from obdlab.devices.kinds import TCMU
from obdlab.devices.stayingdevice import StayingDevice
from obdlab.devices.tcmu import configfs
from obdlab.devices.tcmu.disk import ScsiDisk
from obdlab.devices.tcmu.server import TcmuServer
from obdlab.devices.tcmu.uio import DeviceBusyError, UioDevice, devices, number_of
from obdlab.devices.usage import wait_unused
from obdlab.errors import DeviceError
from obdlab.system.attributes import write_attribute

if TYPE_CHECKING:
    from contextlib import ExitStack

    from obdlab.devices.stayingdevice import Options

#: Names the handler of these devices, so that no overlaybd daemon serves them.
HANDLER = "obdlab"
_DATA_AREA_MIB = 32
_TIMEOUT_S = 10.0
_PAUSE_S = 0.01
_LABEL_MOST = 200


class TcmuDevice(StayingDevice):
    """A SCSI disk of TCMU and tcm_loop."""

    kind = TCMU
    _server: TcmuServer

    def _make(self, options: Options, failed: ExitStack) -> None:
        target = _target(self._directory)
        disk = self._disk(options)
        # No netlink: the process that makes the device serves it, so the kernel has no handler to wait for.
        keys = {
            "max_data_area_mb": _DATA_AREA_MIB,
            "nl_reply_supported": -1,
            "hw_block_size": options.sector_size,
            "dev_size": self._size,
        }
        configfs.create(
            target, f"{HANDLER}/{_label(self._directory)}", [f"{key}={value}" for key, value in keys.items()]
        )
        failed.callback(configfs.remove, target)
        self._uio = UioDevice.open(number_of(target.backstore))
        failed.callback(self._close)
        self._start(disk, options)
        failed.callback(self._server.wait, _TIMEOUT_S)
        failed.callback(self._server.end)
        self._path = configfs.export(target)
        failed.callback(configfs.unexport, target)
        loop.set_readahead(self._path, options.readahead_kib)

    # Requests that the dead server took and did not answer fail with "busy", and the kernel's SCSI layer retries
    # them.
    def _recover(self, options: Options, failed: ExitStack) -> None:
        target = _target(self._directory)
        disk = self._disk(options)
        node = configfs.disk_of(target)
        if node is None:
            raise DeviceError(f"{self._directory}: no TCMU device is there to go on with")
        loop.check_size(node, self._size, options.name)
        self._path = node
        self._uio = _open_free(number_of(target.backstore))
        failed.callback(self._close)
        configfs.control(target.backstore, "block_dev", "1")
        try:
            configfs.control(target.backstore, "reset_ring", "1")
            self._start(disk, options)
        finally:
            configfs.control(target.backstore, "block_dev", "0")

    def _disk(self, options: Options) -> ScsiDisk:
        disk = ScsiDisk(
            self._blob,
            serial=_hash(self._directory)[:32],
            description=f"{HANDLER}/{self._directory.name}",
            block_size=options.sector_size,
            read_only=options.read_only,
        )
        self._read_only = disk.read_only
        return disk

    def _start(self, disk: ScsiDisk, options: Options) -> None:
        uio = self._uio
        self._server = TcmuServer(
            uio.memory, uio.descriptor, disk, name=options.name, max_threads=options.max_threads
        )
        self._server.start()

    @property
    def path(self) -> Path:
        return self._path

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def can_change_servers(self) -> bool:
        return (_target(self._directory).backstore / "action" / "reset_ring").exists()

    def take_on_size(self) -> None:
        try:
            write_attribute(Path("/sys/block", self._path.name, "device/rescan"), "1")
        except OSError as error:
            raise DeviceError(f"{self._path}: the kernel does not look for a new size: {error.strerror}") from error
        self._size = self._blob.size

    def stop(self, timeout_s: float = 10.0) -> None:
        take_down(self._directory, timeout_s=timeout_s)
        self._wait_for_last(timeout_s)

    def _release(self) -> None:
        self._uio.close()


DEVICE = TcmuDevice


def devices_of(directory: Path) -> list[Path]:
    """Return the disk that belongs to a device's directory, or an empty list."""
    disk = configfs.disk_of(_target(directory))
    return [disk] if disk is not None else []


def take_down(directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
    """Take the disk of ``directory`` away, which ends its server. A missing disk is fine.

    Raises DeviceError while a file system is mounted from it, unless ``force``: then its users get I/O errors.
    """
    target = _target(directory)
    for disk in devices_of(directory):
        if not force:
            wait_unused(disk)
        # Otherwise the kernel would ask for a last flush, which a dead server never answers. Servers flush when they
        # end.
        configfs.set_offline(disk)
        configfs.settle(target, disk, min(timeout_s, 1.0) if force else timeout_s)
    configfs.remove(target)


def abandon(directory: Path) -> None:
    """Have all present and later requests to the device at ``directory`` fail: it gets no other server."""
    for disk in devices_of(directory):
        configfs.set_offline(disk)
        configfs.settle(_target(directory), disk, 0.0)


def directories_below(parent: Path) -> set[Path]:
    """Return the directories below ``parent`` that have devices, including deleted directories."""
    found = set()
    for name in devices().values():
        directory = parent / name.config.partition(":")[2]
        if name.handler == HANDLER and name.config == _label(directory):
            found.add(directory)
    return found


def _open_free(number: int) -> UioDevice:
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return UioDevice.open(number)
        except DeviceBusyError:  # a dead server's last thread may still hold it
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_S)


def _hash(directory: Path) -> str:
    return hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()


# The kernel keeps 255 characters, and no commas; the hash distinguishes longer run directories and ids.
def _label(directory: Path) -> str:
    return f"{_hash(directory)[:32]}:{directory.name.replace(',', '_')}"[:_LABEL_MOST]


# A device's name has room for 13 of the digits.
def _target(directory: Path) -> configfs.Target:
    return configfs.Target.of(_hash(directory)[:13], tenant=_TENANT)


#: Separates these devices from those of snapshots, whose ids come from the snapshotter.
_TENANT = 88
