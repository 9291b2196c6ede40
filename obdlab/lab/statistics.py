"""Medians, bootstrap confidence intervals and ratios of small samples.

A percentile bootstrap of the median with a fixed seed: no assumption about the distribution, and the same rows give
the same interval.
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


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median, the ends of its 95 % confidence interval and the number of samples."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


def median_interval(samples: Sequence[float]) -> Estimate:
    """Return the median of ``samples`` and its 95 % interval. Raises ValueError when there are none."""
    values = _checked(samples)
    medians = _resampled_medians(values, np.random.default_rng(SEED))
    low, high = np.percentile(medians, [2.5, 97.5])
    return Estimate(float(np.median(values)), float(low), float(high), len(values))


def ratio_interval(samples: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Return median(samples) / median(baseline) and its 95 % interval, both sides resampled independently."""
    above, below = _checked(samples), _checked(baseline)
    rng = np.random.default_rng(SEED)
    ratios = _resampled_medians(above, rng) / _resampled_medians(below, rng)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Estimate(float(np.median(above) / np.median(below)), float(low), float(high), min(len(above), len(below)))


def _checked(samples: Sequence[float]) -> Samples:
    values = np.asarray(samples, dtype=float)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"wanted at least one finite sample (got {list(samples)})")
    return values


def _resampled_medians(values: Samples, rng: np.random.Generator) -> Samples:
    medians: Samples = np.median(rng.choice(values, size=(RESAMPLES, len(values))), axis=1)
    return medians
