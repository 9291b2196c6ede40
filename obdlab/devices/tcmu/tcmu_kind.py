"""The device kind ``tcmu``."""

from __future__ import annotations

import os
from pathlib import Path

from obdlab.devices.kind import StayingKind
from obdlab.devices.kinds import TCMU


class Tcmu(StayingKind):
    """A SCSI disk over TCMU and tcm_loop, as overlaybd itself serves (Linux 5.0)."""

    name = TCMU
    fix = "modprobe -a target_core_user tcm_loop sd_mod; mount -t configfs none /sys/kernel/config"
    preference = 1
    control = Path("/sys/kernel/config/target")
    implementation = "obdlab.devices.tcmu.tcmu_device"

    def missing(self) -> str:
        core = self.control / "core"
        for path in (core, Path("/sys/module/target_core_user"), Path("/sys/module/tcm_loop")):
            if not path.exists():
                return f"{path}: No such file or directory"
        return "" if os.access(core, os.W_OK) else f"{self.control}: Permission denied"

    def directories_below(self, parent: Path) -> set[Path]:
        found: set[Path] = self.module.directories_below(parent) if self.control.exists() else set()
        return found


KIND = Tcmu()
