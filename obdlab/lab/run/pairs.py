"""Pairs of interleaved rows: the same repeat of an arm and of the baseline."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from obdlab.lab.run import sequential

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from obdlab.lab.run.rows import Row
    from obdlab.lab.run.statistics import Estimate


def always_valid(spec: Any, rows: Iterable[Row]) -> list[tuple[dict[str, Any], Estimate]]:
    """Return the point and the always-valid ratio to the baseline of each arm that has pairs with it.

    The points are those of the rows: the rows of a results directory can have more than its last declaration.
    """
    values: dict[str, dict[int, float]] = defaultdict(dict)
    points: dict[str, dict[str, Any]] = {}
    for row in rows:
        value = value_of(spec, [row])
        if value is not None:
            point = point_of(spec, row)
            points[key_of(spec, point)] = point
            values[key_of(spec, point)][row["repeat"]] = value
    found = []
    for key, point in points.items():
        ours = values[key]
        theirs = values.get(key_of(spec, {**point, spec.arm_axis: spec.baseline}), {})
        both = sorted(set(ours) & set(theirs))
        if both and point[spec.arm_axis] != spec.baseline:
            found.append((point, sequential.pair_interval([ours[k] for k in both], [theirs[k] for k in both])))
    return found


def value_of(spec: Any, rows: Iterable[Row]) -> float | None:
    """Return the first metric of a cell's rows, of starts that of the cold one; None if it failed."""
    key = spec.first_metric
    for row in rows:
        if not row.get("error") and row.get("start", "cold") == "cold" and float(row.get(key, 0)) > 0:
            return float(row[key])
    return None


def point_of(spec: Any, row: Row) -> dict[str, Any]:
    """Return the point of a row, with the image as the declaration has it."""
    return {axis: row["recipe"] if axis == "image" and "recipe" in row else row[axis] for axis in spec.axes}


def key_of(spec: Any, point: Mapping[str, Any]) -> str:
    """Return the identity of a point, all axes included."""
    return json.dumps([point[axis] for axis in spec.axes])
