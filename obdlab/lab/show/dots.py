"""Samples, medians and published numbers on one axis. Needs the ``lab`` extra (matplotlib).

A published number stands beside a measured one as a ratio to its own baseline: seconds of other machines, images and
links say nothing here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D

from obdlab.lab.run.rows import AA_SUFFIX
from obdlab.lab.run.statistics import median_interval, ratio_interval
from obdlab.lab.show.style import LABEL, ORIGINS, PAPER, PAPER_TEXT, SMALL, below, colour, origin_look, plain, titled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from obdlab.lab.run.statistics import Estimate

_SMALL: dict[str, Any] = {"fontsize": SMALL, "va": "center"}
# Single samples of one arm lie in so much of its row's height.
_SPREAD = 0.34
# An axis ends so far beyond the last sample: intervals of two or three can be a hundred times as long.
_REACH = 1.5


def draw_ratios(
    axes: Axes,
    measured: Mapping[str, Sequence[float]],
    title: str,
    *,
    baseline: str,
    paper: Mapping[str, float] | None = None,
    of: str = "time",
    log: bool = False,
    baselines: Mapping[str, str] | None = None,
    found: Mapping[str, Estimate] | None = None,
) -> None:
    """Draw a row for each arm: samples and median as ratios to the median of ``baseline``, and the paper's ratio.

    ``paper`` holds ratios to the paper's own baseline; its names are those of the arms they stand for, or others.
    Whiskers are 95 % intervals of the ratio, which take three samples. ``baselines`` names another baseline
    for some arms. ``found`` holds the ratios of arms whose interval is of another kind, such as an always-valid one.
    """
    paper, baselines, found = paper or {}, baselines or {}, found or {}
    bases = {arm: list(measured.get(baselines.get(arm, baseline), ())) for arm in measured}
    drawn = {arm: list(values) for arm, values in measured.items() if values and bases[arm]}
    if not titled(axes, title, bool(drawn or paper)):
        return
    names = [*drawn, *(name for name in paper if name not in drawn)]
    first = [baseline, f"{baseline}{AA_SUFFIX}"]
    names.sort(key=lambda name: first.index(name) if name in first else len(first))
    shares = {name: [value / median_interval(bases[name]).median for value in drawn[name]] for name in drawn}
    reach = _REACH * max(*paper.values(), *(share for each in shares.values() for share in each), 1.0)
    for place, name in enumerate(names):
        if name in drawn:
            ratios = shares[name]
            is_base = name == baselines.get(name, baseline)
            ratio = median_interval(ratios) if is_base else found.get(name)
            ratio = ratio or ratio_interval(drawn[name], bases[name])
            _draw_row(axes, place, name, ratios, ratio, f"{ratio.median:.2f}", reach)
        if name in paper:
            axes.plot(paper[name], place + 0.28, "D", color=PAPER, markersize=6, markerfacecolor="white", zorder=4)
            # An arm's own number is on its line; the paper's stands at its mark.
            _note(axes, f"{paper[name]:.2f}", (paper[name], place + 0.28), PAPER_TEXT)
    axes.axvline(1.0, color="#999999", linewidth=0.9, linestyle=":", zorder=1)
    if log:
        axes.set_xscale("log")
    _finish(axes, names, f"{of}, ratio to {baseline}", log=log)
    _legend(axes, bool(drawn), bool(paper))


def draw_samples(axes: Axes, measured: Mapping[str, Sequence[float]], title: str, unit: str) -> None:
    """Draw a row for each arm: its samples, its median, and the median's 95 % interval or range."""
    drawn = {arm: list(values) for arm, values in measured.items() if values}
    if not titled(axes, title, bool(drawn)):
        return
    for place, (name, values) in enumerate(drawn.items()):
        found = median_interval(values)
        _draw_row(axes, place, name, values, found, f"{found.median:.3g}")
    _finish(axes, list(drawn), unit, log=False)
    _legend(axes, measured=True, paper=False)


def _finish(axes: Axes, names: Sequence[str], label: str, *, log: bool) -> None:
    axes.set_yticks(range(len(names)), [name.replace(AA_SUFFIX, " again") for name in names], fontsize=SMALL)
    axes.set_ylim(len(names) - 0.4, -0.6)
    if not log:
        # Room for the number behind the last sample.
        axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
    plain(axes, "", grid="x")
    axes.set_xlabel(label, fontsize=LABEL)


