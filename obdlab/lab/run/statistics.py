"""Medians, bootstrap confidence intervals, ratios and effect sizes of small samples.

A percentile bootstrap with a fixed seed: no assumption about the distribution, and the same samples give the same
interval. No sample is left out: a few wild samples hardly change medians and the effect sizes here. Reports name them
(:func:`outliers`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

Samples = npt.NDArray[np.float64]

RESAMPLES = 10_000
SEED = 14_15
# Fewer than for medians: all pairs of every resample are in memory at once.
_PAIR_RESAMPLES = 2_000
_LEAST_FOR_OUTLIERS = 5


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median, the ends of its 95 % confidence interval and the number of samples.

    A single sample has no interval: ``low`` and ``high`` are the sample itself, and no text or bar shows them.
    """

    median: float
    low: float
    high: float
    count: int

    @property
    def has_interval(self) -> bool:
        """Return True if there are enough samples for an interval."""
        return self.count > 1

    def __str__(self) -> str:
        return self.text(".3g")

    def text(self, form: str) -> str:
        """Return "median [low, high]" with each number in ``form``; without an interval the median alone."""
        if not self.has_interval:
            return format(self.median, form)
        return f"{self.median:{form}} [{self.low:{form}}, {self.high:{form}}]"


def median_interval(samples: Sequence[float]) -> Estimate:
    """Return the median of ``samples`` and its 95 % interval. Raises ValueError without samples."""
    values = _checked(samples)
    medians = _resampled_medians(values, np.random.default_rng(SEED))
    low, high = np.percentile(medians, [2.5, 97.5])
    return Estimate(float(np.median(values)), float(low), float(high), len(values))


def ratio_interval(samples: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Return median(samples) / median(baseline) and its 95 % interval, both sides resampled independently.

    There is no interval if either side is one sample.
    """
    above, below = _checked(samples), _checked(baseline)
    rng = np.random.default_rng(SEED)
    ratios = _resampled_medians(above, rng) / _resampled_medians(below, rng)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return _estimate(float(np.median(above) / np.median(below)), low, high, min(len(above), len(below)))


def shift_interval(samples: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Return the shift of ``samples`` above ``baseline`` and its 95 % interval, in the samples' unit.

    The Hodges-Lehmann estimate: the median of the differences of all pairs (J. L. Hodges, E. L. Lehmann, 1963).
    """
    above, below = _checked(samples), _checked(baseline)
    rng = np.random.default_rng(SEED)
    some_above = rng.choice(above, size=(_PAIR_RESAMPLES, len(above)))
    some_below = rng.choice(below, size=(_PAIR_RESAMPLES, len(below)))
    shifts = np.median(some_above[:, :, None] - some_below[:, None, :], axis=(1, 2))
    low, high = np.percentile(shifts, [2.5, 97.5])
    shift = float(np.median(above[:, None] - below[None, :]))
    return _estimate(shift, low, high, min(len(above), len(below)))


def cliffs_delta(samples: Sequence[float], baseline: Sequence[float]) -> float:
    """Return Cliff's delta (N. Cliff, 1993): the share of pairs with the sample above the baseline, less that below.

    -1: every sample is below every baseline sample; 0: as many pairs above as below; 1: every sample is above.
    """
    above, below = _checked(samples), _checked(baseline)
    return float(np.sign(above[:, None] - below[None, :]).mean())


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


def _estimate(middle: float, low: float, high: float, count: int) -> Estimate:
    return Estimate(middle, float(low), float(high), count) if count > 1 else Estimate(middle, middle, middle, count)


def _checked(samples: Sequence[float]) -> Samples:
    values = np.asarray(samples, dtype=float)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"wanted at least one finite sample (got {list(samples)})")
    return values


def _resampled_medians(values: Samples, rng: np.random.Generator) -> Samples:
    medians: Samples = np.median(rng.choice(values, size=(RESAMPLES, len(values))), axis=1)
    return medians
