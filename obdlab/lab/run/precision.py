"""How many repeats a precision needs, from a pilot's rows, and when a run has enough.

Both look at the first metric of a kind (of container starts: the cold start's total), pair by pair of interleaved
repeats.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from obdlab.errors import ObdlabError
from obdlab.lab.images.recipe import image_label
from obdlab.lab.run import sequential, student
from obdlab.lab.run.pairs import key_of, point_of, value_of
from obdlab.lab.run.rows import AA_SUFFIX
from obdlab.lab.run.statistics import ALPHA, LEVEL, Estimate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from obdlab.lab.kinds.kind import Value
    from obdlab.lab.run.rows import Row
    from obdlab.lab.run.spec import Cell, Spec

#: A precision that needs more repeats than this is out of reach.
MOST_REPEATS = 1000
# The true spread is above the one planned with by a chance of one in five (the normal distribution's quantile): a
# pilot of three says little of it.
_ABOVE_SIGMAS = 0.8416
_RUNS, _SEED, _MOST_SIMULATED = 400, 20, 200

#: The values of a point's axes without the arm, as JSON.
Place = str


class PilotError(ObdlabError):
    """A pilot's rows say nothing of the planned experiment, or the wanted precision is no share."""


class Stopping:
    """The decisions of a run with a ``precision``: which comparisons have enough repeats.

    A comparison is decided once its always-valid interval leaves out 1 (a difference is sure), or lies within the
    precision around 1 (no larger difference is possible). Intervals are corrected for the number of comparisons in
    the report: those of warm and dropped starts are tested beside those of cold ones.
    """

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._values: dict[tuple[Place, Value], dict[int, float]] = defaultdict(dict)
        self._others = [arm for arm in spec.arms if arm != spec.baseline and not _is_second(arm)]
        places = {_place(spec, point) for point in spec.points()}
        # With fewer tests than the report has, an arm that is sure here would be within the noise there.
        starts = 1 + sum(bool(spec.options.get(key)) for key in ("warm_starts", "dropped_starts"))
        self._alpha = ALPHA / max(1, starts * len(places) * len(self._others))

    def add(self, cell: Cell, rows: Iterable[Row]) -> None:
        """Take the good rows of a measured cell into account."""
        found = value_of(self._spec, rows)
        if found is not None:
            self._values[_place(self._spec, cell.point), cell.point[self._spec.arm_axis]][cell.repeat] = found

    def is_enough(self, cell: Cell) -> bool:
        """Return True if the cell need not be measured.

        The baseline and its second arm are measured as long as any comparison at their place is open.
        """
        if not self._spec.precision or cell.repeat < sequential.LEAST_PAIRS:
            return False
        place, arm = _place(self._spec, cell.point), cell.point[self._spec.arm_axis]
        asked = [arm] if arm in self._others else self._others
        return bool(asked) and all(self._is_decided(place, each, cell.repeat) for each in asked)

    # Of the repeats before ``repeat`` alone: a decision must not look ahead.
    def _is_decided(self, place: Place, arm: Value, repeat: int) -> bool:
        found = self._estimate(place, arm, repeat)
        if found is None:
            return False
        width = 1 + self._spec.precision
        return not found.low <= 1 <= found.high or (found.high <= width and found.low >= 1 / width)

    def _estimate(self, place: Place, arm: Value, before: float) -> Estimate | None:
        ours, theirs = self._values.get((place, arm), {}), self._values.get((place, self._spec.baseline), {})
        both = sorted(repeat for repeat in set(ours) & set(theirs) if repeat < before)
        if not both:
            return None
        return sequential.pair_interval([ours[each] for each in both], [theirs[each] for each in both], self._alpha)


@dataclass(frozen=True, slots=True)
class Need:
    """The repeats that a comparison needs: all measured (``repeats``), or stopped early (``stopped``, on average)."""

    place: str
    arm: str
    ratio: float
    pilot: int
    repeats: int
    stopped: float

    def line(self) -> str:
        """Return the need in words."""
        few = f"{self.repeats}" if self.repeats < MOST_REPEATS else f"more than {MOST_REPEATS}"
        return (
            f"{self.place}: {self.arm}: ×{self.ratio:.2f} in {self.pilot} pairs of the pilot; {few} repeats, or "
            f"{self.stopped:.1f} on average if it stops early"
        )


