"""Parts of figures: bars with intervals, lines with bands, distributions, and their common look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from obdlab.lab.run.statistics import median_interval

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from obdlab.lab.run.statistics import Estimate

OURS, THEIRS, PAPER = "#3b6e8f", "#7d7d7d", "#b9a27a"
COLOURS = {
    "overlayfs": "#7d7d7d",
    "obdlab": "#3b6e8f",
    "obdlab-prefetch": "#5f9ea0",
    "obdlab-hot": "#c98f5f",
    "obdlab-turbo": "#6a4c93",
    "obdlab-verified": "#5f9ea0",
    "stargz": "#8a9a4b",
    "soci": "#b5677d",
    "erofs": "#9a7fb0",
    "loop": "#a8a8a8",
    "obdlab-raw": "#3b6e8f",
    "obdlab-lz4": "#5f9ea0",
    "obdlab-zstd": "#c98f5f",
    "obdlab-append": "#3b6e8f",
    "obdlab-sparse": "#5f9ea0",
    "lz4": "#3b6e8f",
    "zstd": "#c98f5f",
}
_OTHERS = (OURS, "#c98f5f", "#8a9a4b", "#b5677d", "#9a7fb0", THEIRS)
#: Text in the paper's colour is darker than the paper's bars, to be readable on white.
_PAPER_TEXT = "#7c6a45"
_SMALL, _LABEL, _TITLE = 8.5, 9, 10

#: (label, value, low, high)
Bar = tuple[str, float, float, float]


def pair(widths: Sequence[float] = (1.25, 1.0)) -> tuple[Figure, Axes, Axes]:
    """Return a figure of two axes side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.9), width_ratios=list(widths), layout="constrained")
    return figure, left, right


def single() -> tuple[Figure, Axes]:
    """Return a figure of one axes."""
    figure, axes = plt.subplots(figsize=(8.2, 3.9), layout="constrained")
    return figure, axes


def as_bar(label: str, values: Sequence[float]) -> Bar | None:
    """Return the bar of a median with its 95 % interval; None without values."""
    if not values:
        return None
    found = median_interval(values)
    return label, found.median, found.low, found.high


def draw_bars(
    axes: Axes, bars: Sequence[Bar | None], title: str, unit: str, colours: Sequence[str] | str = ()
) -> None:
    """Draw bars with their values and intervals; ``colours``: one per bar, or one for all (default: by label)."""
    shown = [bar for bar in bars if bar is not None]
    if not _titled(axes, title, bool(shown)):
        return
    used = colours or [COLOURS.get(bar[0].split("\n")[0], OURS) for bar in shown]
    top = max(bar[3] for bar in shown) or 1.0
    axes.bar(range(len(shown)), [bar[1] for bar in shown], 0.62, color=used)
    for place, (_, value, low, high) in enumerate(shown):
        if high > low:
            axes.errorbar(place, value, [[value - low], [high - value]], color="black", capsize=4, linewidth=1.1)
        axes.text(place, high + 0.02 * top, f"{value:.3g}", ha="center", va="bottom", fontsize=_SMALL)
    axes.set_xticks(range(len(shown)), [bar[0] for bar in shown], fontsize=_SMALL)
    axes.tick_params(axis="x", length=0)
    # Without this one or two bars would fill the axes.
    axes.set_xlim(-0.6, max(len(shown), 3) - 0.4)
    axes.set_ylim(0, top * 1.2)
    plain(axes, unit)


def draw_lines(
    axes: Axes,
    series: Mapping[str, Mapping[float, Estimate]],
    title: str,
    x: str,
    unit: str,
    *,
    log: bool = True,
    theirs: tuple[float, str] | None = None,
) -> None:
    """Draw medians over the values of an axis, with bands for the intervals.

    ``log``: the x axis is logarithmic. ``theirs``: a value of the paper in the unit of the y axis, and the text at
    its line.
    """
    drawn = {name: points for name, points in series.items() if points}
    if not _titled(axes, title, bool(drawn)):
        return
    for number, (name, points) in enumerate(drawn.items()):
        places = sorted(points)
        colour = COLOURS.get(name, _OTHERS[number % len(_OTHERS)])
        middle = [points[place].median for place in places]
        axes.plot(places, middle, marker="o", markersize=4, label=name, color=colour)
        low, high = ([getattr(points[place], end) for place in places] for end in ("low", "high"))
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    ticks = sorted({place for points in drawn.values() for place in points})
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,g}" if tick < 1e6 else f"{tick:g}" for tick in ticks], fontsize=_SMALL)
    axes.minorticks_off()
    # The paper's line stays in the picture even where all measurements lie far below.
    highest = max(estimate.high for points in drawn.values() for estimate in points.values())
    axes.set_ylim(0, 1.15 * max(highest, theirs[0] if theirs else 0.0) or 1.0)
    axes.set_xlabel(x, fontsize=_LABEL)
    if theirs:
        axes.axhline(theirs[0], color=PAPER, linestyle="--", linewidth=1.2)
        where = axes.get_yaxis_transform()
        axes.text(
            0.99, theirs[0], theirs[1], color=_PAPER_TEXT, fontsize=_SMALL, ha="right", va="bottom", transform=where
        )
    if len(drawn) > 1:
        axes.legend(fontsize=_SMALL, frameon=False)
    plain(axes, unit)


def draw_distribution(axes: Axes, series: Mapping[str, Sequence[float]], title: str, unit: str) -> None:
    """Draw the empirical distribution function (ECDF) of each series."""
    if not _titled(axes, title, any(series.values())):
        return
    for name, values in series.items():
        if values:
            ordered = np.sort(np.asarray(values, dtype=float))
            # Shares begin at 0, so that the first value has a step too.
            shares = np.arange(len(ordered) + 1) / len(ordered)
            label = f"{name} ({len(ordered)})"
            ends = np.concatenate([ordered[:1], ordered])
            axes.step(ends, shares, where="post", label=label, color=COLOURS.get(name), linewidth=1.6)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.set_xlabel(unit, fontsize=_LABEL)
    # The legend is below the axes: a curve may run through any corner.
    axes.legend(fontsize=_SMALL, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    plain(axes, "share of starts")


def plain(axes: Axes, unit: str, grid: str = "y") -> None:
    """Give the axes the common look; ``unit`` labels the vertical axis."""
    axes.set_ylabel(unit, fontsize=_LABEL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_SMALL)
    axes.grid(axis="x" if grid == "x" else "y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def _titled(axes: Axes, title: str, measured: bool) -> bool:
    axes.set_title(title, loc="left", fontsize=_TITLE)
    if not measured:
        axes.text(0.5, 0.5, "not measured", ha="center", color="#777777", transform=axes.transAxes)
        axes.set_axis_off()
    return measured
