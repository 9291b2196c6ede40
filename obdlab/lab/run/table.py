"""The report of points: a line for each, with median and interval of each metric and a ratio to the baseline."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, Any

from obdlab.lab.images.recipe import image_label
from obdlab.lab.kinds import KINDS
from obdlab.lab.run.pairs import always_valid
from obdlab.lab.run.statistics import cliffs_delta, median_interval, ratio_interval

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from obdlab.lab.kinds.kind import Value
    from obdlab.lab.run.rows import Row
    from obdlab.lab.run.spec import Spec


class PointsReport:
    """Ratios are those of the first metric."""

    def lines(self, spec: Spec, rows: Sequence[Row], *, details: bool) -> list[str]:
        """Return the table; there are no further details."""
        good = [row for row in rows if not row.get("error")]
        return points_table(spec, good) if good else []

    def facts(self, spec: Spec, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the medians with their intervals, by point."""
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            if not row.get("error"):
                groups[json.dumps({axis: row[axis] for axis in spec.axes})].append(row)
        keys = [metric.key for metric in KINDS[spec.kind].metrics]
        points = [
            {**json.loads(point), **{key: asdict(median_interval([row[key] for row in found])) for key in keys}}
            for point, found in groups.items()
        ]
        return {"points": points}

    def caveats(self, spec: Spec, rows: Sequence[Row]) -> list[str]:
        """Return sentences about failed cells and busy hosts."""
        lines = [f"Left out: {_label(spec, row)} failed: {row['error']}" for row in rows if row.get("error")]
        busy = [row for row in rows if not row.get("quiet", True)]
        if busy:
            worst = max(row["load_1m"] for row in busy)
            lines.append(
                f"{len(busy)} of {len(rows)} cells on a busy host (load up to {worst:.1f}): trust ratios more."
            )
        return lines


def points_table(spec: Spec, rows: Sequence[Row]) -> list[str]:
    """Return a line per point: median and interval of each metric, and the first metric's ratio to the baseline."""
    metrics = KINDS[spec.kind].metrics
    others = [axis for axis in spec.axes if axis != spec.arm_axis]
    groups: dict[tuple[Value, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[(row[spec.arm_axis], *(row[axis] for axis in others))].append(row)
    head = [*others, spec.arm_axis, *(f"{metric.key} [{metric.unit}]" for metric in metrics), "vs baseline", "δ"]
    table = [head, *_lines(spec, others, groups)]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def _lines(spec: Spec, others: Sequence[str], groups: Mapping[tuple[Value, ...], list[Row]]) -> Iterator[list[str]]:
    metrics = KINDS[spec.kind].metrics
    first = metrics[0].key
    # A run that could stop early is judged by the intervals that it stopped on.
    rows_of_all = [row for rows in groups.values() for row in rows] if spec.precision else []
    stopped = {_ordered(spec, point): ratio for point, ratio in always_valid(spec, rows_of_all)}
    for rest in product(*(spec.axes[axis] for axis in others)):
        baseline = [row[first] for row in groups.get((spec.baseline, *rest), [])]
        for arm in spec.arms:
            rows = groups.get((arm, *rest), [])
            if not rows:
                continue
            cells = [*map(_shown, rest), _shown(arm)]
            cells += [str(median_interval([row[metric.key] for row in rows])) for metric in metrics]
            if arm == spec.baseline or not baseline:
                yield [*cells, "", ""]
            else:
                samples = [row[first] for row in rows]
                ratio = stopped.get((arm, *rest)) or ratio_interval(samples, baseline)
                yield [*cells, ratio.text(".2f"), f"{cliffs_delta(samples, baseline):+.2f}"]


def _ordered(spec: Spec, point: Mapping[str, Value]) -> tuple[Value, ...]:
    return (point[spec.arm_axis], *(value for axis, value in point.items() if axis != spec.arm_axis))


def _label(spec: Spec, row: Row) -> str:
    return ", ".join(f"{axis} {_shown(row[axis])}" for axis in spec.axes)


def _shown(value: Value) -> str:
    return image_label(value) if isinstance(value, str) else str(value)
