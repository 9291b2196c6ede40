"""The device kind ``tcmu``. Light: clients import it to look for devices on hosts that have none of the kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices.kind import Kind, Place

if TYPE_CHECKING:
    from obdlab.blob import Blob
    from obdlab.devices.device import Device

_CONFIGFS_TARGET = Path("/sys/kernel/config/target")


class Tcmu(Kind):
    """A SCSI disk over TCMU and tcm_loop, as overlaybd itself serves (Linux 5.0)."""

    name = "tcmu"
    fix = "modprobe -a target_core_user tcm_loop sd_mod; mount -t configfs none /sys/kernel/config"
    preference = 1
    warm = ("obdlab.devices.tcmu.tcmu_device",)

    def missing(self) -> str:
        for path in (_CONFIGFS_TARGET / "core", Path("/sys/module/target_core_user"), Path("/sys/module/tcm_loop")):
            if not path.exists():
                return f"{path}: No such file or directory"
        return "" if os.access(_CONFIGFS_TARGET / "core", os.W_OK) else f"{_CONFIGFS_TARGET}: Permission denied"

    def open(self, blob: Blob, place: Place) -> Device:
        from obdlab.devices.tcmu.tcmu_device import TcmuDevice

        recover = place.path is not None
        return TcmuDevice(blob, place.directory, name=place.name, readahead_kib=place.readahead_kib, recover=recover)

    def give_up(self, directory: Path) -> None:
        from obdlab.devices.tcmu import tcmu_device

        tcmu_device.abandon(directory)

    def devices_of(self, directory: Path) -> list[Path]:
        if not _CONFIGFS_TARGET.exists():
            return []
        from obdlab.devices.tcmu import tcmu_device

        return tcmu_device.devices_of(directory)

    def take_down(self, directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
        if _CONFIGFS_TARGET.exists():
            from obdlab.devices.tcmu import tcmu_device

            tcmu_device.take_down(directory, timeout_s=timeout_s, force=force)

    def directories_below(self, parent: Path) -> set[Path]:
        if not _CONFIGFS_TARGET.exists():
            return set()
        from obdlab.devices.tcmu import tcmu_device

        return tcmu_device.directories_below(parent)


KIND = Tcmu()