def needs(spec: Spec, pilot: Sequence[Row], precision: float) -> list[Need]:
    """Return the needs of each comparison of ``spec`` that the pilot's rows have, in the spec's order.

    ``precision`` is a share: 0.05 for a ratio known to 5 % either way. The pilot's spread is increased, as few
    samples say little of it. Raises PilotError.
    """
    if not 0 < precision < 1:
        raise PilotError(f"precision: wanted a share between 0 and 1 (got {precision:g})")
    values = _by_point(spec, pilot)
    found = []
    for point in spec.points():
        arm = point[spec.arm_axis]
        if arm == spec.baseline or _is_second(arm):
            continue
        ours, theirs = (values.get(key_of(spec, {**point, spec.arm_axis: each}), []) for each in (arm, spec.baseline))
        if min(len(ours), len(theirs)) < 2:
            continue
        place = ", ".join(image_label(str(value)) for axis, value in point.items() if axis != spec.arm_axis)
        found.append(_need(place, str(arm), np.log(ours), np.log(theirs), precision, spec.repeats))
    if not found:
        raise PilotError(
            f"{spec.name}: the pilot has no comparison of it (wanted two rows of an arm and the baseline)"
        )
    return found


def _need(place: str, arm: str, ours: student.Samples, theirs: student.Samples, precision: float, most: int) -> Need:
    shift = float(ours.mean() - theirs.mean())
    deviation = math.sqrt(sum(float(each.var(ddof=1)) * _inflation(len(each) - 1) for each in (ours, theirs)))
    wanted = math.log(1 + precision)
    repeats = next(
        (
            count
            for count in range(2, MOST_REPEATS)
            if student.quantile(LEVEL, 2.0 * (count - 1)) * deviation / math.sqrt(count) <= wanted
        ),
        MOST_REPEATS,
    )
    pairs = min(len(ours), len(theirs))
    return Need(
        place,
        arm,
        math.exp(shift),
        pairs,
        repeats,
        _stopped(shift, deviation, wanted, min(_MOST_SIMULATED, max(most, repeats, sequential.LEAST_PAIRS))),
    )


# The variance that is exceeded with a chance of one in five, as a multiple of the estimate: the quantile of
# chi-square by Wilson and Hilferty (1931).
def _inflation(freedom: int) -> float:
    part = 2 / (9 * freedom)
    quantile = freedom * max(0.05, 1 - part - _ABOVE_SIGMAS * math.sqrt(part)) ** 3
    return freedom / quantile


# The mean number of repeats of simulated runs with this shift and spread that stop early, at ``most`` at the latest.
def _stopped(shift: float, deviation: float, wanted: float, most: int) -> float:
    rng = np.random.default_rng(_SEED)
    logs = shift + deviation * rng.standard_normal((_RUNS, most))
    counts = np.arange(1, most + 1)
    middles = logs.cumsum(axis=1) / counts
    squares = np.maximum(0.0, (logs**2).cumsum(axis=1) / counts - middles**2)
    factors = [math.inf, *(sequential.half_width(1.0, count) for count in range(2, most + 1))]
    # An unbounded interval stays so without any spread.
    spreads = np.sqrt(np.maximum(1e-300, squares * counts / np.maximum(1, counts - 1)))
    reach = spreads * np.asarray(factors)
    decided = (np.abs(middles) > reach) | (np.abs(middles) + reach <= wanted)
    decided[:, : sequential.LEAST_PAIRS - 1] = False
    decided[:, -1] = True
    return float(decided.argmax(axis=1).mean() + 1)


# A pilot may have been declared otherwise: rows are grouped by the axes of the plan.
def _by_point(spec: Spec, rows: Sequence[Row]) -> Mapping[Place, list[float]]:
    found: dict[Place, list[float]] = defaultdict(list)
    for row in rows:
        value = value_of(spec, [row])
        if value is not None and all(axis in row for axis in spec.axes):
            found[key_of(spec, point_of(spec, row))].append(value)
    return found


def _place(spec: Spec, point: Mapping[str, Value]) -> Place:
    return json.dumps([point[axis] for axis in spec.axes if axis != spec.arm_axis])


def _is_second(arm: Value) -> bool:
    return isinstance(arm, str) and arm.endswith(AA_SUFFIX)
