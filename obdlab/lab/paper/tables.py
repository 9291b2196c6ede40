"""Tables of the evaluation: medians with intervals, a row for each point. Needs the ``lab`` extra (pandas)."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Any

import pandas as pd

from obdlab.lab.kinds import KINDS
from obdlab.lab.run.rows import one_per_attempt, told_apart
from obdlab.lab.run.statistics import median_interval

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from obdlab.lab.kinds.kind import Metric
    from obdlab.lab.paper.questions import Run
    from obdlab.lab.paper.results import Results
    from obdlab.lab.run.rows import Row
    from obdlab.lab.run.statistics import Estimate

_LIGHT = "color:#767676;font-size:92%"
_PADDING = "padding:.25em .9em .25em 0"
_UNIT = re.compile(r"(^|_)(us|ms|s|kib|mib|mb|mb_s|m_s|s_per_gb)$")
#: A number, optionally with its interval or range, and count; or an empty cell.
_NUMBER = re.compile(r"([-+×]?[\d.,]+(e[-+]?\d+)?( \[.*\]| \(.* to .*\))?( n=\d+)?)?$")
#: The beginning of an interval or range.
_ENDS = re.compile(r" (?=[\[(])")
_NOTHING = {"", "0", "0.00"}
_START_AXES = ("image", "rate_mbit", "rtt_ms", "disk", "start", "arm")
_START_METRICS = {
    "total_s": "total, s",
    "pull_s": "pull, s",
    "create_s": "create, s",
    "ready_s": "ready, s",
    "bytes_received": "received, MB",
    "requests": "requests",
    "cpu_s": "CPU, s",
}
#: Starts are shown to the millisecond.
_START_DECIMALS, _ANY_DECIMALS = 3, 6
#: The words for a condition that all rows share.
_SAID = {
    "rate_mbit": "{} Mbit/s",
    "rtt_ms": "{} ms round trip",
    "n": "{} of each",
    "disk": "{} disk",
    "start": "{} starts",
}
_SCALES = {"bytes_received": 1e-6}


def table(results: Results, run: Run, shown: Mapping[str, Collection[str]] | None = None) -> pd.DataFrame:
    """Return a row for each point: its axes, the number of samples, and ``median [low, high]`` of each metric.

    ``shown`` selects rows: allowed values by column. The table is empty if the experiment has no such rows.
    """
    rows = [
        row
        for row in one_per_attempt(told_apart(results.rows(run)))
        if all(row.get(name) in values for name, values in (shown or {}).items() if name in row)
    ]
    if not rows:
        return pd.DataFrame()
    axes, metrics = _columns(rows[0])
    decimals = _START_DECIMALS if metrics is _START_METRICS else _ANY_DECIMALS
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(axis) for axis in axes), []).append(row)
    lines = []
    for point, found in sorted(groups.items(), key=lambda item: tuple(map(_order, item[0]))):
        line: dict[str, Any] = dict(zip(axes, point, strict=True)) | {"n": len(found)}
        for key, name in metrics.items():
            values = [float(row[key]) * _SCALES.get(key, 1) for row in found if row.get(key) is not None]
            line[name] = _told(median_interval(values), decimals) if values else ""
        lines.append(line)
    return pd.DataFrame(lines)


def as_html(frame: pd.DataFrame) -> str:
    """Return an HTML table: numbers aligned right, intervals lighter, columns that are empty or all 0 left out.

    Conditions (the columns up to "n") that are equal in all rows are named once above the table.
    """
    columns = [name for name in frame.columns if not {_text(value) for value in frame[name]} <= _NOTHING]
    conditions = columns[: columns.index("n") + 1] if "n" in columns and len(frame) > 1 else []
    same = {name: frame[name].iloc[0] for name in conditions if frame[name].nunique() == 1}
    varied = [name for name in columns if name not in same]
    numeric = {name for name in varied if all(_NUMBER.match(_text(value)) for value in frame[name])}
    lines = []
    if same:
        told = ", ".join(
            _SAID.get(name, f"{name.replace('_', ' ')} {{}}").format(_text(value)) for name, value in same.items()
        )
        lines.append(f"<p class='same' style='{_LIGHT}'>All rows: {html.escape(told)}.</p>")
    head = "".join(_cell("th", str(name).replace("_", " "), name in numeric) for name in varied)
    lines.append(f"<table class='values'><thead><tr>{head}</tr></thead><tbody>")
    for row in frame[varied].itertuples(index=False, name=None):
        cells = (_cell("td", _text(value), name in numeric) for name, value in zip(varied, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def raw(results: Results, run: Run) -> pd.DataFrame:
    """Return the rows themselves, nested values as ``outer.inner`` columns."""
    from obdlab.lab.run.rows import flatten

    return pd.DataFrame([flatten(row) for row in results.rows(run)])


def _columns(row: Row) -> tuple[tuple[str, ...], dict[str, str]]:
    kind = KINDS.get(str(row.get("kind")))
    if kind is None:
        return _START_AXES, _START_METRICS
    return tuple(kind.axes), {metric.key: _head(metric) for metric in kind.metrics}


# The key's unit suffix goes: the unit follows the name after a comma.
def _head(metric: Metric) -> str:
    name = _UNIT.sub("", metric.key).replace("_", " ").replace("seconds", "time").replace("cpu", "CPU")
    if metric.unit.startswith(("of ", "in ")):  # "of the content", "in the merged index"
        return metric.unit if name.startswith("of ") else f"{name} {metric.unit}"
    return ", ".join(filter(None, (name, metric.unit)))


# Styles are in the cells: a notebook's style sheet aligns every cell right, and a widget has no style sheet.
def _cell(tag: str, text: str, number: bool) -> str:
    value, *ends = _ENDS.split(text, maxsplit=1) if number else [text]
    lighter = f" <span style='{_LIGHT}'>{html.escape(ends[0])}</span>" if ends and tag == "td" else ""
    shown = html.escape(value if lighter else text) + lighter
    return f"<{tag} style='text-align:{'right' if number else 'left'};{_PADDING}'>{shown}</{tag}>"


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else _number(value)


def _told(estimate: Estimate, decimals: int) -> str:
    if not estimate.has_interval:
        return _measured(estimate.median, decimals)
    middle, low, high = (_measured(value, decimals) for value in (estimate.median, estimate.low, estimate.high))
    if middle == low == high:
        return middle
    return f"{middle} ({low} to {high})" if estimate.is_range else f"{middle} [{low}, {high}]"


# Three significant digits, trailing zeros included, never in exponent form.
def _measured(value: float, decimals: int) -> str:
    if abs(value) >= 1000:
        return _number(value)
    told = f"{value:#.3g}".removesuffix(".")
    _, point, digits = told.partition(".")
    return f"{value:.{decimals}f}" if point and "e" not in told and len(digits) > decimals else told


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _order(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))
