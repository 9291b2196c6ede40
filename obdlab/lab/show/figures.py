"""Figures of an experiment, drawn from summaries. Needs the ``lab`` extra (matplotlib)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from obdlab.lab.paper.published import paper_values
from obdlab.lab.run.rows import AA_SUFFIX, one_per_attempt, told_apart
from obdlab.lab.run.summary import PHASES, noise_floor, summarise
from obdlab.lab.show.dots import draw_ratios
from obdlab.lab.show.style import LABEL, SMALL, below, plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from obdlab.lab.run.rows import Row
    from obdlab.lab.run.summary import Summary

DADI = "#3b6e8f"
PHASE_COLOURS = {"pull_s": "#9db4c8", "create_s": "#e0c58f", "start_s": "#c98f5f", "ready_s": DADI}
# Inches for a row of either panel.
_ROW = 0.3
PHASE_LABELS = {"pull_s": "pull", "create_s": "create", "start_s": "start", "ready_s": "start to ready"}


def startup_figure(rows: Sequence[Row], baseline: str = "overlayfs", summaries: Sequence[Summary] = ()) -> Figure:
    """Draw one network's starts: their seconds, and their ratios to the baseline beside those of the paper.

    Left: medians with 95 % intervals or ranges, bars stacked by phase. Right: every start as a ratio to the
    baseline's median, beside the ratios of figures 14 and 15 of the DADI paper, of other hardware and another image.
    Ratios and their intervals are those of ``summaries``, the rows' own: those of a run that could stop early are
    always valid (``obdlab.lab.run.starts.summaries_of``). Raises ValueError for rows of several networks.
    """
    first = [baseline, f"{baseline}{AA_SUFFIX}"]
    summaries = list(summaries or summarise(rows, baseline))
    summaries.sort(key=lambda s: (s.image, first.index(s.arm) if s.arm in first else len(first)))
    networks = {(summary.rate_mbit, summary.rtt_ms) for summary in summaries}
    if len(networks) != 1:
        raise ValueError(f"one network a figure (got {sorted(networks)})")
    rate_mbit, rtt_ms = networks.pop()
    rows_of = {start: len({(s.image, s.arm) for s in summaries if s.start == start}) for start in ("cold", "warm")}
    # The paper has arms of its own.
    heights = [1.1 + _ROW * max(3, count + more) for count, more in zip(rows_of.values(), (3, 1), strict=True)]
    figure, axes = plt.subplots(
        2, 2, figsize=(11.5, sum(heights)), width_ratios=[1.1, 1], height_ratios=heights, layout="constrained"
    )
    images = list(dict.fromkeys(summary.image for summary in summaries))
    for place, (start, paper) in enumerate((("cold", _paper_cold()), ("warm", _paper_warm()))):
        draw_phases(axes[place, 0], [s for s in summaries if s.start == start], f"{start} start: seconds, by phase")
        totals = _totals(rows, start, [summary.arm for summary in summaries if summary.start == start], images)
        title = f"{start} start: ratio to {baseline}, here and in the paper"
        found = {
            _label(s.image, s.arm, images): s.ratio
            for s in summaries
            # The rows of several disks share a line, which has a ratio of its own.
            if s.start == start and s.ratio is not None and len({each.disk for each in summaries}) == 1
        }
        if len(images) == 1:
            draw_ratios(axes[place, 1], totals, title, baseline=baseline, paper=paper, found=found)
        else:  # each image has a baseline of its own; the paper has another image
            own = {name: f"{name.partition(': ')[0]}: {baseline}" for name in totals}
            draw_ratios(axes[place, 1], totals, title, baseline=baseline, baselines=own, found=found)
    of = f"{images[0]}: c" if len(images) == 1 else "C"
    title = f"{of}ontainer start over {rate_mbit:g} Mbit/s, {rtt_ms:g} ms round trip"
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    floors = {start: noise_floor(s for s in summaries if s.start == start) for start in ("cold", "warm")}
    told = [f"{floor:.1%} when {start}" for start, floor in floors.items() if floor is not None]
    if told:
        text = f"Two identical arms (A/A) differ by {' and '.join(told)}: smaller differences are noise."
        figure.supxlabel(text, fontsize=9, x=0.01, ha="left", color="#555555")
    return figure


def draw_phases(axes: Axes, summaries: list[Summary], title: str) -> None:
    """Draw medians of totals with intervals or ranges, bars stacked by phase, for one network, disk and start."""
    axes.set_title(title, loc="left", fontsize=10.5)
    if not summaries:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    images = list(dict.fromkeys(summary.image for summary in summaries))
    labels = [_label(s.image, s.arm.replace(AA_SUFFIX, " again"), images) for s in summaries]
    positions = range(len(summaries))
    begins = [0.0] * len(summaries)
    # Medians of phases need not add up to the median of the total, so each phase gets its share of the total.
    scales = [summary.total_s.median / (sum(summary.phases_s) or 1.0) for summary in summaries]
    for index, phase in enumerate(PHASES):
        widths = [summary.phases_s[index] * scale for summary, scale in zip(summaries, scales, strict=True)]
        if max(widths) > 0:
            axes.barh(positions, widths, 0.62, begins, color=PHASE_COLOURS[phase], label=PHASE_LABELS[phase])
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    _whiskers(axes, summaries)
    axes.set_yticks(list(positions), labels, fontsize=SMALL)
    axes.set_ylim(len(summaries) - 0.4, -0.6)
    axes.set_xlim(0, max(s.total_s.high for s in summaries) * 1.25)
    plain(axes, "", grid="x")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds", fontsize=LABEL)
    below(axes, *axes.get_legend_handles_labels(), columns=4)


def _whiskers(axes: Axes, summaries: list[Summary]) -> None:
    for position, summary in enumerate(summaries):
        total = summary.total_s
        if total.has_interval:
            less, more = total.median - total.low, total.high - total.median
            axes.errorbar(total.median, position, xerr=[[less], [more]], color="black", capsize=4, linewidth=1.2)
        text = f"{total.median:.2f} s"
        if summary.ratio is not None:
            text += f", ×{summary.ratio.median:.2f}"
        end = total.high if total.has_interval else total.median
        axes.annotate(text, (end, position), (5, 0), textcoords="offset points", va="center", fontsize=SMALL)


def _label(image: str, arm: str, images: Sequence[str]) -> str:
    return arm if len(images) == 1 else f"{image}: {arm}"


# In the order of the arms.
def _totals(rows: Sequence[Row], start: str, arms: Sequence[str], images: Sequence[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {
        _label(image, arm, images): [] for image in images for arm in dict.fromkeys(arms)
    }
    good = (row for row in told_apart(rows) if not row.get("error") and row["start"] == start)
    for row in one_per_attempt(good):
        found.setdefault(_label(str(row["image"]), str(row["arm"]), images), []).append(float(row["total_s"]))
    return found


# The arms that a bar of the paper stands for; the others keep their names.
def _paper_cold() -> dict[str, float]:
    values = {value.series: float(value.y) for value in paper_values("Fig14")}
    launches = {
        "obdlab": "DADI from Registry",
        "DADI, P2P root": "DADI from P2P Root",
        "pseudo-Slacker": "pseudo-Slacker",
        "CRFS": "CRFS",
    }
    base = values["tgz+overlay2: total"]
    return {name: values[f"{series}: app launch"] / base for name, series in launches.items()}


def _paper_warm() -> dict[str, float]:
    values = {
        value.series: float(value.y) for value in paper_values("Fig15") if value.x == "NVMe SSD" and value.unit == "s"
    }
    base = values["overlay2"]
    return {"obdlab": values["DADI"] / base, "LVM": values["thin LVM (device mapper)"] / base}
