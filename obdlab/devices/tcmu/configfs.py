"""Makes TCMU devices and takes them down: a backstore in configfs, and a SCSI disk over it through tcm_loop.

Paths and values are the same as those of overlaybd-snapshotter and overlaybd-attacher, so that either side handles
both devices alike.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from obdlab.errors import DeviceError
from obdlab.system.attributes import write_attribute
from obdlab.system.pauses import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

TARGET = Path("/sys/kernel/config/target")
#: Stands for "no tenant" in the number of the host bus adapter.
_NO_TENANT_HBA = 999999999
#: About 24 days: the image decides when to give up, not the kernel.
TIMEOUT_S = 2147483
_CONFIG_MOST = 255
_ID_MOST = 13
_BLOCKED_PAUSE_S = 0.05
_BLOCKED_TRIES = 100
_DEVICE_PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class Target:
    """A device's paths in configfs: ``backstore``, and ``loop``, the SCSI host that exports it."""

    device_id: str
    backstore: Path
    loop: Path

    @classmethod
    def of(cls, device_id: str, tenant: int = -1) -> Self:
        """Return the paths of the device with that id (a snapshot's, at most 13 characters). Raises DeviceError."""
        if not device_id.isascii() or not device_id.isalnum() or len(device_id) > _ID_MOST:
            raise DeviceError(f"device id: {_ID_MOST} letters or digits at most (got {device_id!r})")
        hba = _NO_TENANT_HBA if tenant == -1 else tenant
        prefix = tenant % 100 + 100  # 199 without a tenant
        backstore = TARGET / "core" / f"user_{hba}" / f"dev_{device_id}"
        return cls(device_id, backstore, TARGET / "loopback" / f"naa.{prefix:03}{device_id.zfill(_ID_MOST)}")

    @property
    def group(self) -> Path:
        """The target portal group."""
        return self.loop / "tpgt_1"

    @property
    def lun(self) -> Path:
        """The logical unit."""
        return self.group / "lun" / "lun_0"

    @property
    def link(self) -> Path:
        """The link from logical unit to backstore."""
        return self.lun / self.backstore.name


def create(target: Target, dev_config: str, options: Sequence[str] = ("max_data_area_mb=4",)) -> None:
    """Make the backstore and enable it; the kernel notifies its handler. Raises DeviceError, leaving nothing.

    ``options`` are further texts for the control file.
    """
    if len(dev_config) > _CONFIG_MOST or any(character in dev_config for character in ",\n"):
        raise DeviceError(
            f"{dev_config}: the kernel takes {_CONFIG_MOST} characters at most, and no comma or line break in it"
        )
    try:
        os.makedirs(target.backstore.parent, 0o700, exist_ok=True)
        os.mkdir(target.backstore, 0o700)
    except FileExistsError as error:
        raise DeviceError(f"{target.backstore}: there is such a device already") from error
    except OSError as error:
        raise DeviceError(
            f"{target.backstore}: cannot make it ({error.strerror}): is target_core_user loaded?"
        ) from error
    try:
        for text in (f"dev_config={dev_config}", *options):
            _write(target.backstore / "control", text)
        _enable(target.backstore)
        _write(target.backstore / "attrib/cmd_time_out", str(TIMEOUT_S))
    except BaseException:
        os.rmdir(target.backstore)
        raise


# While a handler starts, its netlink is blocked and the kernel answers EAGAIN.
def _enable(backstore: Path) -> None:
    for attempt in range(1, _BLOCKED_TRIES + 1):
        try:
            write_attribute(backstore / "enable", "1")
        except OSError as error:
            if error.errno != errno.EAGAIN or attempt == _BLOCKED_TRIES:
                raise DeviceError(f"{backstore}: its handler refused it: {error.strerror}") from error
            time.sleep(_BLOCKED_PAUSE_S)
        else:
            return


def export(target: Target, *, timeout_s: float = 10.0) -> Path:
    """Make the backstore a SCSI disk; return its node, such as ``/dev/sda``. Raises DeviceError, leaving nothing."""
    try:
        os.makedirs(target.loop, 0o700, exist_ok=True)
        os.makedirs(target.lun, 0o700, exist_ok=True)
        _write(target.group / "nexus", target.loop.name)
        os.symlink(target.backstore, target.link)
        address = (target.group / "address").read_text().strip()
        return _disk_at(address, timeout_s)
    except BaseException as error:
        unexport(target)
        if isinstance(error, OSError):
            raise DeviceError(f"{target.loop}: cannot export ({error.strerror}): is tcm_loop loaded?") from error
        raise


