"""One start as a waterfall: its phases in order, and its traffic over the link. Needs the ``lab`` extra."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from obdlab.lab.run.summary import PHASES
from obdlab.lab.show.figures import PHASE_COLOURS, PHASE_LABELS
from obdlab.lab.show.style import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from obdlab.lab.run.rows import Row

_MARK = "#a63d40"


def waterfall(row: Row) -> Figure:
    """Draw one start's phases as bars on one time axis (seconds since the start began), with its traffic in words.

    A phase begins where the one before ends. If the registry served more after the container was ready, a dashed line
    marks the end (``completion_s`` of the row).
    """
    figure, (axes, beside) = plt.subplots(1, 2, figsize=(11.5, 2.9), width_ratios=[3.2, 1], layout="constrained")
    began_s = 0.0
    total_s = sum(_seconds(row, phase) for phase in PHASES)
    for place, phase in enumerate(PHASES):
        taken_s = _seconds(row, phase)
        axes.barh(place, taken_s, 0.6, began_s, color=PHASE_COLOURS[phase])
        _label(axes, place, began_s, taken_s, f"{_told(taken_s)}{_share(taken_s, total_s)}", total_s)
        began_s += taken_s
    axes.set_yticks(range(len(PHASES)), [PHASE_LABELS[phase] for phase in PHASES])
    axes.invert_yaxis()
    end_s = max(total_s, _completion(axes, row, total_s))
    axes.axvline(total_s, color="#444444", linewidth=1)
    axes.set_xlim(0, end_s * 1.06 or 1.0)
    axes.set_xlabel("seconds since the start began", fontsize=9)
    axes.set_title(f"{_name(row)}: ready after {_told(total_s)}", loc="left", fontsize=10)
    plain(axes, "", "x")
    axes.tick_params(axis="y", length=0)
    beside.set_axis_off()
    beside.text(0, 1, "\n".join(traffic(row)), va="top", fontsize=9, linespacing=1.7, transform=beside.transAxes)
    return figure


def traffic(row: Row) -> list[str]:
    """Return a start's traffic and costs in words, a line for each number that the row has."""
    lines = [f"{row['bytes_received'] / 1e6:,.1f} MB received until ready"] if "bytes_received" in row else []
    if "requests" in row:
        waits = f", {row['round_trip_waits']} one after another" if row.get("round_trip_waits") else ""
        lines.append(f"{row['requests']} requests{waits}")
    if "network_s" in row:
        lines.append(f"{_told(row['network_s'])} with a request under way")
    if row.get("completion_bytes", 0) > row.get("bytes_received", 0):
        lines.append(f"{row['completion_bytes'] / 1e6:,.1f} MB with what came after")
    if "cpu_s" in row:
        lines.append(f"{_told(row['cpu_s'])} of processor time")
    if row.get("quiet") is False:
        lines.append(f"busy host (load {row.get('load_1m', 0):.1f})")
    return lines


def _completion(axes: Axes, row: Row, total_s: float) -> float:
    last_s = _seconds(row, "completion_s")
    if last_s > total_s:
        axes.axvline(last_s, color=_MARK, linewidth=1, linestyle="--")
        where = axes.get_xaxis_transform()
        text = "registry still from here "
        axes.text(last_s, 0.97, text, color=_MARK, fontsize=8.5, ha="right", va="top", transform=where)
    return last_s


# The label goes beside its bar on the side with room, or inside a long bar; it never crosses the end of the axes.
def _label(axes: Axes, place: int, began_s: float, taken_s: float, text: str, total_s: float) -> None:
    left = began_s + taken_s > 0.75 * total_s
    if left and taken_s > 0.4 * total_s:
        at, side = began_s + taken_s / 2, "center"
        axes.text(at, place, text, va="center", ha=side, fontsize=8.5, color="white" if place == 3 else "#222222")
        return
    gap = 0.012 * total_s
    at, side = (began_s - gap, "right") if left else (began_s + taken_s + gap, "left")
    axes.text(at, place, text, va="center", ha=side, fontsize=8.5)


def _name(row: Row) -> str:
    number = f"#{row['repeat'] + 1}" if "repeat" in row else ""
    if row.get("warm", -1) >= 0:
        number += f", {row['start']} #{row['warm'] + 1}"
    else:
        number += f", {row['start']}"
    return f"{row['image']}, {row['arm']} {number}"


def _seconds(row: Row, key: str) -> float:
    return float(row.get(key) or 0.0)


def _share(part: float, whole: float) -> str:
    if part == 0 or whole == 0:
        return ""
    percent = 100 * part / whole
    return f", {percent:.0f} %" if percent >= 1 else ", under 1 %"


def _told(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"
