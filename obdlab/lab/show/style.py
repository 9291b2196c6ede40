"""The one look of all figures: colours by arm, fonts, captions, files for print. Needs the ``lab`` extra."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

from obdlab.lab.kinds import KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from obdlab.lab.run.rows import Row

OURS, THEIRS, PAPER = "#3b6e8f", "#7d7d7d", "#b9a27a"
#: Text in the paper's colour is darker than its marks, to be readable on white.
PAPER_TEXT = "#7c6a45"
COLOURS = {
    "overlayfs": "#7d7d7d",
    "overlayfs-zstd": "#a0a0a0",
    "overlayfs-unpigz": "#5b5b5b",
    "erofs-layers": "#7a5f9a",
    "stargz-zstd": "#a9b86f",
    "stargz-recorded": "#5f6d2a",
    "obdlab-64k": "#6fa3c4",
    "obdlab": "#3b6e8f",
    "obdlab-prefetch": "#5f9ea0",
    "obdlab-hot": "#c98f5f",
    "obdlab-turbo": "#6a4c93",
    "obdlab-verified": "#2f8f6b",
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
#: Line style, marker and words of numbers by their origin: no two share one, so that a reader sees it in any figure.
ORIGINS = {
    "measured": ("-", "o", ""),
    "emulated": ("--", "s", "emulated"),
    "simulated": (":", "^", "simulated"),
}
#: The end of an arm's name in a label: "obdlab, cold", "overlayfs (A/A)".
_WORD = re.compile(r"[,\s]")
SMALL, LABEL, TITLE = 8.5, 9, 10
_LOOK: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": LABEL,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": TITLE,
    "figure.constrained_layout.use": True,
    "figure.figsize": (8.2, 3.9),
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text, which journals ask for
    "svg.fonttype": "none",
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
}
_DPI = 180


def use() -> None:
    """Give every figure drawn from now on the common look."""
    mpl.rcParams.update(_LOOK)


def colour(name: str, number: int = 0) -> str:
    """Return the colour of an arm, the same in all figures; of an unknown one the ``number``-th of the others.

    ``name`` may be a label: the arm behind the image's name ("redis: obdlab"), before a comma or blank.
    """
    return COLOURS.get(_WORD.split(name.rpartition(": ")[2])[0], _OTHERS[number % len(_OTHERS)])


def origin_look(origin: str, name: str) -> dict[str, Any]:
    """Return matplotlib's line style, marker and label for a series ``name`` of an origin, one of ORIGINS."""
    line, marker, words = ORIGINS[origin]
    return {"linestyle": line, "marker": marker, "label": f"{name} ({words})".lstrip() if words else name}


def plain(axes: Axes, unit: str, grid: str = "y") -> None:
    """Give the axes the common look; ``unit`` labels the vertical axis."""
    axes.set_ylabel(unit, fontsize=LABEL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    axes.grid(visible=False)
    axes.grid(axis="x" if grid == "x" else "y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def below(axes: Axes, handles: Sequence[Any], labels: Sequence[str], columns: int = 3) -> None:
    """Draw a legend below the axes and their label: a sample may lie in any corner."""
    inches = axes.get_window_extent().height / axes.figure.dpi
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.5 / inches)}
    axes.legend(handles, labels, fontsize=SMALL, frameon=False, ncols=columns, **place)


def titled(axes: Axes, title: str, measured: bool) -> bool:
    """Set the title; of axes without measurements, say so in their place. Return ``measured``."""
    axes.set_title(title, loc="left", fontsize=TITLE)
    if not measured:
        axes.text(0.5, 0.5, "not measured", ha="center", color="#777777", transform=axes.transAxes)
        axes.set_axis_off()
    return measured


def is_empty(figure: Figure) -> bool:
    """Return True if no axes of a figure show anything."""
    return not any(axes.axison for axes in figure.axes)


def caption(rows: Sequence[Row], environments: Sequence[Mapping[str, Any]]) -> str:
    """Return the sentence below a figure: samples, hosts, commits and days of its rows; "" without rows."""
    if not rows:
        return ""
    commits = sorted({f"{env.get('git_commit') or ''}"[:12] for env in environments} - {""})
    days = sorted({f"{row.get('started') or ''}"[:10] for row in rows} - {""})
    hosts = sorted({_host(env) for env in environments} - {""})
    parts = [
        f"n = {_counts(rows)} ({len(rows)} rows)",
        "; ".join(hosts),
        f"commit {', '.join(commits)}" if commits else "",
        " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "",
    ]
    busy = "some on a busy host" if any(row.get("quiet") is False for row in rows) else ""
    origins = sorted({ORIGINS[row.get("label", "measured")][2] for row in rows} - {""})
    return " and ".join(origins).capitalize() + " " * bool(origins) + ", ".join(filter(None, [*parts, busy])) + "."


# How many repeats a point has. The experiments of a question can have different numbers of them.
def _counts(rows: Sequence[Row]) -> str:
    repeats: dict[tuple[str, ...], set[Any]] = defaultdict(set)
    for row in rows:
        kind = KINDS.get(row.get("kind", ""))
        axes = kind.axes if kind is not None else ()
        repeats[tuple(str(row.get(key)) for key in ("kind", *axes, "start"))].add(row.get("repeat"))
    counts = [len(each) for each in repeats.values()]
    low, high = min(counts), max(counts)
    return f"{low} at each point" if low == high else f"{low} to {high} by point"


def publish(figure: Figure, stem: Path, text: str = "") -> bytes:
    """Write a figure as PDF, SVG and PNG (``stem`` with the suffixes), and the caption beside it; return the PNG.

    Files are the same for the same figure: no date is written into them.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": stem.name}):
        figure.savefig(stem.with_suffix(".pdf"), bbox_inches="tight", metadata={"CreationDate": None})
        figure.savefig(stem.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
    picture = as_png(figure)
    stem.with_suffix(".png").write_bytes(picture)
    stem.with_suffix(".txt").write_text(f"{text}\n")
    return picture


def as_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file, sharp enough for print."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI, bbox_inches="tight")
    return stream.getvalue()


def _host(environment: Mapping[str, Any]) -> str:
    cores, memory = environment.get("cores"), environment.get("memory_bytes")
    kernel = f"{environment.get('kernel') or ''}".split("-")[0]
    parts = [
        f"{environment.get('cpu_model') or ''}",
        f"{cores} cores" if cores else "",
        f"{memory / 2**30:.0f} GiB" if memory else "",
        f"Linux {kernel}" if kernel else "",
    ]
    return ", ".join(filter(None, parts))
