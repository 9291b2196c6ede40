"""Intervals against the limits of a claim: at each limit, and a little to either side of it."""

from __future__ import annotations

from math import inf, log, nextafter
from typing import Any

import pytest

from obdlab.lab.paper.questions import START
from obdlab.lab.paper.verdicts import Outcome, Verdict, confidence, corrected, of_chosen, of_number, of_ratio
from obdlab.lab.run.rows import Row
from obdlab.lab.run.statistics import Estimate, ratio_interval
from obdlab.lab.run.student import Normal, quantile

QUIET: list[Row] = [{"quiet": True}, {"quiet": True}]


def _under(value: float) -> float:
    return value * (1 - 1e-6)


def _over(value: float) -> float:
    return value * (1 + 1e-6)


def _estimate(median: float, low: float, high: float, count: int) -> Estimate:
    # As if the samples' logarithms had given this interval.
    centre, reach = (log(low) + log(high)) / 2, (log(high) - log(low)) / 2
    known = None if count == 1 else Normal(centre, reach / quantile(0.95, 4.0), 4.0)
    return Estimate(median, low, high, count, logarithm=known)


@pytest.mark.parametrize(
    ("median", "low", "high", "count", "verdict"),
    [
        # The interval's upper end against the limit 1.1, with a median that is small enough.
        (0.4, 0.3, _under(1.1), 3, Verdict.REPRODUCED),
        (0.4, 0.3, _over(1.1), 3, Verdict.UNCLEAR),
        # The median against the ratio that is enough, 0.5.
        (nextafter(0.5, -inf), 0.3, 0.9, 3, Verdict.REPRODUCED),
        (0.5, 0.3, 0.9, 3, Verdict.REPRODUCED),
        (nextafter(0.5, inf), 0.3, 0.9, 3, Verdict.SHAPE_ONLY),
        # Neither end counts for "enough".
        (0.4, 0.3, 0.6, 3, Verdict.REPRODUCED),
        (0.6, 0.4, 0.7, 3, Verdict.SHAPE_ONLY),
        # The lower end against the limit. The median alone decides nothing.
        (1.2, _under(1.1), 1.3, 3, Verdict.UNCLEAR),
        (1.2, _over(1.1), 1.3, 3, Verdict.NOT_REPRODUCED),
        (1.0, 0.9, 1.3, 3, Verdict.UNCLEAR),
        # Two samples have an interval, one has none.
        (0.4, 0.3, 0.5, 2, Verdict.REPRODUCED),
        (0.4, 0.4, 0.4, 1, Verdict.UNCLEAR),
        (2.0, 2.0, 2.0, 1, Verdict.UNCLEAR),
    ],
)
def test_a_ratio_against_its_limits(median: float, low: float, high: float, count: int, verdict: Verdict) -> None:
    ratio = _estimate(median, low, high, count)
    found = of_ratio(ratio, what="a against b", paper="0.2", below=1.1, enough=0.5, used=QUIET, run=START)
    assert found.verdict is verdict
    assert (found.runs, found.rows) == ((START,), 2)


@pytest.mark.parametrize(
    ("low", "high", "least", "most", "verdict"),
    [
        (_over(2.0), _under(4.0), 2.0, 4.0, Verdict.REPRODUCED),
        (_under(2.0), 3.0, 2.0, 4.0, Verdict.UNCLEAR),
        (3.0, _over(4.0), 2.0, 4.0, Verdict.UNCLEAR),
        (1.0, 5.0, 2.0, 4.0, Verdict.UNCLEAR),
        # Below the least: only if the upper end is.
        (1.0, _under(2.0), 2.0, 4.0, Verdict.NOT_REPRODUCED),
        (1.0, _over(2.0), 2.0, 4.0, Verdict.UNCLEAR),
        # Above the most: only if the lower end is.
        (_over(4.0), 5.0, 2.0, 4.0, Verdict.NOT_REPRODUCED),
        (_under(4.0), 5.0, 2.0, 4.0, Verdict.UNCLEAR),
        # A missing limit allows every value.
        (1.1, 1e300, 1.0, None, Verdict.REPRODUCED),
        (1e-300, 3.9, None, 4.0, Verdict.REPRODUCED),
        (0.1, 0.9, 1.0, None, Verdict.NOT_REPRODUCED),
        (5.0, 6.0, None, 4.0, Verdict.NOT_REPRODUCED),
    ],
)
def test_a_number_against_its_bounds(
    low: float, high: float, least: float | None, most: float | None, verdict: Verdict
) -> None:
    # The median is within every bound of the table or outside with the interval: only the ends decide.
    limits: dict[str, Any] = {"least": least, "most": most}
    value = _estimate((low + high) / 2, low, high, 3)
    found = of_number(value, what="reads", unit="M/s", **limits, used=QUIET, run=START)
    assert found.verdict is verdict
    assert (found.runs, found.rows) == ((START,), 2)
    one = Estimate(low, low, low, 1)
    assert of_number(one, what="reads", unit="M/s", **limits, used=QUIET, run=START).verdict is Verdict.UNCLEAR


