"""TCMU disks of a real kernel: the contract of every device, and what is special about this kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from obdlab.blob import Blob
from obdlab.devices.device import Device
from obdlab.devices.tcmu import tcmu_device as tcmu
from obdlab.devices.tcmu.tcmu_device import TcmuDevice
from tests.devices.contract import DeviceContract


@pytest.mark.vm
class TestTcmuDevice(DeviceContract):
    def make(self, blob: Blob, directory: Path, **options: Any) -> Device:
        return TcmuDevice(blob, directory, **options)

    def leftovers(self, directory: Path) -> list[str]:
        target = tcmu._target(directory)
        return [str(path) for path in (target.backstore, target.loop) if path.exists()]
