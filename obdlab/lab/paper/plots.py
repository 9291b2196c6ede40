"""The figures of the evaluation: measurements made here, beside the paper's numbers where the paper has any."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from obdlab.lab.paper import questions as q
from obdlab.lab.paper.published import paper_values
from obdlab.lab.paper.results import Results, launch_s, samples
from obdlab.lab.run.statistics import Estimate, median_interval
from obdlab.lab.show.plotparts import (
    PAPER,
    Bar,
    as_bar,
    draw_bars,
    draw_distribution,
    draw_lines,
    pair,
    plain,
    single,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.figure import Figure

    from obdlab.lab.run.rows import Row


def draw(key: str, results: Results, *, titled: bool = True) -> Figure:
    """Return the figure of a question; ``titled`` puts the question above it. Raises UnknownQuestionError."""
    asked = q.question(key)
    figure = _DRAWINGS[key](results)
    if titled:
        figure.suptitle(asked.title, fontsize=12.5, x=0.01, ha="left")
    return figure


def is_empty(figure: Figure) -> bool:
    """Return True if a figure shows neither measurements nor numbers of the paper."""
    return not any(axes.axison for axes in figure.axes)


def _by(rows: Sequence[Row], x: str, key: str) -> dict[float, Estimate]:
    groups: dict[float, list[float]] = {}
    for row in rows:
        groups.setdefault(float(row[x]), []).append(float(row[key]))
    return {place: median_interval(values) for place, values in groups.items()}


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()  # some of the paper's values are ranges or words


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
    return [as_bar(arm, samples(results.rows(q.START, arm=arm, start=start, disk=disk), "total_s")) for arm in arms]


def _cold(results: Results) -> Figure:
    figure, left, right = pair()
    draw_bars(left, _totals(results, "cold", "native"), "measured here (link emulated)", "seconds")
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
    draw_bars(right, bars, "paper, figure 14: WordPress", "seconds", PAPER)
    return figure


def _warm(results: Results) -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.9), layout="constrained")
    for place, disk in enumerate(("native", "cloud")):
        title = "measured here: disk as it is" if disk == "native" else "disk throttled to 2,000 IOPS, 100 MB/s"
        draw_bars(axes[place], _totals(results, "dropped", disk, _ARMS[:2]), title, "seconds")
    bars: list[Bar | None] = []
    for disk, label in (("NVMe SSD", "NVMe"), ("cloud disk", "cloud")):
        names = {
            "overlay2": f"overlay2\n{label}",
            "thin LVM (device mapper)": f"LVM\n{label}",
            "DADI": f"DADI\n{label}",
        }
        bars += _paper("Fig15", names, disk)
    draw_bars(axes[2], bars, "paper, figure 15: WordPress", "seconds", PAPER)
    return figure


def _trace(results: Results) -> Figure:
    figure, left, right = pair()
    bars = [
        as_bar(
            f"{arm}\n{start}", [launch_s(row) for row in results.rows(q.START, arm=arm, start=start, disk="native")]
        )
        for arm, start in (*((arm, "cold") for arm in _ARMS[1:]), ("obdlab", "warm"))
    ]
    draw_bars(left, bars, "measured here: create to ready (link emulated)", "seconds")
    bars = []
    for x, label in (("cold cache", "cold"), ("warm cache", "warm")):
        names = {"app launch (no prefetch)": "DADI", "app launch with prefetch": "with trace"}
        bars += _paper("Fig16", {series: f"{name}\n{label}" for series, name in names.items()}, x)
    draw_bars(right, bars, "paper, figure 16: WordPress", "seconds", PAPER)
    return figure


def _pulls(results: Results) -> Figure:
    figure, left, right = pair((1, 1))
    series = {arm: samples(results.rows(q.START, arm=arm, start="cold"), "pull_s") for arm in _ARMS}
    draw_distribution(left, series, "measured here (link emulated): the pull", "seconds")
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
    plain(right, "share of hosts")
    return figure


def _launches(results: Results) -> Figure:
    figure, left, right = pair((1, 1))
    for axes, start in ((left, "dropped"), (right, "warm")):
        series = {
            arm: [launch_s(row) for row in results.rows(q.START, arm=arm, start=start, disk="native")]
            for arm in _ARMS[:2]
        }
        title = "page cache dropped" if start == "dropped" else "page cache warm"
        draw_distribution(axes, series, f"measured here: create to ready, {title}", "seconds")
    return figure


def _reads(results: Results) -> Figure:
    figure, axes = single()
    devices = ("loop", "obdlab-raw", "obdlab-lz4", "obdlab-zstd")
    series = {name: _by(results.rows(q.FIO, device=name), "iodepth", "iops") for name in devices}
    draw_lines(axes, series, "measured here: random reads of 8 KiB", "queue depth", "reads/s")
    return figure


def _scan(run: q.Run) -> Callable[[Results], Figure]:
    def drawing(results: Results) -> Figure:
        figure, left, right = pair((1, 1))
        for axes, disk in ((left, "native"), (right, "cloud")):
            bars = [
                as_bar(arm, samples(results.rows(run, arm=arm, start="dropped", disk=disk), "total_s"))
                for arm in ("overlayfs", "obdlab", "erofs", "loop")
            ]
            title = "measured here: disk as it is" if disk == "native" else "disk throttled to 2,000 IOPS, 100 MB/s"
            draw_bars(axes, bars, title, "seconds")
        return figure

    return drawing


def _builds(results: Results) -> Figure:
    figure, left, right = pair((1, 1))
    arms = ("overlayfs", "obdlab-append", "obdlab-sparse")
    for axes, key, title in ((left, "build_s", "write and chmod"), (right, "commit_s", "commit (tar for overlayfs)")):
        bars = [as_bar(arm, samples(results.rows(q.BUILD, layer=arm), key)) for arm in arms]
        draw_bars(axes, bars, f"measured here: {title}", "seconds")
    return figure


def _indexes(results: Results) -> Figure:
    figure, left, right = pair((1, 1))
    rows = [row for row in results.rows(q.INDEX) if row.get("layers") == 1]
    found = {"in batches": _by(rows, "segments", "batch_m_s")}
    title = "measured here: lookups in batches, one core"
    draw_lines(left, found, title, "segments", "million/s", theirs=(6, "paper: more than 6"))
    merged = [row for row in results.rows(q.INDEX) if row.get("segments") == 100000]
    title = "measured here: merging layers of 100,000 segments in all"
    draw_lines(right, {"": _by(merged, "layers", "merge_ms")}, title, "layers", "ms")
    return figure


def _codecs(results: Results) -> Figure:
    figure, left, right = pair((1, 1))
    for axes, key, title in ((left, "read_mb_s", "reading in order"), (right, "ratio", "size, of the content")):
        series = {
            name: _by(results.rows(q.CODEC, algorithm=name, workers=1), "block_size", key) for name in ("lz4", "zstd")
        }
        draw_lines(
            axes, series, f"measured here: {title}", "block size, bytes", "MB/s" if key == "read_mb_s" else "share"
        )
    return figure


def _conversions(results: Results) -> Figure:
    figure, left, right = pair((1, 1))
    images = list(dict.fromkeys(str(row["image"]) for row in results.rows(q.CONVERSION)))
    for axes, key, unit in ((left, "seconds", "seconds"), (right, "of_source", "of the gzip layers' size")):
        bars = [
            as_bar(f"{name}\n{image}", samples(results.rows(q.CONVERSION, image=image, algorithm=name), key))
            for image in images
            for name in ("lz4", "zstd")
        ]
        draw_bars(axes, bars, f"measured here: {'time' if key == 'seconds' else 'size'}", unit)
    return figure


def _missed(results: Results) -> Figure:
    figure, axes = single()
    rows = results.rows(q.MISSES, size=4096)
    series = {f"{name} of reads": _by(rows, "rtt_ms", key) for key, name in (("p50_ms", "half"), ("p99_ms", "99 %"))}
    draw_lines(axes, series, "measured here (delay emulated): a read of 4 KiB", "round trip, ms", "ms", log=False)
    return figure


def _memory(results: Results) -> Figure:
    figure, axes = single()
    rows = results.rows(q.MEMORY)
    series = {"": _by(rows, "devices", "device_mib")}
    draw_lines(axes, series, "measured here: proportional set size of one device", "devices", "MiB", log=False)
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
