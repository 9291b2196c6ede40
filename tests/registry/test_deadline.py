"""Deadlines of calls: terms handed down may only be stricter, and one try leaves time for another."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from obdlab.call import UNBOUND, Call
from obdlab.registry.errors import RegistryError
from obdlab.registry.transport import _DeadlineSocket
from obdlab.registry.tries import persist


@pytest.fixture
def ends() -> Iterator[tuple[_DeadlineSocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    wire = _DeadlineSocket(ours.family, ours.type, ours.proto, fileno=ours.detach())
    wire.silence_s = 60.0
    with wire, theirs:
        yield wire, theirs


def test_the_earlier_deadline_counts() -> None:
    told: list[str] = []
    call = Call(100.0, lambda: told.append("waits"))
    assert UNBOUND.until(100.0).deadline == 100.0
    assert call.until(50.0).deadline == 50.0
    assert call.until(200.0).deadline == 100.0
    call.until(50.0).about_to_wait()
    assert told == ["waits"]


def test_the_time_left_is_bounded_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    assert UNBOUND.left_s(7.0) == 7.0
    assert [Call(1000.0 + left_s).left_s(7.0) for left_s in (8.0, 3.0, 0.0, -3.0)] == [7.0, 3.0, 0.0, 0.0]


def test_each_try_takes_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    for left_s, wanted_s in ((60.0, 30.0), (2.0, 1.0), (1.9, 1.9), (0.5, 0.5), (-1.0, -1.0)):
        call = Call(1000.0 + left_s)
        seen = persist(lambda terms: terms.deadline, call, blob="blob", halving=True)
        assert seen == pytest.approx(1000.0 + wanted_s)
        assert persist(lambda terms: terms.deadline, call, blob="blob") == 1000.0 + left_s
    assert persist(lambda terms: terms.deadline, UNBOUND, blob="blob", halving=True) is None


def test_each_try_halves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda _: None)
    seen: list[float | None] = []

    def attempt(terms: Call) -> str:
        seen.append(terms.deadline)
        now[0] += 20.0
        if len(seen) < 3:
            raise RegistryError("again", temporary=True)
        return "done"

    assert persist(attempt, Call(1100.0), blob="blob", halving=True) == "done"
    assert seen == [1050.0, 1060.0, 1070.0]


@pytest.mark.parametrize("late_s", [0.0, 1e-9, 5.0])
def test_nothing_is_received_after_the_deadline(ends: tuple[_DeadlineSocket, socket.socket], late_s: float) -> None:
    wire, theirs = ends
    theirs.sendall(b"in time")
    buffer = bytearray(7)
    assert wire.recv_into(buffer) == 7
    assert buffer == b"in time"
    theirs.sendall(b"late")
    wire.call = Call(time.monotonic() - late_s)
    with pytest.raises(TimeoutError, match="deadline passed"):
        wire.recv_into(buffer)


def test_a_wait_is_as_long_as_the_shorter_of_silence_and_deadline(
    ends: tuple[_DeadlineSocket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    wire, theirs = ends
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    for left_s, wanted_s in ((8.0, 8.0), (61.0, 60.0), (None, 60.0)):
        theirs.sendall(b"x")
        wire.call = Call(None if left_s is None else 1000.0 + left_s)
        assert wire.recv_into(bytearray(1)) == 1
        assert wire.gettimeout() == wanted_s


@pytest.mark.parametrize(("arguments", "named"), [((), {}), (("r",), {}), (("rb",), {"buffering": 1})])
def test_a_wires_file_has_one_form(
    ends: tuple[_DeadlineSocket, socket.socket], arguments: tuple[str, ...], named: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="wanted mode rb alone"):
        ends[0].makefile(*arguments, **named)
