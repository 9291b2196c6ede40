"""Parameters of the simulator fitted to measured starts of few hosts, and asked for more hosts.

A projection is worth as much as the model's error on numbers that it was not fitted to. So the rows of few hosts fit,
and those of more hosts are only compared: the largest relative error stands beside every projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from obdlab.peers.simulator.eventqueue import SimulationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Numbers of hosts that fit, and that are asked for.
FITTED, ASKED = (1, 2, 4, 8), (16, 32)
#: The largest relative error of a prediction with which a model counts as fitted.
ENOUGH = 0.10
_STEPS, _DIFFERENCE, _STILL = 40, 0.02, 1e-4
# Significant digits of parameters. Processors differ in the last digits of products, which decide ties of two events:
# a page's numbers depended on the machine that computed them.
_DIGITS = 6
# Between two steps a parameter changes at most by this factor.
_FARTHEST = math.log(4.0)


@dataclass(frozen=True, slots=True)
class Observation:
    """A measured start: the topology, the number of hosts that started together, and the seconds of one of them."""

    topology: str
    hosts: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The median measured at one number of hosts, and the model's."""

    topology: str
    hosts: int
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """The relative error, without its sign."""
        return abs(self.predicted_s / self.measured_s - 1)


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted parameters, the model at the points that fitted them, and at those that it was asked for."""

    parameters: Mapping[str, float]
    fitted: tuple[Prediction, ...]
    asked: tuple[Prediction, ...]

    @property
    def error(self) -> float | None:
        """The largest relative error of the points that did not fit the model; None without such points."""
        return max((each.error for each in self.asked), default=None)

    @property
    def is_enough(self) -> bool:
        """Return True if the model predicts all points that it was asked for within ENOUGH."""
        return self.error is not None and self.error <= ENOUGH


_Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


def fit(
    observations: Sequence[Observation],
    model: Callable[[Mapping[str, float], str, int], float],
    first: Mapping[str, float],
    *,
    fitted: Sequence[int] = FITTED,
    asked: Sequence[int] = ASKED,
) -> Fit:
    """Fit positive parameters to the medians at ``fitted`` hosts and predict those at ``asked`` hosts.

    Least squares of logarithms of times over logarithms of parameters (Levenberg and Marquardt), from ``first`` on.
    ``model`` returns the seconds of a start by parameters, topology and number of hosts. Parameters have six
    significant digits, so that each machine finds the same fit. Raises SimulationError for fewer points than
    parameters, and for times or parameters that are not positive.
    """
    points = _medians(observations)
    known = {key: value for key, value in points.items() if key[1] in fitted}
    if len(known) < len(first) or not first:
        raise SimulationError(f"fit: wanted a point for each of {len(first)} parameters (got {len(known)} points)")
    if min(first.values()) <= 0 or min(points.values()) <= 0:
        raise SimulationError("fit: wanted positive times and parameters")
    names = tuple(first)
    measured = np.log(np.array(list(known.values())))

    def residuals(logs: _Vector) -> _Vector:
        values = _parameters(names, logs)
        seconds = np.log(np.array([model(values, *key) for key in known]))
        found: _Vector = seconds - measured
        return found

    found = _least_squares(residuals, np.log(np.array([first[name] for name in names])))
    parameters = _parameters(names, found)
    predictions = [
        Prediction(*key, value, model(parameters, *key))
        for key, value in sorted(points.items())
        if key[1] in (*fitted, *asked)
    ]
    return Fit(
        parameters,
        tuple(each for each in predictions if each.hosts in fitted),
        tuple(each for each in predictions if each.hosts in asked and each.hosts not in fitted),
    )


def _parameters(names: Sequence[str], logs: _Vector) -> dict[str, float]:
    return {name: float(f"{value:.{_DIGITS}g}") for name, value in zip(names, np.exp(logs).tolist(), strict=True)}


def _medians(observations: Sequence[Observation]) -> dict[tuple[str, int], float]:
    times: dict[tuple[str, int], list[float]] = {}
    for each in observations:
        times.setdefault((each.topology, each.hosts), []).append(each.seconds)
    return {key: median(values) for key, values in times.items()}


def _least_squares(residuals: Callable[[_Vector], _Vector], begin: _Vector) -> _Vector:
    at, damping = begin, 1e-2
    here = residuals(at)
    for _ in range(_STEPS):
        slopes = np.stack([_slope(residuals, at, here, place) for place in range(len(at))], axis=1)
        square = slopes.T @ slopes
        while True:
            # A parameter that no point shows has no slope: it stays where it is.
            damped = square + damping * np.diag(np.maximum(np.diag(square), 1e-9))
            step = np.clip(np.linalg.solve(damped, -slopes.T @ here), -_FARTHEST, _FARTHEST)
            there = residuals(at + step)
            if there @ there < here @ here:
                break
            damping *= 4
            if damping > 1e9:
                return at
        still = bool(np.max(np.abs(step)) < _STILL)
        at, here, damping = at + step, there, damping / 4
        if still:
            break
    return at


def _slope(residuals: Callable[[_Vector], _Vector], at: _Vector, here: _Vector, place: int) -> _Vector:
    moved = at.copy()
    moved[place] += _DIFFERENCE
    return (residuals(moved) - here) / _DIFFERENCE
