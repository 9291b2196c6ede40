"""Always-valid intervals: seldom a false alarm at any time, and fewer starts for the same verdicts."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from obdlab.lab.run import student
from obdlab.lab.run.rows import RowStore, one_per_attempt
from obdlab.lab.run.sequential import LEAST_PAIRS, half_width, pair_interval

PEERS = Path(__file__).parents[3] / "experiments" / "measured" / "peers"
BASELINE = "overlayfs"


@pytest.fixture(scope="module")
def logarithms() -> dict[tuple[Any, ...], np.ndarray]:
    """Logarithms of the measured totals by image, rate, round trip, start and arm."""
    cells: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in one_per_attempt(row for row in RowStore(PEERS).rows() if not row.get("error")):
        key = (row["image"], row["rate_mbit"], row["rtt_ms"], row["start"], row["arm"])
        cells[key].append(math.log(row["total_s"]))
    return {key: np.array(values) for key, values in cells.items() if len(values) >= LEAST_PAIRS}


def _sure_at(ours: np.ndarray, theirs: np.ndarray, most: int, precision: float = 0.0) -> tuple[int, bool]:
    # The repeats after which a run stops, and whether the difference was sure then.
    for count in range(LEAST_PAIRS, most + 1):
        found = pair_interval(np.exp(ours[:count]).tolist(), np.exp(theirs[:count]).tolist())
        if not found.low <= 1 <= found.high:
            return count, True
        if found.high <= 1 + precision and found.low >= 1 / (1 + precision):
            return count, False
    return most, False


def test_seldom_is_a_start_told_apart_from_itself(logarithms: dict[tuple[Any, ...], np.ndarray]) -> None:
    # Identical arms: both are drawn from the same rows, of one image and kind of start, each less its cell's mean.
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (image, _, _, start, arm), values in logarithms.items():
        if arm == BASELINE:
            groups[image, start].extend(values - values.mean())
    rng, runs, most = np.random.default_rng(20), 200, 30
    alarms = plain = 0
    pools = [np.array(values) for values in groups.values()]
    assert len(pools) == 21
    for run in range(runs):
        pool = pools[run % len(pools)]
        ours, theirs = rng.choice(pool, most), rng.choice(pool, most)
        alarms += _sure_at(ours, theirs, most)[1]
        ends = [student.one_mean(ours[:n] - theirs[:n]).interval(0.95) for n in range(LEAST_PAIRS, most + 1)]
        plain += any(not low <= 0 <= high for low, high in ends)
    assert alarms <= 16
    # An interval that is made for one look is wrong far more often when it is looked at after each repeat.
    assert plain > 32


def test_thirty_percent_fewer_starts_give_the_same_verdicts(logarithms: dict[tuple[Any, ...], np.ndarray]) -> None:
    rng, fixed = np.random.default_rng(5), 10
    used = runs = undecided = undecided_fixed = 0
    for key, ours in logarithms.items():
        *place, arm = key
        theirs = logarithms.get((*place, BASELINE))
        if place[3] != "cold" or arm == BASELINE or theirs is None:
            continue
        for _ in range(2):
            # Three values less their mean vary too little, by a third.
            drawn = [rng.choice(each - each.mean(), fixed) * math.sqrt(1.5) + each.mean() for each in (ours, theirs)]
            count, sure = _sure_at(drawn[0], drawn[1], fixed, precision=0.05)
            low, high = student.one_mean(drawn[0] - drawn[1]).interval(0.95)
            used, runs = used + count, runs + 1
            undecided, undecided_fixed = undecided + (not sure), undecided_fixed + (low <= 0 <= high)
    assert runs > 200
    assert used / (runs * fixed) <= 0.7
    assert undecided - undecided_fixed <= 0.03 * runs


def test_the_interval_ends_where_the_e_value_is_one_in_alpha() -> None:
    ours, theirs = [1.0, 1.2, 1.1, 1.3], [2.0, 2.1, 2.3, 2.2]
    for alpha in (0.05, 0.001):
        found = pair_interval(ours, theirs, alpha)
        assert found.p(found.low) == pytest.approx(alpha)
        assert found.p(found.high) == pytest.approx(alpha)
        assert found.p(found.median) == 1.0
        assert found.p(found.high * 1.1) < alpha
    assert found.median == pytest.approx(math.exp(np.mean(np.log(ours) - np.log(theirs))))


def test_the_e_value_is_the_mixture_of_likelihoods() -> None:
    # By quadrature over effects and standard deviations (density 1/sigma) of the pairs' logarithms.
    logs = np.array([0.3, 0.5, 0.2, 0.45, 0.1])
    sigma = np.geomspace(0.005, 200, 4000)
    ratio, weight = np.gradient(np.log(sigma)), np.linspace(-30, 30, 4001)

    def likelihood(shift: np.ndarray) -> np.ndarray:
        squares = ((logs[:, None] / sigma - shift) ** 2).sum(axis=0)
        return np.exp(-squares / 2) / sigma ** len(logs)

    null = float((likelihood(np.zeros_like(sigma)) * ratio).sum())
    density = np.exp(-(weight**2) / 60) / math.sqrt(60 * math.pi) * (weight[1] - weight[0])
    mixed = sum(
        float((likelihood(np.full_like(sigma, w)) * ratio).sum()) * d for w, d in zip(weight, density, strict=True)
    )
    found = pair_interval(np.exp(logs).tolist(), [1.0] * 5)
    assert found.p(1.0) == pytest.approx(null / mixed, rel=2e-3)


def test_few_pairs_say_nothing() -> None:
    for count in (1, 2):
        found = pair_interval([1.0] * count, [2.0] * count)
        assert (found.low, found.high, found.p(5.0)) == (0.0, math.inf, 1.0)
    assert half_width(1.0, 3, 1e-9) == math.inf
    assert half_width(1.0, 30) < half_width(1.0, 10) < half_width(1.0, 4)
    exact = pair_interval([1.0] * 3, [2.0] * 3)
    assert (exact.low, exact.high, exact.p(1.0)) == (0.5, 0.5, 0.0)
    for ours, theirs in (([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0])):
        with pytest.raises(ValueError, match="positive samples"):
            pair_interval(ours, theirs)
