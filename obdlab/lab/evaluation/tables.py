"""Tables of the evaluation: medians with intervals, by what was varied. Needs the ``lab`` extra (pandas)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from obdlab.lab.kinds import KINDS
from obdlab.lab.statistics import median_interval

if TYPE_CHECKING:
    from obdlab.lab.evaluation.questions import Run
    from obdlab.lab.evaluation.results import Results
    from obdlab.lab.rows import Row

_START_AXES = ("image", "rate_mbit", "rtt_ms", "disk", "start", "arm")
_START_METRICS = {
    "total_s": "total, s",
    "pull_s": "pull, s",
    "create_s": "create, s",
    "start_s": "start, s",
    "ready_s": "ready, s",
    "bytes_received": "bytes",
    "requests": "requests",
    "cpu_s": "CPU, s",
}


def table(results: Results, run: Run) -> pd.DataFrame:
    """Return a row for each point: what was varied, the number of rows, and ``median [low, high]`` of each metric.

    Empty if the experiment has no rows.
    """
    rows = results.rows(run)
    if not rows:
        return pd.DataFrame()
    axes, metrics = _columns(rows[0])
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(axis) for axis in axes), []).append(row)
    lines = []
    for point, found in sorted(groups.items(), key=lambda item: tuple(map(_order, item[0]))):
        line: dict[str, Any] = dict(zip(axes, point, strict=True)) | {"n": len(found)}
        for key, name in metrics.items():
            values = [float(row[key]) for row in found if row.get(key) is not None]
            line[name] = str(median_interval(values)) if values else ""
        lines.append(line)
    return pd.DataFrame(lines)


def raw(results: Results, run: Run) -> pd.DataFrame:
    """Return the rows themselves, nested values as ``outer.inner`` columns."""
    from obdlab.lab.rows import flatten

    return pd.DataFrame([flatten(row) for row in results.rows(run)])


def _columns(row: Row) -> tuple[tuple[str, ...], dict[str, str]]:
    kind = KINDS.get(str(row.get("kind")))
    if kind is None:
        return _START_AXES, _START_METRICS
    return tuple(kind.axes), {metric.key: f"{metric.key}, {metric.unit}" for metric in kind.metrics}


def _order(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))
