"""The figures of the evaluation: what was measured here, and the paper's own numbers beside it where it has any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from obdlab.lab.evaluation import questions as q
from obdlab.lab.evaluation.results import Results, launch_s, samples
from obdlab.lab.paper import paper_values
from obdlab.lab.statistics import Estimate, median_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from obdlab.lab.rows import Row

OURS, THEIRS, PAPER = "#3b6e8f", "#7d7d7d", "#b9a27a"
_COLOURS = {
    "overlayfs": "#7d7d7d",
    "obdlab": "#3b6e8f",
    "obdlab-prefetch": "#5f9ea0",
    "obdlab-hot": "#c98f5f",
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
_NOTHING = "not measured"

#: (label, value, low, high)
Bar = tuple[str, float, float, float]


def draw(key: str, results: Results) -> Figure:
    """Return the figure of a question. Raises UnknownQuestionError."""
    asked = q.question(key)
    figure = _DRAWINGS[key](results)
    figure.suptitle(asked.title, fontsize=12.5, x=0.01, ha="left")
    return figure


def _pair(widths: Sequence[float] = (1.25, 1.0)) -> tuple[Figure, Axes, Axes]:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.9), width_ratios=list(widths), layout="constrained")
    return figure, left, right


def _one() -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(8.2, 3.9), layout="constrained")
    return figure, axes


# -- the pieces ------------------------------------------------------------------------------------------------------


def _bar(label: str, values: Sequence[float]) -> Bar | None:
    if not values:
        return None
    found = median_interval(values)
    return label, found.median, found.low, found.high


def _bars(axes: Axes, bars: Sequence[Bar | None], title: str, unit: str, colours: Sequence[str] = ()) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    shown = [bar for bar in bars if bar is not None]
    if not shown:
        axes.text(0.5, 0.5, _NOTHING, ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    used = list(colours) or [_COLOURS.get(bar[0].split("\n")[0], OURS) for bar in shown]
    values = [bar[1] for bar in shown]
    top = max(bar[3] for bar in shown)
    axes.bar(range(len(shown)), values, 0.62, color=used)
    for place, (_, value, low, high) in enumerate(shown):
        if high > low:
            axes.errorbar(place, value, [[value - low], [high - value]], color="black", capsize=4, linewidth=1.1)
        axes.text(place, high + 0.02 * top, f"{value:.3g}", ha="center", va="bottom", fontsize=8.5)
    axes.set_xticks(range(len(shown)), [bar[0] for bar in shown], fontsize=8.5)
    axes.set_ylim(0, top * 1.2)
    _plain(axes, unit)


def _lines(
    axes: Axes, series: dict[str, dict[float, Estimate]], title: str, x: str, unit: str, *, log: bool = True
) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    if not any(series.values()):
        axes.text(0.5, 0.5, _NOTHING, ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    for name, points in series.items():
        if not points:
            continue
        places = sorted(points)
        middle = [points[place].median for place in places]
        colour = _COLOURS.get(name)
        (line,) = axes.plot(places, middle, marker="o", markersize=4, label=name, color=colour)
        low, high = ([getattr(points[place], end) for place in places] for end in ("low", "high"))
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    if log:
        axes.set_xscale("log", base=2)
        ticks = sorted({place for points in series.values() for place in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8.5)
        axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x, fontsize=9)
    axes.legend(fontsize=8.5, frameon=False)
    _plain(axes, unit)


def _distribution(axes: Axes, series: Mapping[str, Sequence[float]], title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    if not any(series.values()):
        axes.text(0.5, 0.5, _NOTHING, ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    for name, values in series.items():
        if values:
            ordered = np.sort(np.asarray(values, dtype=float))
            shares = np.arange(1, len(ordered) + 1) / len(ordered)
            axes.step(ordered, shares, where="post", label=f"{name} ({len(ordered)})", color=_COLOURS.get(name))
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.set_xlabel(unit, fontsize=9)
    axes.legend(fontsize=8.5, frameon=False, loc="lower right")
    _plain(axes, "share of starts")


def _plain(axes: Axes, unit: str) -> None:
    axes.set_ylabel(unit, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def _by(rows: Sequence[Row], x: str, key: str) -> dict[float, Estimate]:
    groups: dict[float, list[float]] = {}
    for row in rows:
        groups.setdefault(float(row[x]), []).append(float(row[key]))
    return {place: median_interval(values) for place, values in groups.items()}


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()  # some are ranges, or words


def _paper(figure: str, names: dict[str, str], x: str | None = None) -> list[Bar | None]:
    found: list[Bar | None] = []
    values = {(value.series, value.x): float(value.y) for value in paper_values(figure) if _is_number(value.y)}
    for series, label in names.items():
        value = next((y for (name, at), y in values.items() if name == series and x in (None, at)), None)
        if value is not None:
            found.append((label, value, value, value))
    return found


# -- the figures -----------------------------------------------------------------------------------------------------

_ARMS = ("overlayfs", "obdlab", "obdlab-prefetch", "obdlab-hot")


def _totals(results: Results, start: str, disk: str, arms: Sequence[str] = _ARMS) -> list[Bar | None]:
    return [_bar(arm, samples(results.rows(q.START, arm=arm, start=start, disk=disk), "total_s")) for arm in arms]


def _cold(results: Results) -> Figure:
    figure, left, right = _pair()
    _bars(left, _totals(results, "cold", "native"), "measured here (link emulated)", "seconds")
    bars = _paper(
        "Fig14",
        {
            "tgz+overlay2: total": "tgz+\noverlay2",
            "CRFS: app launch": "CRFS",
            "pseudo-Slacker: app launch": "pseudo-\nSlacker",
            "DADI from Registry: app launch": "DADI\nregistry",
            "DADI from P2P Root: app launch": "DADI\nP2P root",
        },
    )
    _bars(right, bars, "paper, figure 14: WordPress", "seconds", [PAPER] * 5)
    return figure


def _warm(results: Results) -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.9), layout="constrained")
    for place, disk in enumerate(("native", "cloud")):
        title = "measured here: disk as it is" if disk == "native" else "disk throttled to 2,000 IOPS, 100 MB/s"
        _bars(axes[place], _totals(results, "dropped", disk, _ARMS[:2]), title, "seconds")
    bars: list[Bar | None] = []
    for disk, label in (("NVMe SSD", "NVMe"), ("cloud disk", "cloud")):
        names = {
            "overlay2": f"overlay2\n{label}",
            "thin LVM (device mapper)": f"LVM\n{label}",
            "DADI": f"DADI\n{label}",
        }
        bars += _paper("Fig15", names, disk)
    _bars(axes[2], bars, "paper, figure 15: WordPress", "seconds", [PAPER] * 6)
    return figure


def _trace(results: Results) -> Figure:
    figure, left, right = _pair()
    bars = [
        _bar(f"{arm}\n{start}", [launch_s(row) for row in results.rows(q.START, arm=arm, start=start, disk="native")])
        for arm, start in (*((arm, "cold") for arm in _ARMS[1:]), ("obdlab", "warm"))
    ]
    _bars(left, bars, "measured here: create to ready (link emulated)", "seconds")
    bars = []
    for x, label in (("cold cache", "cold"), ("warm cache", "warm")):
        names = {"app launch (no prefetch)": "DADI", "app launch with prefetch": "with trace"}
        bars += _paper("Fig16", {series: f"{name}\n{label}" for series, name in names.items()}, x)
    _bars(right, bars, "paper, figure 16: WordPress", "seconds", [PAPER] * 4)
    return figure


def _pulls(results: Results) -> Figure:
    figure, left, right = _pair((1, 1))
    series = {arm: samples(results.rows(q.START, arm=arm, start="cold"), "pull_s") for arm in _ARMS}
    _distribution(left, series, "measured here (link emulated): the pull", "seconds")
    hosts: dict[str, list[tuple[float, float]]] = {}
    for value in paper_values("Fig18"):
        if value.x.isdecimal() and _is_number(value.y) and value.unit.startswith("s "):
            hosts.setdefault(value.series, []).append((float(value.y), float(value.x) / 100))
    right.set_title("paper, figure 18: 100 production hosts", loc="left", fontsize=10)
    for (name, points), style in zip(hosts.items(), ("-", "--"), strict=False):
        right.plot(*zip(*sorted(points), strict=True), style, color=PAPER, label=name)
    right.set_xlabel("seconds", fontsize=9)
    right.set_ylim(0, 1.02)
    right.legend(fontsize=8.5, frameon=False, loc="lower right")
    _plain(right, "share of hosts")
    return figure


def _launches(results: Results) -> Figure:
    figure, left, right = _pair((1, 1))
    for axes, start in ((left, "dropped"), (right, "warm")):
        series = {
            arm: [launch_s(row) for row in results.rows(q.START, arm=arm, start=start, disk="native")]
            for arm in _ARMS[:2]
        }
        title = "page cache dropped" if start == "dropped" else "page cache warm"
        _distribution(axes, series, f"measured here: create to ready, {title}", "seconds")
    return figure


def _reads(results: Results) -> Figure:
    figure, axes = _one()
    devices = ("loop", "obdlab-raw", "obdlab-lz4", "obdlab-zstd")
    series = {name: _by(results.rows(q.FIO, device=name), "iodepth", "iops") for name in devices}
    _lines(axes, series, "measured here: random reads of 8 KiB", "queue depth", "reads/s")
    return figure


def _scan(run: q.Run) -> Callable[[Results], Figure]:
    def drawing(results: Results) -> Figure:
        figure, left, right = _pair((1, 1))
        for axes, disk in ((left, "native"), (right, "cloud")):
            bars = [
                _bar(arm, samples(results.rows(run, arm=arm, start="dropped", disk=disk), "total_s"))
                for arm in ("overlayfs", "obdlab", "erofs", "loop")
            ]
            title = "measured here: disk as it is" if disk == "native" else "disk throttled to 2,000 IOPS, 100 MB/s"
            _bars(axes, bars, title, "seconds")
        return figure

    return drawing


def _builds(results: Results) -> Figure:
    figure, left, right = _pair((1, 1))
    arms = ("overlayfs", "obdlab-append", "obdlab-sparse")
    for axes, key, title in ((left, "build_s", "write and chmod"), (right, "commit_s", "commit (tar for overlayfs)")):
        bars = [_bar(arm, samples(results.rows(q.BUILD, layer=arm), key)) for arm in arms]
        _bars(axes, bars, f"measured here: {title}", "seconds")
    return figure


def _indexes(results: Results) -> Figure:
    figure, left, right = _pair((1, 1))
    rows = [row for row in results.rows(q.INDEX) if row.get("layers") == 1]
    _lines(left, {"in batches": _by(rows, "segments", "batch_m_s")}, "lookups, one core", "segments", "million/s")
    left.axhline(6, color=PAPER, linestyle="--", linewidth=1)
    left.text(
        1.0,
        6,
        "paper: > 6 ",
        color=PAPER,
        fontsize=8.5,
        ha="right",
        va="bottom",
        transform=left.get_yaxis_transform(),
    )
    merged = [row for row in results.rows(q.INDEX) if row.get("segments") == 100000]
    _lines(right, {"100,000 segments in all": _by(merged, "layers", "merge_ms")}, "merge", "layers", "ms")
    return figure


def _codecs(results: Results) -> Figure:
    figure, left, right = _pair((1, 1))
    for axes, key, title in ((left, "read_mb_s", "reading in order"), (right, "ratio", "size, of the content")):
        series = {
            name: _by(results.rows(q.CODEC, algorithm=name, workers=1), "block_size", key) for name in ("lz4", "zstd")
        }
        _lines(
            axes, series, f"measured here: {title}", "block size, bytes", "MB/s" if key == "read_mb_s" else "share"
        )
    return figure


def _conversions(results: Results) -> Figure:
    figure, left, right = _pair((1, 1))
    images = list(dict.fromkeys(str(row["image"]) for row in results.rows(q.CONVERSION)))
    for axes, key, unit in ((left, "seconds", "seconds"), (right, "of_source", "of the gzip layers' size")):
        bars = [
            _bar(f"{name}\n{image}", samples(results.rows(q.CONVERSION, image=image, algorithm=name), key))
            for image in images
            for name in ("lz4", "zstd")
        ]
        _bars(axes, bars, f"measured here: {'time' if key == 'seconds' else 'size'}", unit)
    return figure


def _missed(results: Results) -> Figure:
    figure, axes = _one()
    rows = results.rows(q.MISSES, size=4096)
    series = {f"{name} of reads": _by(rows, "rtt_ms", key) for key, name in (("p50_ms", "half"), ("p99_ms", "99 %"))}
    _lines(axes, series, "measured here (delay emulated): a read of 4 KiB", "round trip, ms", "ms", log=False)
    return figure


def _memory(results: Results) -> Figure:
    figure, axes = _one()
    rows = results.rows(q.MEMORY)
    series = {"a device": _by(rows, "devices", "device_mib")}
    _lines(axes, series, "measured here: proportional set size", "devices", "MiB", log=False)
    return figure


_DRAWINGS: dict[str, Callable[[Results], Figure]] = {
    "cold_start": _cold,
    "warm_start": _warm,
    "trace_prefetch": _trace,
    "pull_time": _pulls,
    "launch_shape": _launches,
    "random_read": _reads,
    "scan_du": _scan(q.DU),
    "scan_tar": _scan(q.TAR),
    "image_build": _builds,
    "index": _indexes,
    "codec": _codecs,
    "conversion": _conversions,
    "miss_latency": _missed,
    "memory": _memory,
}
