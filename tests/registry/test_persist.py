"""Trying again: the error of the last real try is raised, however late a machine wakes."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from obdlab.call import Call
from obdlab.registry import tries
from obdlab.registry.errors import RegistryError
from obdlab.registry.tries import persist


class Clock:
    """Time that only sleeping moves, and too far: as on a machine with other work."""

    def __init__(self, late_s: float) -> None:
        self.now = 100.0
        self.late_s = late_s

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.late_s


def failing(*errors: RegistryError) -> tuple[list[RegistryError], RegistryError]:
    """Return what is left of the errors after ``persist`` with one second to go, and the error raised."""
    left = list(errors)

    def attempt(_: Call) -> None:
        raise left.pop(0)

    with pytest.raises(RegistryError) as caught:
        persist(attempt, Call(time.monotonic() + 1.0), blob="blob", offset=512)
    return left, caught.value


def test_no_try_without_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1.0)
    monkeypatch.setattr(tries.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(tries.time, "sleep", clock.sleep)
    refused = RegistryError("registry answered 503", temporary=True, status=503)
    left, raised = failing(refused, RegistryError("never reached", temporary=True))
    assert [error.what for error in left] == ["never reached"]
    assert "registry answered 503" in str(raised)
    assert raised.tries == 1
    assert raised.status == 503


def test_a_pause_that_fits_is_waited_for_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.0)
    monkeypatch.setattr(tries.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(tries.time, "sleep", clock.sleep)
    fits = RegistryError("busy", temporary=True, retry_after_s=0.9)
    left, raised = failing(fits, RegistryError("no", temporary=False), RegistryError("never reached"))
    assert (raised.what, len(left)) == ("no (after 2 tries)", 1)
    assert clock.now == 100.9
    clock.now = 0.0
    long = RegistryError("busy", temporary=True, retry_after_s=1.1)
    left, raised = failing(long, RegistryError("never reached"))
    assert (raised.what, len(left), clock.now) == ("busy", 1, 0.0)


def test_tries_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.0)
    monkeypatch.setattr(tries.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(tries.time, "sleep", clock.sleep)
    asked = []

    def attempt(_: Call) -> None:
        asked.append(clock.now)
        raise RegistryError("busy", temporary=True)

    with pytest.raises(RegistryError) as caught:
        persist(attempt, Call(1e6), blob="blob", tries=12)
    assert (len(asked), caught.value.tries) == (12, 12)
    pauses = [after - before for before, after in pairwise(asked)]
    limits = [min(0.05 * 2**number, 5.0) for number in range(11)]
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, limits, strict=True))


def test_a_time_out_names_the_failure_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.0)
    monkeypatch.setattr(tries.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(tries.time, "sleep", clock.sleep)
    refused = RegistryError("registry answered 503", temporary=True, status=503)
    silent = RegistryError("no answer in time: deadline passed", temporary=False, timed_out=True)
    left, raised = failing(refused, silent)
    assert left == []
    assert "no answer in time: deadline passed (after 2 tries); before that: registry answered 503" in str(raised)
