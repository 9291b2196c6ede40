"""An always-valid interval for the ratio of two arms: a run may look at it after every repeat, and stop on it.

Arms are interleaved, so repeat k of one and repeat k of the other are a pair, and the logarithms of the pairs' ratios
are nearly normal. Under a normal distribution of unknown mean and variance, the likelihood ratio of the t statistic,
mixed over effects of a normal distribution in units of the standard deviation, is an e-process: the chance that it
ever exceeds 1/alpha is at most alpha. It has a closed form, here solved for the mean. Sources: T. L. Lai, Annals of
Statistics 4, 1976 (mixtures of t tests); M. F. Perez-Ortiz and others, "E-statistics, group invariance and
anytime-valid testing", Annals of Statistics 52, 2024 (the proof); H. Wang, A. Ramdas, "Anytime-valid t-tests and
confidence sequences for Gaussian means with unknown variance", 2023 (the interval).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from obdlab.lab.run import student
from obdlab.lab.run.statistics import ALPHA, Estimate

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Variance of the mixed effects. Arms usually differ by many standard deviations of a start; intervals of three to
#: thirty pairs are within a tenth of the narrowest for any value from 10 to 100.
_EFFECTS = 30.0
#: With fewer pairs nothing is sure: two equal times would be.
LEAST_PAIRS = 3


def pair_interval(samples: Sequence[float], baseline: Sequence[float], alpha: float = ALPHA) -> Estimate:
    """Return the ratio of ``samples`` to ``baseline``, pair by pair, with its always-valid interval.

    The ratio is the geometric mean. The interval is unbounded with fewer than LEAST_PAIRS pairs, or if so few pairs
    cannot exclude anything at ``alpha``. Raises ValueError unless the sides are of one length and positive.
    """
    if len(samples) != len(baseline) or not samples or min(*samples, *baseline) <= 0:
        raise ValueError(f"wanted as many positive samples on either side (got {len(samples)} and {len(baseline)})")
    logs = np.log(np.asarray(samples, float)) - np.log(np.asarray(baseline, float))
    middle, count = float(logs.mean()), len(logs)
    spread = float(logs.std(ddof=1)) if count >= LEAST_PAIRS else math.inf
    reach = half_width(spread, count, alpha) if count >= LEAST_PAIRS else math.inf
    low, high = (math.exp(end) if end < 700 else math.inf for end in (middle - reach, middle + reach))
    return Estimate(math.exp(middle), low, high, count, logarithm=PairedLogarithms(middle, spread, count - 1.0))


class PairedLogarithms(student.Normal):
    """The mean of pairs' logarithms; ``error`` is their standard deviation, and p-values may be taken at any time."""

    def p(self, bound: float) -> float:
        """Return the inverse of the e-value against ``bound``: at most alpha with at most that chance, ever."""
        if not math.isfinite(self.error) or self.is_at(bound):
            return 1.0
        if self.error == 0:
            return 0.0
        count = self.freedom + 1
        x, mixed = ((self.centre - bound) / self.error) ** 2 * count / self.freedom, 1 + count * _EFFECTS
        return min(1.0, math.sqrt(mixed) * math.pow((1 + x / mixed) / (1 + x), count / 2))


def half_width(deviation: float, count: int, alpha: float = ALPHA) -> float:
    """Return the distance of the interval's ends from the mean of ``count`` >= 2 values; inf if it is unbounded."""
    freedom, mixed = count - 1, 1 + count * _EFFECTS
    # The e-value as a function of x = t^2 / freedom is sqrt(1/mixed) * ((1 + x) / (1 + x/mixed)) ** (count / 2).
    least = (math.sqrt(mixed) / alpha) ** (2 / count)
    if least >= mixed:
        return math.inf
    x = (least - 1) / (1 - least / mixed)
    return deviation * math.sqrt(x * freedom / count)
