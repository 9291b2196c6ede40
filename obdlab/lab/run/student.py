"""Student's t distribution with any degrees of freedom, and Welch's comparison of two means.

With T = √ν tan θ the density becomes a power of cos θ (W. S. Gosset's integral, 1908), which is integrated here by
Gauss's rule: no dependency for two functions. Degrees of freedom of samples of one size are Welch's and
Satterthwaite's (B. L. Welch, Biometrika 34, 1947). With unequal sizes these promise too much (3 against 10 normal
values: 92 %), so those of the smallest sample count, which holds for all (P. L. Hsu, 1938).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)
_HALVINGS = 80


@dataclass(frozen=True, slots=True)
class Normal:
    """An estimate whose error is nearly normal: its centre, standard error and degrees of freedom."""

    centre: float
    error: float
    freedom: float

    def p(self, bound: float) -> float:
        """Return the two-sided probability of so large a distance from ``bound`` if ``bound`` were the truth."""
        if self.is_at(bound):
            return 1.0
        return two_sided(abs(self.centre - bound) / self.error, self.freedom) if self.error else 0.0

    def is_at(self, bound: float) -> bool:
        """Return True if the centre equals ``bound`` to rounding."""
        return math.isclose(self.centre, bound, rel_tol=1e-12, abs_tol=1e-12)

    def interval(self, level: float) -> tuple[float, float]:
        """Return the ends of the interval that holds the truth with probability ``level``."""
        reach = quantile(level, self.freedom) * self.error if self.error else 0.0
        return self.centre - reach, self.centre + reach


def one_mean(values: Samples) -> Normal:
    """Return the mean of at least two values, as an estimate."""
    return Normal(float(values.mean()), math.sqrt(square_error(values)), len(values) - 1.0)


def difference(above: Samples, below: Samples) -> Normal:
    """Return the difference of the means of at least two values each, as an estimate."""
    return combination([(above, 1.0), (below, -1.0)])


def combination(parts: list[tuple[Samples, float]]) -> Normal:
    """Return the sum of means times their factors, of at least two values each, as an estimate."""
    centre = sum(factor * float(values.mean()) for values, factor in parts)
    squares = [factor**2 * square_error(values) for values, factor in parts]
    total = sum(squares)
    spread = sum(square**2 / (len(values) - 1) for square, (values, _) in zip(squares, parts, strict=True))
    sizes = {len(values) for values, _ in parts}
    freedom = total**2 / spread if spread and len(sizes) == 1 else min(sizes) - 1.0
    return Normal(centre, math.sqrt(total), freedom)


def slope(places: Samples, values: Samples) -> Normal:
    """Return the slope of the least-squares line through at least three values, at two places or more."""
    apart = places - places.mean()
    square = float(apart @ apart)
    centre = float(apart @ values) / square
    rest = values - values.mean() - centre * apart
    freedom = len(values) - 2.0
    # Rounding is no spread.
    spread = float(rest @ rest) if np.ptp(rest) > 1e-12 * float(np.abs(values).max()) else 0.0
    return Normal(centre, math.sqrt(spread / freedom / square), freedom)


def square_error(values: Samples) -> float:
    """Return the square of the mean's standard error. Equal values have none: their sum's rounding is no spread."""
    return 0.0 if np.ptp(values) == 0 else float(values.var(ddof=1)) / len(values)


@lru_cache(4096)
def two_sided(t: float, freedom: float) -> float:
    """Return P(|T| > ``t``) for t >= 0 and at least one degree of freedom."""
    begin = math.atan(t / math.sqrt(freedom))
    half = (math.pi / 2 - begin) / 2
    angles = begin + half * (_NODES + 1)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return min(1.0, 2 * scale * half * float(_WEIGHTS @ np.cos(angles) ** (freedom - 1)))


@lru_cache(4096)
def quantile(level: float, freedom: float) -> float:
    """Return the t >= 0 with P(|T| <= t) = ``level``."""
    low, high = 0.0, math.pi / 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if two_sided(math.sqrt(freedom) * math.tan(middle), freedom) > 1 - level:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)