# The kernel scans for the disk in the background once the logical unit is there.
def _disk_at(address: str, timeout_s: float) -> Path:
    directory = Path(f"/sys/class/scsi_device/{address}:0/device")
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(FileNotFoundError):
            for name in os.listdir(directory / "block"):
                write_attribute(directory / "timeout", str(TIMEOUT_S))
                if _opens(Path("/dev", name)):
                    return Path("/dev", name)
        if time.monotonic() > deadline:
            raise DeviceError(f"SCSI device {address}:0: no disk came of it within {timeout_s:g} s")
        time.sleep(_DEVICE_PAUSE_S)


# The node appears before the disk behind it can be opened.
def _opens(node: Path) -> bool:
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            return False
        raise
    return True


def disk_of(target: Target) -> Path | None:
    """Return the node of the disk that the backstore is exported as, or None."""
    try:
        address = (target.group / "address").read_text().strip()
        return Path("/dev", os.listdir(f"/sys/class/scsi_device/{address}:0/device/block")[0])
    except (OSError, IndexError):
        return None


def dev_config_of(config_path: Path, live_id: str = "") -> str:
    """Return the dev_config that names the image for an overlaybd daemon."""
    return f"overlaybd/{config_path.absolute()}" + (f";{live_id}" if live_id else "")


def attach(device_id: str, config_path: Path, *, tenant: int = -1, live_id: str = "") -> Path:
    """Have the running overlaybd daemon, ours or the original, serve the image of a config.v1.json; return the disk.

    ``live_id`` names the device for live snapshots. Raises DeviceError.
    """
    target = Target.of(device_id, tenant)
    create(target, dev_config_of(config_path, live_id))
    try:
        return export(target)
    except BaseException:
        os.rmdir(target.backstore)
        raise


def control(backstore: Path, action: str, value: str) -> bool:
    """Have the kernel change a backstore's ring, such as ``reset_ring``. Return False if it did not."""
    try:
        write_attribute(backstore / "action" / action, value)
    except FileNotFoundError:  # an older kernel, or the device is going
        return False
    except OSError as error:
        log.warning("%s: %s: %s", backstore.name, action, error.strerror)
        return False
    return True


def set_offline(disk: Path) -> None:
    """Have all later requests to a disk fail at once, whether it is served or not."""
    try:
        write_attribute(Path("/sys/block", disk.name, "device/state"), "offline")
    except OSError as error:
        log.info("%s: not taken offline: %s", disk, error.strerror)


def settle(target: Target, disk: Path, timeout_s: float) -> None:
    """Finish all requests under way on an offline disk; those left after ``timeout_s`` fail.

    The kernel's removal of a disk waits, without a limit, for all its requests and for a last flush, and a server may
    be dead or hang. After this call the disk can be removed.
    """
    _end_requests(target, disk, timeout_s)
    try:
        for cache in Path("/sys/block", disk.name, "device").glob("scsi_disk/*/cache_type"):
            # So no flush; the write itself waits for requests under way.
            write_attribute(cache, "temporary write through")
    except OSError as error:
        log.info("%s: its cache is not forgotten: %s", disk, error.strerror)


def _end_requests(target: Target, disk: Path, timeout_s: float) -> None:
    if not wait_until(lambda: not _in_flight(disk), timeout_s, look_s=_DEVICE_PAUSE_S):
        log.warning("%s: requests are under way, and no daemon answers them: they fail", disk)
        control(target.backstore, "block_dev", "1")
        control(target.backstore, "reset_ring", "2")


def _in_flight(disk: Path) -> bool:
    try:
        return any(int(count) for count in Path("/sys/block", disk.name, "inflight").read_text().split())
    except OSError:
        return False


def unexport(target: Target) -> None:
    """Take the SCSI disk away, if it exists."""
    for path in (target.link, target.lun, target.group, target.loop):
        take_away(path)


def remove(target: Target) -> None:
    """Take all of a device away, if it exists. Raises DeviceError if the kernel refuses."""
    unexport(target)
    take_away(target.backstore)


def take_away(path: Path) -> None:
    """Remove a link or a directory of configfs, if it is there. Raises DeviceError."""
    try:
        os.unlink(path) if path.is_symlink() else os.rmdir(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DeviceError(f"{path}: cannot remove: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    try:
        write_attribute(path, text)
    except OSError as error:
        raise DeviceError(f"{path}: cannot write {text!r}: {error.strerror}") from error
