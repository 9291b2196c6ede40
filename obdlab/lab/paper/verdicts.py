"""Verdicts on claims, from measured ratios and numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from obdlab.lab.paper.results import LEAST, busy
from obdlab.lab.run.statistics import ALPHA, holm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.lab.paper.questions import Run
    from obdlab.lab.run.rows import Row
    from obdlab.lab.run.statistics import Estimate


class Verdict(Enum):
    """The verdict on a claim."""

    REPRODUCED = "reproduced"
    SHAPE_ONLY = "shape only"
    NOT_REPRODUCED = "not reproduced"
    UNCLEAR = "unclear"
    NOT_RUNNABLE = "not runnable here"
    NOT_MEASURED = "not measured"
    #: Of simulated rows, which are no evidence of machines.
    SIMULATED = "holds in simulation"
    SIMULATED_NOT = "fails in simulation"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict with its evidence: ``measured`` in words, the experiments, and the number of rows used.

    ``p`` is the p-value that the verdict rests on; None if it rests on no statistic.
    """

    verdict: Verdict
    measured: str = ""
    because: str = ""
    confidence: str = ""
    runs: tuple[Run, ...] = field(default=())
    rows: int = 0
    p: float | None = None


def corrected(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes with those verdicts unclear that do not stay sure among all of them (Holm's procedure)."""
    p_values = {place: outcome.p for place, outcome in enumerate(outcomes) if outcome.p is not None}
    sure = holm(p_values)
    return [
        replace(
            outcome, verdict=Verdict.UNCLEAR, measured=f"{outcome.measured}; not sure among {len(p_values)} tests"
        )
        if place in p_values and place not in sure and outcome.verdict in _SURE
        else outcome
        for place, outcome in enumerate(outcomes)
    ]


_SURE = (Verdict.REPRODUCED, Verdict.SHAPE_ONLY, Verdict.NOT_REPRODUCED)


def of_ratio(
    ratio: Estimate | None,
    *,
    what: str,
    paper: str,
    below: float,
    enough: float,
    used: Sequence[Row],
    run: Run,
    floor: float | None = None,
) -> Outcome:
    """Return the verdict on a ratio that must be below ``below``; ``paper`` is the paper's ratio in words, or "".

    Reproduced: the ratio is surely below ``below``, and its median at most ``enough``. Shape only: surely below, the
    median above ``enough``. Not reproduced: surely at or above ``below``. Unclear: not sure, or one sample. ``floor``
    is the difference of two identical arms from 1; a ratio that is no farther from ``below`` is unclear.
    """
    if ratio is None:
        return Outcome(Verdict.NOT_MEASURED, runs=(run,))
    told = f"{what}: {ratio.text('.2f')}" + (f" (paper: {paper})" if paper else "")
    p, verdict = _p(ratio, below), Verdict.UNCLEAR
    if floor is not None and abs(ratio.median - below) <= floor:
        told += f"; identical arms differ by {floor:.2f}"
    elif p <= ALPHA and ratio.is_below(below):
        verdict = Verdict.REPRODUCED if ratio.median <= enough else Verdict.SHAPE_ONLY
    elif p <= ALPHA:
        verdict = Verdict.NOT_REPRODUCED
    trust = confidence(ratio.count, used) + (", no A/A" if floor is None else "")
    # One sample tests nothing.
    return Outcome(verdict, told, "", trust, (run,), len(used), p if ratio.has_interval else None)


# Equal samples at the bound are surely at it, so not below it.
def _p(estimate: Estimate, bound: float) -> float:
    exact = estimate.logarithm is not None and estimate.logarithm.error == 0
    return 0.0 if exact else estimate.p(bound)


def of_chosen(outcome: Outcome, count: int) -> Outcome:
    """Return the outcome of a test against one of ``count`` arms that was chosen by their samples.

    A test knows of no choice, so its p-value is multiplied by their number (Bonferroni).
    """
    if outcome.p is None or count < 2:
        return outcome
    p = min(1.0, outcome.p * count)
    if p <= ALPHA or outcome.verdict not in _SURE:
        return replace(outcome, p=p)
    told = f"{outcome.measured}; not sure against the best of {count}"
    return replace(outcome, verdict=Verdict.UNCLEAR, measured=told, p=p)


def of_number(
    value: Estimate | None,
    *,
    what: str,
    unit: str,
    least: float | None,
    most: float | None,
    used: Sequence[Row],
    run: Run,
    floor: float | None = None,
) -> Outcome:
    """Return the verdict on a number that must surely lie within the bounds; each is positive.

    A number no farther from a bound than ``floor``, the difference of two identical arms, is unclear.
    """
    if value is None:
        return Outcome(Verdict.NOT_MEASURED, runs=(run,))
    told = f"{what}: {value.text('.3g')} {unit}"
    below = [(_p(value, least), value.is_below(least))] if least is not None else []
    # A value exactly at the most is within.
    above = [(_p(value, most), not value.is_below(most) and not _is_at(value, most))] if most is not None else []
    outside = [p for p, is_outside in below + above if is_outside]
    # All bounds must be kept, and any of them can be broken.
    p = min(outside) if outside else max((p for p, _ in below + above), default=1.0)
    verdict = Verdict.UNCLEAR
    if floor is not None and any(abs(value.median - bound) <= floor for bound in (least, most) if bound is not None):
        told += f"; identical arms differ by {floor:.2f}"
    elif p <= ALPHA:
        verdict = Verdict.NOT_REPRODUCED if outside else Verdict.REPRODUCED
    trust = confidence(value.count, used)
    return Outcome(verdict, told, "", trust, (run,), len(used), p if value.has_interval else None)


def _is_at(value: Estimate, bound: float) -> bool:
    return value.logarithm is not None and value.logarithm.is_at(math.log(bound))


def confidence(count: int, used: Sequence[Row]) -> str:
    """Return the confidence in a verdict in words, from the number of samples and the load of the host."""
    if count < LEAST:
        return f"low: {count} sample{'s' if count > 1 else ''}"
    level = "high" if count >= 10 else "fair"
    return f"low: {count} samples, busy host" if busy(used) else f"{level}: {count} samples"
