"""Verdicts on claims, from measured ratios and numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from obdlab.lab.paper.results import LEAST, busy

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
    NOT_YET = "not yet"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict with its evidence: ``measured`` in words, the experiments, and the number of rows used."""

    verdict: Verdict
    measured: str = ""
    because: str = ""
    confidence: str = ""
    runs: tuple[Run, ...] = field(default=())
    rows: int = 0


def of_ratio(
    ratio: Estimate | None,
    *,
    what: str,
    paper: str,
    below: float,
    enough: float,
    used: Sequence[Row],
    run: Run,
) -> Outcome:
    """Return the verdict on a ratio that must be below ``below``; ``paper`` is the paper's ratio in words, or "".

    Reproduced: the interval lies below ``below`` and the median is at most ``enough``. Shape only: the interval lies
    below, the median is above ``enough``. Not reproduced: the interval lies at or above ``below``. Unclear: the
    interval holds ``below``, or there is no interval.
    """
    if ratio is None:
        return Outcome(Verdict.NOT_MEASURED, runs=(run,))
    told = f"{what}: {ratio.text('.2f')}" + (f" (paper: {paper})" if paper else "")
    if not ratio.has_interval:
        verdict = Verdict.UNCLEAR
    elif ratio.high < below:
        verdict = Verdict.REPRODUCED if ratio.median <= enough else Verdict.SHAPE_ONLY
    elif ratio.low >= below:
        verdict = Verdict.NOT_REPRODUCED
    else:
        verdict = Verdict.UNCLEAR
    return Outcome(verdict, told, "", confidence(ratio.count, used), (run,), len(used))


def of_number(
    value: Estimate | None,
    *,
    what: str,
    unit: str,
    least: float | None,
    most: float | None,
    used: Sequence[Row],
    run: Run,
) -> Outcome:
    """Return the verdict on a number whose whole interval must lie within the bounds."""
    if value is None:
        return Outcome(Verdict.NOT_MEASURED, runs=(run,))
    low, high = least if least is not None else float("-inf"), most if most is not None else float("inf")
    told = f"{what}: {value.text('.3g')} {unit}"
    if not value.has_interval:
        verdict = Verdict.UNCLEAR
    elif low <= value.low and value.high <= high:
        verdict = Verdict.REPRODUCED
    elif value.high < low or value.low > high:
        verdict = Verdict.NOT_REPRODUCED
    else:
        verdict = Verdict.UNCLEAR
    return Outcome(verdict, told, "", confidence(value.count, used), (run,), len(used))


def confidence(count: int, used: Sequence[Row]) -> str:
    """Return the confidence in a verdict in words, from the number of samples and the load of the host."""
    if count < LEAST:
        return f"low: {count} sample{'s' if count > 1 else ''}"
    level = "high" if count >= 10 else "fair"
    return f"low: {count} samples, busy host" if busy(used) else f"{level}: {count} samples"
