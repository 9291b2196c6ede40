"""Figures of an experiment, drawn from summaries. Needs the ``lab`` extra (matplotlib)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from obdlab.lab.paper.published import paper_values
from obdlab.lab.run.rows import AA_SUFFIX
from obdlab.lab.run.summary import PHASES, noise_floor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from obdlab.lab.run.rows import AA_SUFFIX
from obdlab.lab.run.summary import Summary

DADI = "#3b6e8f"
PHASE_COLOURS = {"pull_s": "#9db4c8", "create_s": "#e0c58f", "start_s": "#c98f5f", "ready_s": DADI}
PHASE_LABELS = {"pull_s": "pull", "create_s": "create", "start_s": "start", "ready_s": "start to ready"}
PAPER_PULL = "#c9c9c9"
PAPER_LAUNCH = "#7d7d7d"


def startup_figure(summaries: Sequence[Summary]) -> Figure:
    """Draw one network's starts like figures 14 and 15 of the DADI paper, beside the paper's bars.

    Left: medians measured here with 95 % confidence intervals, bars stacked by phase. Right: the paper's bars, from
    other hardware and another image: compare the order and the ratios, not the seconds.
    """
    networks = {(summary.rate_mbit, summary.rtt_ms) for summary in summaries}
    if len(networks) != 1:
        raise ValueError(f"one network a figure (got {sorted(networks)})")
    rate_mbit, rtt_ms = networks.pop()
    figure, axes = plt.subplots(2, 2, figsize=(11.5, 6.6), width_ratios=[1.25, 1], layout="constrained")
    draw_phases(axes[0, 0], [s for s in summaries if s.start == "cold"], "cold start, measured here")
    draw_phases(axes[1, 0], [s for s in summaries if s.start == "warm"], "warm start, measured here")
    _paper_cold(axes[0, 1])
    _paper_warm(axes[1, 1])
    figure.suptitle(
        f"Container start over {rate_mbit:g} Mbit/s, {rtt_ms:g} ms round trip", fontsize=13, x=0.01, ha="left"
    )
    floors = {start: noise_floor(s for s in summaries if s.start == start) for start in ("cold", "warm")}
    told = [f"{floor:.1%} when {start}" for start, floor in floors.items() if floor is not None]
    if told:
        text = f"Two identical arms (A/A) differ by {' and '.join(told)}: smaller differences are noise."
        figure.supxlabel(text, fontsize=9, x=0.01, ha="left", color="#555555")
    return figure


def draw_phases(axes: Axes, summaries: list[Summary], title: str) -> None:
    """Draw medians of totals with 95 % intervals, bars stacked by phase, for one network, disk and start."""
    axes.set_title(title, loc="left", fontsize=10.5)
    if not summaries:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    images = list(dict.fromkeys(summary.image for summary in summaries))
    labels = [s.arm.replace(AA_SUFFIX, "\nagain (A/A)") for s in summaries]
    if len(images) > 1:
        labels = [f"{s.image}\n{label}" for s, label in zip(summaries, labels, strict=True)]
    positions = range(len(summaries))
    bottoms = [0.0] * len(summaries)
    # Medians of phases need not add up to the median of the total, so each phase gets its share of the total.
    scales = [summary.total_s.median / (sum(summary.phases_s) or 1.0) for summary in summaries]
    for index, phase in enumerate(PHASES):
        heights = [summary.phases_s[index] * scale for summary, scale in zip(summaries, scales, strict=True)]
        if max(heights) > 0:
            axes.bar(positions, heights, 0.62, bottoms, color=PHASE_COLOURS[phase], label=PHASE_LABELS[phase])
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    _whiskers(axes, summaries)
    axes.set_xticks(list(positions), labels, fontsize=8.5)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    _plain(axes, max(s.total_s.high for s in summaries))


def _whiskers(axes: Axes, summaries: list[Summary]) -> None:
    highest = max(s.total_s.high for s in summaries)
    for position, summary in enumerate(summaries):
        total = summary.total_s
        if total.has_interval:
            below, above = total.median - total.low, total.high - total.median
            axes.errorbar(position, total.median, [[below], [above]], color="black", capsize=4, linewidth=1.2)
        text = f"{total.median:.2f} s"
        if summary.ratio is not None:
            text += f"\n×{summary.ratio.median:.2f}"
        axes.text(position, total.high + 0.03 * highest, text, ha="center", va="bottom", fontsize=8.5)


def _paper_cold(axes: Axes) -> None:
    axes.set_title("paper, figure 14: WordPress, cold (read off the plot)", loc="left", fontsize=10.5)
    values = {value.series: float(value.y) for value in paper_values("Fig14")}
    pull, launch = values["tgz+overlay2: image pull"], values["tgz+overlay2: app launch"]
    bars = {
        "tgz+\noverlay2": pull + launch,
        "CRFS": values["CRFS: app launch"],
        "pseudo-\nSlacker": values["pseudo-Slacker: app launch"],
        "DADI\nregistry": values["DADI from Registry: app launch"],
        "DADI\nP2P root": values["DADI from P2P Root: app launch"],
    }
    colours = [DADI if name.startswith("DADI") else PAPER_LAUNCH for name in bars]
    axes.bar(range(len(bars)), list(bars.values()), 0.62, color=colours, label="launch")
    axes.bar([0], [pull], 0.62, color=PAPER_PULL, label="pull")
    for position, total in enumerate(bars.values()):
        ratio = "" if position == 0 else f"\n×{total / (pull + launch):.2f}"
        axes.text(position, total + 0.3, f"{total:.2f} s{ratio}", ha="center", va="bottom", fontsize=8.5)
    axes.set_xticks(range(len(bars)), list(bars), fontsize=8.5)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes, max(bars.values()))


def _paper_warm(axes: Axes) -> None:
    axes.set_title("paper, figure 15: WordPress, warm (read off the plot)", loc="left", fontsize=10.5)
    values = {(value.x, value.series): value.y for value in paper_values("Fig15")}
    disks = ("NVMe SSD", "cloud disk")
    series = {"overlay2": "#7d7d7d", "thin LVM (device mapper)": "#b0b0b0", "DADI": DADI}
    for index, (name, colour) in enumerate(series.items()):
        heights = [float(values[disk, name]) for disk in disks]
        places = [group + (index - 1) * 0.27 for group in range(len(disks))]
        axes.bar(places, heights, 0.25, color=colour, label=name)
        for place, height in zip(places, heights, strict=True):
            axes.text(place, height + 0.03, f"{height:.2f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(disks)), disks, fontsize=8.5)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    _plain(axes, 2.117)


def _plain(axes: Axes, highest: float) -> None:
    axes.set_ylabel("seconds", fontsize=9)
    axes.set_ylim(0, highest * 1.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
