"""The device kind ``ublk``. Light: clients import it to look for devices on hosts that have none of the kind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices.kind import Kind, Place, cannot_open

if TYPE_CHECKING:
    from obdlab.blob import Blob
    from obdlab.devices.device import Device

_CONTROL = Path("/dev/ublk-control")


class Ublk(Kind):
    """A ublk device (Linux 6.4): the fewest steps in the kernel; it cannot grow."""

    name = "ublk"
    fix = "modprobe ublk_drv (Linux 6.4 or later)"
    preference = 2
    warm = ("obdlab.contrib.ublk.ublk_device",)

    def missing(self) -> str:
        return cannot_open(_CONTROL)

    def open(self, blob: Blob, place: Place) -> Device:
        from obdlab.contrib.ublk.ublk_device import UblkDevice

        recover = place.path is not None
        return UblkDevice(blob, place.directory, name=place.name, readahead_kib=place.readahead_kib, recover=recover)

    def give_up(self, directory: Path) -> None:
        from obdlab.contrib.ublk import ublk_device

        ublk_device.abandon(directory)

    def devices_of(self, directory: Path) -> list[Path]:
        if not _CONTROL.exists():
            return []
        from obdlab.contrib.ublk import ublk_device

        return ublk_device.devices_of(directory)

    def take_down(self, directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
        if _CONTROL.exists():
            from obdlab.contrib.ublk import ublk_device

            ublk_device.take_down(directory, timeout_s=timeout_s, force=force)


KIND = Ublk()
