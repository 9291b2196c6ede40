"""Looks at a condition by a deadline, and pauses that grow."""

from __future__ import annotations

import time

import pytest

from obdlab.system.pauses import backoff_s, wait_until


def test_a_condition_that_comes_true() -> None:
    looks: list[float] = []

    def third() -> bool:
        looks.append(time.monotonic())
        return len(looks) == 3

    assert wait_until(third, 60.0, look_s=0.01)
    assert len(looks) == 3
    assert looks[2] - looks[0] >= 0.02


def test_a_condition_that_stays_false_is_looked_at_until_the_deadline() -> None:
    began = time.monotonic()
    assert not wait_until(lambda: False, 0.05, look_s=0.01)
    assert time.monotonic() - began >= 0.05


def test_a_condition_is_looked_at_once_without_any_time() -> None:
    assert wait_until(lambda: True, 0.0, look_s=60.0)


@pytest.mark.parametrize(("failures", "pause_s"), [(0, 0.5), (1, 1.0), (2, 2.0), (3, 3.0), (10**6, 3.0)])
def test_pauses_double_up_to_the_longest(failures: int, pause_s: float) -> None:
    assert backoff_s(failures, 0.5, 3.0) == pause_s
