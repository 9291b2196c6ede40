"""A kind of device that keeps all defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.devices.crew import Crew
from obdlab.devices.device import Device, DeviceStatistics
from obdlab.errors import DeviceError


class Plain(Device):
    kind = "plain"
    path = Path("/dev/plain0")
    size = 4096
    read_only = True
    in_use = False

    def statistics(self) -> DeviceStatistics:
        return Crew(lambda _: False).statistics("")

    def wait(self, timeout_s: float | None = None) -> bool:
        return True

    def stop(self, timeout_s: float = 10.0) -> None: ...


def test_a_device_has_one_server_and_one_size_unless_its_kind_says_otherwise() -> None:
    device = Plain()
    assert device.can_change_servers is False
    assert device.can_graduate is False
    with pytest.raises(DeviceError, match="/dev/plain0: a plain device cannot grow while it is attached"):
        device.take_on_size()
