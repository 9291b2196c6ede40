"""Student's distribution against printed tables and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from obdlab.lab.run.student import Normal, combination, difference, one_mean, quantile, slope, two_sided


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (10, 2.22814), (30, 2.04227), (120, 1.97993)],
)
def test_the_quantiles_of_printed_tables(freedom: int, t: float) -> None:
    assert quantile(0.95, float(freedom)) == pytest.approx(t, rel=2e-6)
    assert two_sided(t, float(freedom)) == pytest.approx(0.05, rel=2e-5)


def test_closed_forms() -> None:
    for t in (0.0, 0.3, 1.0, 5.0, 400.0):
        assert two_sided(t, 1.0) == pytest.approx(1 - 2 * math.atan(t) / math.pi, rel=1e-9)
        assert two_sided(t, 2.0) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)
    # Degrees between whole numbers lie between their neighbours.
    assert two_sided(3.0, 1.0) > two_sided(3.0, 1.5) > two_sided(3.0, 2.0)


def test_a_difference_by_hand() -> None:
    found = difference(np.array([1.0, 2.0, 3.0]), np.array([5.0, 7.0]))
    # Squared errors: 1/3 of the first, 2/2 of the second.
    assert found.centre == -4.0
    assert found.error == pytest.approx(math.sqrt(4 / 3))
    assert found.freedom == 1.0
    same = difference(np.array([1.0, 2.0, 3.0]), np.array([5.0, 7.0, 12.0]))
    # Squared errors: 1/3 and 13/3.
    assert same.freedom == pytest.approx((14 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (13 / 3) ** 2 / 2))
    mean = one_mean(np.array([2.0, 4.0, 6.0]))
    assert (mean.centre, mean.error, mean.freedom) == (4.0, pytest.approx(math.sqrt(4 / 3)), 2.0)
    half = combination([(np.array([2.0, 4.0, 6.0]), 0.5)])
    assert (half.centre, half.error, half.freedom) == (2.0, pytest.approx(mean.error / 2), pytest.approx(2.0))


def test_equal_values_leave_no_doubt() -> None:
    exact = difference(np.array([0.3, 0.3, 0.3]), np.array([0.1, 0.1]))
    assert (exact.error, exact.freedom) == (0.0, 1.0)
    assert exact.interval(0.95) == (exact.centre, exact.centre)
    assert exact.p(0.5) == 0.0
    assert exact.p(0.2) == 1.0
    low, high = Normal(1.0, 0.5, 2.0).interval(0.95)
    assert (low, high) == (pytest.approx(1 - 2.15133, rel=1e-5), pytest.approx(1 + 2.15133, rel=1e-5))


def test_a_slope_by_hand() -> None:
    found = slope(np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 3.0, 4.0, 8.0]))
    # Means 1.5 and 4; squares of the places 5, products 11; what is left: 0.3, 0.1, -1.1 and 0.7.
    assert found.centre == pytest.approx(2.2)
    assert found.error == pytest.approx(math.sqrt(1.8 / 2 / 5))
    assert found.freedom == 2.0
    exact = slope(np.array([0.0, 1.0, 5.0]), np.array([1.0, 1.1, 1.5]))
    assert (exact.centre, exact.error) == (pytest.approx(0.1), 0.0)


def test_a_slope_is_in_its_interval() -> None:
    rng, places = np.random.default_rng(4), np.repeat(np.arange(6.0), 3)
    rounds, held = 1500, 0
    for _ in range(rounds):
        low, high = slope(places, 1 + 0.05 * places + 0.1 * rng.standard_normal(len(places))).interval(0.95)
        held += low <= 0.05 <= high
    assert abs(held / rounds - 0.95) < 3 * (0.95 * 0.05 / rounds) ** 0.5
