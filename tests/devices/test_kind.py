"""What a kind of device is unless it says otherwise, and what all kinds together answer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from obdlab.blob import Blob
from obdlab.devices import kinds, loop
from obdlab.devices.device import Device
from obdlab.devices.kind import NO_CONNECTION, Kind, Place, cannot_open
from obdlab.errors import DeviceError


class Plain(Kind):
    """A kind that keeps all defaults; its devices are files that the test makes."""

    name, fix = "plain", "modprobe plain"

    def __init__(self, nodes: list[Path], trouble: str = "") -> None:
        self.nodes, self.trouble = nodes, trouble
        self.calls: list[tuple[Path, float, bool]] = []

    def missing(self) -> str:
        return self.trouble

    def open(self, blob: Blob, place: Place) -> Device:
        raise NotImplementedError

    def devices_of(self, directory: Path) -> list[Path]:
        return self.nodes

    def take_down(self, directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
        self.calls.append((directory, timeout_s, force))


def test_a_kind_has_one_server_and_no_connection_unless_it_says_otherwise(tmp_path: Path) -> None:
    kind = Plain([])
    assert kind.connect() == NO_CONNECTION < 0
    assert kind.can_change_servers() is True
    assert kind.take_down_when_unused(tmp_path) is False
    assert kind.directories_below(tmp_path) == set()
    assert (kind.is_shared, kind.is_file, kind.preference, kind.implementation) == (False, False, 0, "")


def test_a_device_has_ended_once_none_of_its_nodes_is_there(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    kind = Plain([one, two])
    assert kind.has_ended(tmp_path, NO_CONNECTION) is True
    two.touch()
    assert kind.has_ended(tmp_path, NO_CONNECTION) is False
    one.touch()
    assert kind.has_ended(tmp_path, NO_CONNECTION) is False
    assert Plain([]).has_ended(tmp_path, NO_CONNECTION) is True


def test_a_place_is_that_of_a_new_device_unless_it_says_otherwise(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert (place.name, place.readahead_kib, place.connection) == ("", 128, NO_CONNECTION)
    assert (place.path, place.on_busy, place.exchangeable) == (None, None, False)


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.EBUSY, ""), (errno.EACCES, "/dev/one: Permission denied")], ids=["busy", "no right"]
)
def test_a_node_in_use_is_there(monkeypatch: pytest.MonkeyPatch, code: int, reason: str) -> None:
    def refuse(path: Path, flags: int) -> int:
        assert flags == os.O_RDWR | os.O_CLOEXEC
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    assert cannot_open(Path("/dev/one")) == reason


def test_a_node_that_can_be_opened_is_closed(tmp_path: Path) -> None:
    (tmp_path / "node").touch()
    before = os.listdir("/proc/self/fd")
    assert cannot_open(tmp_path / "node") == ""
    assert os.listdir("/proc/self/fd") == before


def test_a_host_without_a_kind_says_what_to_do() -> None:
    kinds.check(Plain([]))
    with pytest.raises(DeviceError, match=r"this host has no plain devices: no module \(try: modprobe plain\)"):
        kinds.check(Plain([], "no module"))


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Plain, Plain]:
    found = Plain([tmp_path / "one"]), Plain([tmp_path / "two", tmp_path / "three"])
    monkeypatch.setattr(kinds, "every", lambda: list(found))
    return found


def test_devices_are_those_of_all_kinds(tmp_path: Path, both: tuple[Plain, Plain]) -> None:
    assert kinds.devices_of(tmp_path) == [tmp_path / "one", tmp_path / "two", tmp_path / "three"]


def test_a_device_is_taken_down_by_every_kind(tmp_path: Path, both: tuple[Plain, Plain]) -> None:
    kinds.take_down(tmp_path)
    kinds.take_down(tmp_path, timeout_s=2.0, force=True)
    for kind in both:
        assert kind.calls == [(tmp_path, 10.0, False), (tmp_path, 2.0, True)]


def test_a_device_is_unused_if_no_node_of_it_is_in_use(
    tmp_path: Path, both: tuple[Plain, Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Path] = []
    monkeypatch.setattr(loop, "in_use", used.__contains__)
    assert kinds.is_unused(tmp_path) is True
    used.append(tmp_path / "three")
    assert kinds.is_unused(tmp_path) is False


def test_directories_are_those_of_all_kinds(
    tmp_path: Path, both: tuple[Plain, Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, name in zip(both, "ab", strict=True):
        monkeypatch.setattr(kind, "directories_below", lambda parent, name=name: {parent / name, parent / "c"})
    assert kinds.directories_below(tmp_path) == {tmp_path / "a", tmp_path / "b", tmp_path / "c"}


def test_the_automatic_kind_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    best = Plain([])
    monkeypatch.setattr(kinds, "best", lambda: best)
    assert kinds.find("auto") is best
    assert kinds.find("tcmu") is not best


def test_a_host_without_fuse_takes_the_preferred_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = Plain([], "no /dev/fuse"), Plain([])
    other.preference = 1
    monkeypatch.setattr(kinds, "find", lambda _: first)
    monkeypatch.setattr(kinds, "every", lambda: [first, other])
    assert kinds.best() is other
    other.trouble = "no module"
    assert kinds.best() is first
