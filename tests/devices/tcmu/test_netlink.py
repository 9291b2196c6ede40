"""Netlink messages and UIO names, as the kernel sends them and otherwise."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.devices.tcmu.configfs import Target
from obdlab.devices.tcmu.netlink import Event, What, parse_events
from obdlab.devices.tcmu.uio import UioName
from obdlab.errors import DeviceError
from tests.devices.tcmu.speaking import FAMILY, NAME, attribute, event, message

WHOLE = event()


def test_events() -> None:
    data = message(1, WHOLE) + message(1, WHOLE, family=31) + message(2, WHOLE)
    assert parse_events(data, FAMILY) == [Event(What.ADDED, NAME, 3, 77), Event(What.REMOVED, NAME, 3, 77)]
    assert parse_events(message(7, WHOLE), FAMILY) == []
    assert parse_events(message(1, attribute(1, b"name\0")), FAMILY) == []


@given(st.integers(0, 120), st.binary(max_size=8))
def test_broken_messages_give_no_error(at: int, noise: bytes) -> None:
    data = bytearray(message(1, WHOLE))
    data[at : at + len(noise)] = noise
    for found in parse_events(bytes(data), FAMILY):
        UioName.parse(found.name)


def test_names() -> None:
    name = UioName.parse(NAME + "\n")
    assert name == UioName("999999999", "dev_128", "overlaybd", "/var/config.v1.json")
    assert name.backstore == Path("/sys/kernel/config/target/core/user_999999999/dev_128")
    # As long as "overlaybd", no shorter: the original takes a prefix of it for itself.
    assert UioName.parse("tcm-user/1/dev_1/over//var/config") == UioName("1", "dev_1", "over", "/var/config")
    for text in (
        "",
        "tcm-user",
        "tcm-user/1/dev_1",
        "tcm-user/1/dev_1/overlaybd",
        "other/1/d/overlaybd/x",
        "tcm-user/x/d/h/c",
    ):
        assert UioName.parse(text) is None


def test_places_are_the_originals() -> None:
    target = Target.of("128")
    assert target.backstore == Path("/sys/kernel/config/target/core/user_999999999/dev_128")
    assert target.link == Path("/sys/kernel/config/target/loopback/naa.1990000000000128/tpgt_1/lun/lun_0/dev_128")
    tenant = Target.of("7", tenant=205)
    assert (tenant.backstore.parent.name, tenant.loop.name) == ("user_205", "naa.1050000000000007")
    for bad in ("", "1" * 14, "a/b", "1,2"):
        with pytest.raises(DeviceError, match="letters or digits"):
            Target.of(bad)


@pytest.mark.parametrize("length", range(5))
def test_a_message_too_short_for_an_event_is_left_out(length: int) -> None:
    short = struct.pack("=IHHII", 16 + length, FAMILY, 0, 0, 0) + b"\1\2\0\0"[:length]
    assert parse_events(short + bytes(-length % 4) + message(1, WHOLE), FAMILY) == [Event(What.ADDED, NAME, 3, 77)]
