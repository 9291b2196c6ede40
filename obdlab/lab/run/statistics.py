"""Medians, ratios and effect sizes of small samples, with intervals that hold what they say.

- A median's interval has two order statistics for ends, chosen by the binomial distribution: it holds the true median
  in at least 95 of 100 cases, for any distribution (W. R. Thompson, 1936). That takes six samples. Fewer have no
  95 % interval: texts show their range instead, in other brackets.
- A ratio's interval is Welch's, of logarithms. It assumes that the arms differ by a factor; their spreads may differ,
  and three samples are enough.
- A verdict on several comparisons at once is corrected for their number by Holm's procedure (:func:`holm`).

``tests/lab/run/test_coverage.py`` shows the coverage by simulation. No sample is left out: reports name wild ones
(:func:`outliers`). Samples must be independent: starts of one attempt are one (``rows.one_per_attempt``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from obdlab.lab.run import student

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_Key = TypeVar("_Key")
LEVEL = 0.95
#: The chance of any false verdict in a family of comparisons.
ALPHA = 1 - LEVEL
_LEAST_FOR_OUTLIERS = 5


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median or ratio, the ends of its interval, and the number of independent samples.

    ``is_range``: too few samples for a 95 % interval; the ends are those of all samples. A single sample has neither:
    ``low`` and ``high`` are the sample itself, and no text or bar shows them.
    """

    median: float
    low: float
    high: float
    count: int
    is_range: bool = False
    #: The estimate's logarithm for tests; None for one sample, or samples that are not all positive.
    logarithm: student.Normal | None = field(default=None, repr=False, compare=False)

    @property
    def has_interval(self) -> bool:
        """Return True if there are enough samples for an interval or a range."""
        return self.count > 1

    def __str__(self) -> str:
        return self.text(".3g")

    def text(self, form: str) -> str:
        """Return "median [low, high]" with each number in ``form``, "median (low to high)" for a range.

        Without either the median alone.
        """
        if not self.has_interval:
            return format(self.median, form)
        low, high = format(self.low, form), format(self.high, form)
        return f"{self.median:{form}} ({low} to {high})" if self.is_range else f"{self.median:{form}} [{low}, {high}]"

    def p(self, bound: float) -> float:
        """Return the two-sided p-value against the truth being ``bound``; 1 if nothing can be said."""
        return 1.0 if self.logarithm is None or bound <= 0 else self.logarithm.p(math.log(bound))

    def is_below(self, bound: float) -> bool:
        """Return True if the estimate that is tested lies below ``bound``, not at it."""
        logarithm = self.logarithm
        return logarithm is not None and logarithm.centre < math.log(bound) and not logarithm.is_at(math.log(bound))


def median_interval(samples: Sequence[float]) -> Estimate:
    """Return the median of ``samples`` and its interval, or their range. Raises ValueError without samples."""
    values = np.sort(_checked(samples))
    count = len(values)
    outside = _outside(count)
    ends = float(values[outside]), float(values[count - 1 - outside])
    positive = count > 1 and values[0] > 0
    logarithm = student.one_mean(np.log(values)) if positive else None
    return Estimate(float(np.median(values)), *ends, count, 1 < count < _least_for_interval(), logarithm)