# An interval beyond ``reach`` ends there in an arrow.
def _draw_row(
    axes: Axes,
    place: int,
    name: str,
    samples: Sequence[float],
    found: Estimate,
    text: str,
    reach: float = math.inf,
) -> None:
    shade = colour(name, place)
    steps = [(number + 0.5) / len(samples) - 0.5 for number in range(len(samples))]
    rows = [place + _SPREAD * step for step in steps]
    axes.plot(samples, rows, "o", color=shade, alpha=0.35, markersize=4, zorder=2, label=name)
    high = min(found.high, reach)
    if found.has_interval:
        axes.plot([found.low, high], [place, place], color="black", linewidth=1.2, zorder=3)
    if found.has_interval and high < found.high:
        axes.plot(high, place, ">", color="black", markersize=5, zorder=3)
    axes.plot(found.median, place, "o", color=shade, markeredgecolor="black", markersize=7, zorder=4)
    _note(axes, text, (max(*samples, high) if found.has_interval else max(samples), place), "black")


def _note(axes: Axes, text: str, place: tuple[float, float], shade: str) -> None:
    axes.annotate(text, place, (7, 0), textcoords="offset points", color=shade, **_SMALL)


def _legend(axes: Axes, measured: bool, paper: bool) -> None:
    marks = []
    if measured:
        one = Line2D([], [], marker="o", linestyle="", color="#555555", alpha=0.4, markersize=4)
        middle = Line2D([], [], marker="o", color="black", markerfacecolor="#999999", markersize=6)
        marks += [(one, "one sample"), (middle, "median, interval")]
    if paper:
        theirs = Line2D([], [], marker="D", linestyle="", color=PAPER, markerfacecolor="white")
        marks.append((theirs, "the paper's ratio"))
    handles, labels = zip(*marks, strict=True)
    below(axes, handles, labels)


def draw_lines(
    axes: Axes,
    series: Mapping[str, Mapping[float, Sequence[float]]],
    title: str,
    *,
    x: str,
    y: str,
    log: bool = True,
    limit: tuple[float, str] | None = None,
    origin: str = "measured",
) -> None:
    """Draw samples over the values of an axis, with a line through the medians and whiskers for their intervals.

    ``log``: the x axis is logarithmic. ``limit``: a number that the paper states, and the text at its line.
    ``origin``: measured, emulated or simulated, which lines and labels show.
    """
    drawn = {name: points for name, points in series.items() if points}
    if not titled(axes, title, bool(drawn)):
        return
    highest = limit[0] if limit else 0.0
    for number, (name, points) in enumerate(drawn.items()):
        shade, places = colour(name, number), sorted(points)
        found = [median_interval(list(points[place])) for place in places]
        middle = [each.median for each in found]
        axes.plot(places, middle, markersize=5, color=shade, zorder=3, **origin_look(origin, name))
        for place, each in zip(places, found, strict=True):
            values = list(points[place])
            axes.plot(
                [place] * len(values), values, ORIGINS[origin][1], color=shade, alpha=0.35, markersize=3.5, zorder=2
            )
            if each.has_interval:
                axes.plot([place, place], [each.low, each.high], color=shade, linewidth=1.1, zorder=2)
            highest = max(highest, *values)
    ticks = sorted({place for points in drawn.values() for place in points})
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,g}" if tick < 1e6 else f"{tick:g}" for tick in ticks], fontsize=SMALL)
    axes.minorticks_off()
    axes.set_ylim(0, 1.15 * highest or 1.0)
    if limit:
        axes.axhline(limit[0], color=PAPER, linestyle="--", linewidth=1.2)
        look: dict[str, Any] = {"color": PAPER_TEXT, "fontsize": SMALL, "ha": "right", "va": "bottom"}
        axes.text(0.99, limit[0], limit[1], transform=axes.get_yaxis_transform(), **look)
    if len(drawn) > 1 or origin != "measured":
        axes.legend(fontsize=SMALL, frameon=False)
    plain(axes, y)
    axes.set_xlabel(x, fontsize=LABEL)
