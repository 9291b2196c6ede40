"""Deadlines of threads: an inner block may only shorten, and one try leaves time for another."""

from __future__ import annotations

import threading
import time

import pytest

from obdlab.registry.deadline import deadline_of_thread, thread_deadline
from obdlab.registry.errors import RegistryError
from obdlab.registry.failures import persist


def test_the_earlier_deadline_is_in_force() -> None:
    assert thread_deadline() is None
    with deadline_of_thread(100.0):
        for inner, in_force in ((50.0, 50.0), (200.0, 100.0)):
            with deadline_of_thread(inner):
                assert thread_deadline() == in_force
            assert thread_deadline() == 100.0
        with pytest.raises(KeyError), deadline_of_thread(1.0):
            raise KeyError
        assert thread_deadline() == 100.0
    assert thread_deadline() is None


def test_each_thread_has_its_own() -> None:
    seen: list[float | None] = []
    with deadline_of_thread(100.0):
        thread = threading.Thread(target=lambda: seen.append(thread_deadline()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_each_try_takes_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    for left_s, wanted_s in ((60.0, 30.0), (2.0, 1.0), (1.9, 1.9), (0.5, 0.5), (-1.0, -1.0)):
        seen = persist(thread_deadline, deadline=1000.0 + left_s, blob="blob", halving=True)
        assert seen == pytest.approx(1000.0 + wanted_s)
        assert persist(thread_deadline, deadline=1000.0 + left_s, blob="blob") == 1000.0 + left_s
        with deadline_of_thread(1000.0 + left_s):
            assert persist(thread_deadline, deadline=2000.0, blob="blob", halving=True) == pytest.approx(
                1000.0 + wanted_s
            )
            assert thread_deadline() == 1000.0 + left_s
        assert thread_deadline() is None


def test_each_try_halves_anew_and_the_deadline_of_the_thread_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda _: None)
    seen: list[float | None] = []

    def attempt() -> str:
        seen.append(thread_deadline())
        now[0] += 20.0
        if len(seen) < 3:
            raise RegistryError("again", temporary=True)
        return "done"

    with deadline_of_thread(1100.0):
        assert persist(attempt, deadline=1200.0, blob="blob", halving=True) == "done"
        assert thread_deadline() == 1100.0
    assert seen == [1050.0, 1060.0, 1070.0]
    with deadline_of_thread(1000.5), pytest.raises(RegistryError, match="over"):
        persist(lambda: _fail(), deadline=1200.0, blob="blob", halving=True)
    assert thread_deadline() is None


def _fail() -> None:
    raise RegistryError("over")