def ratio_interval(samples: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Return median(samples) / median(baseline) and its 95 % interval.

    There is no interval if either side is one sample. Raises ValueError unless all samples are positive.
    """
    above, below = _checked(samples), _checked(baseline)
    if min(above.min(), below.min()) <= 0:
        raise ValueError(f"wanted positive samples for a ratio (got {min(above.min(), below.min()):g})")
    ratio, count = float(np.median(above) / np.median(below)), min(len(above), len(below))
    if count == 1:
        return Estimate(ratio, ratio, ratio, 1)
    logarithm = student.difference(np.log(above), np.log(below))
    low, high = (_exponential(end) for end in logarithm.interval(LEVEL))
    # The ratio of medians, which texts show, is seldom outside the interval of the ratio of geometric means.
    return Estimate(ratio, min(low, ratio), max(high, ratio), count, logarithm=logarithm)


def shift_interval(samples: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Return the shift of ``samples`` above ``baseline`` in their unit, with its interval or the differences' range.

    The Hodges-Lehmann estimate: the median of the differences of all pairs (J. L. Hodges, E. L. Lehmann, 1963). Its
    exact interval has two of these differences for ends, by the distribution of Mann and Whitney's U.
    """
    above, below = _checked(samples), _checked(baseline)
    differences = np.sort((above[:, None] - below[None, :]).ravel())
    outside = _outside_pairs(len(above), len(below))
    ends = float(differences[max(0, outside - 1)]), float(differences[len(differences) - max(1, outside)])
    shift, count = float(np.median(differences)), min(len(above), len(below))
    if count == 1:
        return Estimate(shift, shift, shift, 1)
    return Estimate(shift, *ends, count, outside == 0)


def share_interval(
    samples: Sequence[float], whole: Sequence[float], base: Sequence[float]
) -> tuple[Estimate, float] | None:
    """Return (samples - base) / (whole - base) with its 95 % interval, and the p-value against the share being 1.

    Ratios of medians above the median of ``base``; the interval is Fieller's, which knows of the errors of all three
    (E. C. Fieller, 1954). None unless ``whole`` is surely above ``base``. One sample has neither interval nor doubt
    about the gap.
    """
    parts = [_checked(each) for each in (samples, whole, base)]
    middles = [float(np.median(each)) for each in parts]
    count, gap = min(map(len, parts)), middles[1] - middles[2]
    if gap <= 0 or (count > 1 and student.difference(parts[1], parts[2]).interval(LEVEL)[0] <= 0):
        return None
    share = (middles[0] - middles[2]) / gap
    if count == 1:
        return Estimate(share, share, share, 1), 1.0
    ends = [share]
    # The share s is possible while samples - s whole - (1 - s) base does not surely differ from 0: a quadratic in s.
    mixed = student.combination([(parts[0], 1.0), (parts[1], -share), (parts[2], share - 1)])
    reach = student.quantile(LEVEL, mixed.freedom) ** 2
    means, squares = zip(*((float(each.mean()), student.square_error(each)) for each in parts), strict=True)
    above, all_of = means[0] - means[2], means[1] - means[2]
    a = all_of**2 - reach * (squares[1] + squares[2])
    b = above * all_of - reach * squares[2]
    c = above**2 - reach * (squares[0] + squares[2])
    if a <= 0:
        return None
    root = math.sqrt(max(0.0, b * b - a * c))
    ends += [(b - root) / a, (b + root) / a]
    against_whole = student.difference(parts[0], parts[1])
    # Equal samples at the whole are surely at it.
    p = 0.0 if against_whole.error == 0 else against_whole.p(0.0)
    return Estimate(share, min(ends), max(ends), count), p


def cliffs_delta(samples: Sequence[float], baseline: Sequence[float]) -> float:
    """Return Cliff's delta (N. Cliff, 1993): the share of pairs with the sample above the baseline, less that below.

    -1: every sample is below every baseline sample; 0: as many pairs above as below; 1: every sample is above.
    """
    above, below = _checked(samples), _checked(baseline)
    return float(np.sign(above[:, None] - below[None, :]).mean())


def holm(p_values: Mapping[_Key, float], alpha: float = ALPHA) -> set[_Key]:
    """Return the comparisons that are sure, with at most ``alpha`` for any false one among all (S. Holm, 1979)."""
    sure: set[_Key] = set()
    for place, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > alpha / (len(p_values) - place):
            break
        sure.add(key)
    return sure


def outliers(samples: Sequence[float]) -> list[int]:
    """Return the places of samples more than three interquartile ranges outside the quartiles (Tukey's "far out").

    Among fewer than five samples there are no outliers.
    """
    values = _checked(samples)
    if len(values) < _LEAST_FOR_OUTLIERS:
        return []
    low, high = np.percentile(values, [25, 75])
    reach = 3 * (high - low)
    return [int(place) for place in np.flatnonzero((values < low - reach) | (values > high + reach))]


# How many order statistics lie outside the interval of a median at either end.
@cache
def _outside(count: int) -> int:
    outside, tail = 0, 0.0
    while True:
        tail += math.comb(count, outside) / 2**count
        if 2 * tail > ALPHA or 2 * outside >= count:
            return max(0, outside - 1)
        outside += 1


@cache
def _least_for_interval() -> int:
    return next(count for count in range(2, 64) if 2 / 2**count <= ALPHA)


# The rank, from 1, of the difference at the lower end of a shift's interval; 0 if no rank reaches 95 %.
@cache
def _outside_pairs(above: int, below: int) -> int:
    ways = _ways(above, below)
    total, tail, rank = math.comb(above + below, above), 0, 0
    while rank < len(ways):
        tail += ways[rank]
        if 2 * tail > ALPHA * total:
            return rank
        rank += 1
    return 0


# The number of orders of two samples with U = 0, 1, ...: coefficients of Gauss's binomial.
def _ways(above: int, below: int) -> list[int]:
    size = above * below + 1
    ways = [1, *[0] * (size - 1)]
    for one in range(1, above + 1):
        for u in range(size - 1, below + one - 1, -1):
            ways[u] -= ways[u - below - one]
        for u in range(one, size):
            ways[u] += ways[u - one]
    return ways


# Intervals of two scattered samples may be wider than a float.
def _exponential(value: float) -> float:
    return math.exp(min(700.0, max(-700.0, value)))


def _checked(samples: Sequence[float]) -> student.Samples:
    values = np.asarray(samples, dtype=float)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"wanted at least one finite sample (got {list(samples)})")
    return values