def test_the_evidence_is_given_in_words() -> None:
    value = Estimate(0.25, 0.2, 0.3, 3)
    of: dict[str, Any] = {"what": "a against b", "below": 1.0, "enough": 0.5, "used": QUIET, "run": START}
    assert of_ratio(value, paper="0.2", **of).measured == "a against b: 0.25 [0.20, 0.30] (paper: 0.2)"
    assert of_ratio(value, paper="", **of).measured == "a against b: 0.25 [0.20, 0.30]"
    assert of_ratio(Estimate(0.25, 0.25, 0.25, 1), paper="", **of).measured == "a against b: 0.25"
    number = of_number(value, what="reads", unit="M/s", least=None, most=None, used=QUIET, run=START)
    assert number.measured == "reads: 0.25 [0.2, 0.3] M/s"


def test_nothing_measured_has_no_evidence() -> None:
    nothing = Outcome(Verdict.NOT_MEASURED, "", "", "", (START,), 0)
    assert of_ratio(None, what="a", paper="1", below=1.0, enough=0.5, used=QUIET, run=START) == nothing
    assert of_number(None, what="a", unit="s", least=None, most=None, used=QUIET, run=START) == nothing
    assert Outcome(Verdict.NOT_RUNNABLE) == Outcome(Verdict.NOT_RUNNABLE, "", "", "", (), 0)


@pytest.mark.parametrize(
    ("count", "quiet", "text"),
    [
        (1, True, "low: 1 sample"),
        (2, True, "low: 2 samples"),
        (2, False, "low: 2 samples"),
        (3, True, "fair: 3 samples"),
        (9, True, "fair: 9 samples"),
        (10, True, "high: 10 samples"),
        (3, False, "low: 3 samples, busy host"),
        (10, False, "low: 10 samples, busy host"),
    ],
)
def test_confidence_comes_from_the_number_of_samples_and_the_load(count: int, quiet: bool, text: str) -> None:
    # One busy row is enough; a row that knows nothing of the load is not busy.
    assert confidence(count, [{"quiet": True}, {"quiet": quiet}, {}]) == text


def test_a_difference_as_small_as_between_identical_arms_is_none() -> None:
    ratio = ratio_interval([0.95, 0.951, 0.952], [1.0, 1.001, 1.002])
    about: dict[str, Any] = {"what": "a", "paper": "", "below": 1.0, "enough": 0.99, "used": QUIET, "run": START}
    found = of_ratio(ratio, **about, floor=0.04)
    assert (found.verdict, found.confidence) == (Verdict.REPRODUCED, "fair: 3 samples")
    assert of_ratio(ratio, **about).confidence == "fair: 3 samples, no A/A"
    noise = of_ratio(ratio, **about, floor=0.06)
    assert noise.verdict is Verdict.UNCLEAR
    assert noise.measured.endswith("; identical arms differ by 0.06")


def test_a_test_against_the_best_of_several_is_corrected_for_the_choice() -> None:
    sure = Outcome(Verdict.NOT_REPRODUCED, "x", p=0.02)
    assert of_chosen(sure, 1) == sure
    assert of_chosen(sure, 2) == Outcome(Verdict.NOT_REPRODUCED, "x", p=0.04)
    assert of_chosen(sure, 3) == Outcome(Verdict.UNCLEAR, "x; not sure against the best of 3", p=0.06)
    assert of_chosen(Outcome(Verdict.UNCLEAR, "x", p=0.6), 3) == Outcome(Verdict.UNCLEAR, "x", p=1.0)
    # One sample tests nothing.
    one = Outcome(Verdict.UNCLEAR, "x")
    assert of_chosen(one, 3) == one


def test_a_verdict_must_stay_sure_among_all_of_them() -> None:
    def outcome(verdict: Verdict, p: float | None) -> Outcome:
        return Outcome(verdict, "x", p=p)

    outcomes = [
        outcome(Verdict.REPRODUCED, 0.04),
        outcome(Verdict.NOT_RUNNABLE, None),
        outcome(Verdict.NOT_REPRODUCED, 0.01),
        outcome(Verdict.UNCLEAR, 0.6),
        outcome(Verdict.REPRODUCED, None),
    ]
    found = corrected(outcomes)
    assert [each.verdict for each in found] == [
        Verdict.UNCLEAR,
        Verdict.NOT_RUNNABLE,
        Verdict.NOT_REPRODUCED,
        Verdict.UNCLEAR,
        Verdict.REPRODUCED,
    ]
    assert found[0].measured == "x; not sure among 3 tests"
    assert [each.measured for each in found[1:]] == ["x"] * 4
    # By itself it is sure.
    assert corrected(outcomes[:2]) == outcomes[:2]
