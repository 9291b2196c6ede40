"""Netlink messages and UIO names, as the kernel sends them and otherwise."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.devices.tcmu import netlink
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


def with_attribute(kind: int, content: bytes) -> list[Event]:
    """Return the event whose attribute of this kind has another content."""
    wanted = {1: NAME.encode() + b"\0", 2: struct.pack("=I", 3), 8: struct.pack("=I", 77)} | {kind: content}
    return parse_events(message(1, b"".join(attribute(*each) for each in wanted.items())), FAMILY)


@pytest.mark.parametrize(
    ("kind", "content", "event"),
    [
        (2, bytes(3), None),
        (2, bytes(5), None),
        (2, bytes(4), Event(What.ADDED, NAME, 0, 77)),
        (8, bytes(3), Event(What.ADDED, NAME, 3, None)),
        (8, bytes(8), Event(What.ADDED, NAME, 3, None)),
        (1, b"\xff\0\0", Event(What.ADDED, "\ufffd", 3, 77)),
        (1, b"", Event(What.ADDED, "", 3, 77)),
        (9, bytes(64), Event(What.ADDED, NAME, 3, 77)),  # attributes that are not known are passed over
    ],
)
def test_attributes_of_other_lengths(kind: int, content: bytes, event: Event | None) -> None:
    assert with_attribute(kind, content) == ([event] if event else [])


def test_flags_in_the_kind_of_an_attribute_are_no_part_of_it() -> None:
    for flags in (0x8000, 0x4000):  # nested, and in network byte order
        marked = attribute(1 | flags, NAME.encode()) + attribute(2 | flags, struct.pack("=I", 3))
        assert parse_events(message(2, marked), FAMILY) == [Event(What.REMOVED, NAME, 3, None)]
    other = attribute(1 | 0x2000, NAME.encode()) + attribute(2, struct.pack("=I", 3))
    assert parse_events(message(2, other), FAMILY) == []


@pytest.mark.parametrize("number", [0, 4, 255])
def test_other_commands_are_no_events(number: int) -> None:
    assert parse_events(message(number, WHOLE), FAMILY) == []


@pytest.mark.parametrize("missing", range(1, 20))
def test_messages_and_attributes_that_are_cut_off_end_the_packet(missing: int) -> None:
    data = message(1, WHOLE) + message(2, WHOLE)
    assert [event.what for event in parse_events(data[:-missing], FAMILY)] == [What.ADDED]
    assert [event.what for event in parse_events(data, FAMILY)] == [What.ADDED, What.REMOVED]


def test_messages_begin_at_multiples_of_four_bytes() -> None:
    odd = message(1, WHOLE + attribute(9, b"\1")[:5])
    assert len(odd) % 4 == 1
    assert [event.what for event in parse_events(odd + bytes(3) + message(2, WHOLE), FAMILY)] == [
        What.ADDED,
        What.REMOVED,
    ]


@pytest.mark.parametrize("length", [0, 15])
def test_a_message_shorter_than_its_header_ends_the_packet(length: int) -> None:
    assert parse_events(struct.pack("=IHHII", length, FAMILY, 0, 0, 0) + message(1, WHOLE), FAMILY) == []


@pytest.mark.parametrize("length", [0, 3])
def test_an_attribute_shorter_than_its_header_ends_the_event(length: int) -> None:
    assert parse_events(message(1, struct.pack("=HH", length, 1) + WHOLE), FAMILY) == []


def test_new_devices_are_refused_while_a_handler_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlink, "_PARAMETERS", tmp_path / "parameters")
    assert netlink.block() is False  # the directory of an old kernel
    netlink.unblock()
    (tmp_path / "parameters").mkdir()
    assert netlink.block() is True
    block, reset = tmp_path / "parameters/block_netlink", tmp_path / "parameters/reset_netlink"
    assert (block.read_text(), reset.read_text()) == ("1", "1")
    netlink.unblock()
    assert block.read_text() == "0"
    block.unlink()
    block.mkdir()
    with pytest.raises(DeviceError, match="parameters/block_netlink: Is a directory"):
        netlink.block()
