"""A kind of device that keeps all defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.blob import MemoryBlob
from obdlab.devices.crew import Crew
from obdlab.devices.device import Device, DeviceStatistics, check_sectors
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


@pytest.mark.parametrize(("size", "sector"), [(0, 512), (513, 512), (511, 512), (4608, 4096)])
def test_a_size_that_is_no_number_of_sectors(size: int, sector: int) -> None:
    wanted = rf"odd: a device needs a whole number of {sector}-byte sectors \(got {size} bytes\)"
    with pytest.raises(DeviceError, match=wanted):
        check_sectors(MemoryBlob(bytes(size), "odd"), sector)


@pytest.mark.parametrize(("size", "sector"), [(512, 512), (4608, 512), (4096, 4096)])
def test_a_size_in_sectors(size: int, sector: int) -> None:
    check_sectors(MemoryBlob(bytes(size), "even"), sector)


def test_statistics_without_times_have_none() -> None:
    found = DeviceStatistics(1, 2, 3, 4, 5, 6.0, 7, "")
    assert (found.read_times, found.write_times, found.under_way_s) == ({}, {}, ())
