"""Deadlines of threads: an inner block may only shorten, and one try leaves time for another."""

from __future__ import annotations

import threading
import time

import pytest

from obdlab.registry.deadline import deadline_of_thread, one_try, thread_deadline


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


def test_one_try_takes_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    for left_s, wanted_s in ((60.0, 30.0), (2.0, 1.0), (1.9, 1.9), (0.5, 0.5), (-1.0, -1.0)):
        with deadline_of_thread(1000.0 + left_s):
            with one_try():
                assert thread_deadline() == pytest.approx(1000.0 + wanted_s)
            assert thread_deadline() == 1000.0 + left_s
    with one_try():
        assert thread_deadline() is None
