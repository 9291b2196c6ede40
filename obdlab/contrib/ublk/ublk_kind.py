"""The device kind ``ublk``."""

from __future__ import annotations

from pathlib import Path

from obdlab.devices.kind import StayingKind, cannot_open


class Ublk(StayingKind):
    """A ublk device (Linux 6.4): the fewest steps in the kernel; it cannot grow."""

    name = "ublk"
    fix = "modprobe ublk_drv (Linux 6.4 or later)"
    preference = 2
    control = Path("/dev/ublk-control")
    implementation = "obdlab.contrib.ublk.ublk_device"

    def missing(self) -> str:
        return cannot_open(self.control)


KIND = Ublk()
