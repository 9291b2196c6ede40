"""A start's reads as a waterfall: file, time, process, and the reason of each wait. Needs the ``lab`` extra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.patches import Patch

from obdlab.command import command
from obdlab.errors import FormatError
from obdlab.lab.show.style import plain
from obdlab.lab.workbench import folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours by how a read found its data, from present to missing.
COLOURS = {
    "there": "#b9c6d1",
    "prefetched": "#5f9ea0",
    "untold": "#dddddd",
    "late": "#c98f5f",
    "missed": "#a63d40",
    "waited": "#a63d40",
}
_NO_FILE = "(the file system itself)"
_NAME_LENGTH = 46
#: The least width of a bar, as a share of the axis, so that it can be seen.
_LEAST_SHARE = 0.0015


def load(path: str | Path = "") -> tuple[pd.DataFrame, dict[str, Any]]:
    """Load the output of ``obdlab trace timeline --json``: a row for each step, and the summary.

    The default path is the workbench's example. Raises FormatError if the file is no timeline.
    """
    path = Path(path) if path else folder("experiments") / "measured" / "timeline" / "redis.json"
    try:
        told = json.loads(path.read_text())
        steps, summary = pd.DataFrame(told["steps"]), dict(told["summary"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"no timeline ({error})", blob=str(path), wanted=command("trace", "timeline", "--json")
        ) from error
    steps["path"] = steps["path"].fillna(_NO_FILE)
    return steps, summary


def told(summary: dict[str, Any]) -> pd.Series[Any]:
    """Return the summary in words."""
    lines = {
        "reads": f"{summary['reads']:,} of {summary['files']} files, by {summary['processes']} processes",
        "read": f"{summary['size'] / 1e6:.1f} MB, {summary['stored_size'] / 1e6:.1f} MB as stored",
        "passed": f"{summary['span_ms']:.0f} ms, {summary['waited_ms']:.0f} ms of them waiting",
    }
    if summary.get("coverage") is not None:
        unread = summary["over_read"] or 0.0
        lines["the trace"] = f"had {summary['coverage']:.1%} of it, {unread:.1%} of its own unread"
    return pd.Series(lines, name="")


def by_file(steps: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each file in the order of first use: processes, reads, bytes and times."""
    grouped = steps.groupby("path", sort=False)
    table = pd.DataFrame(
        {
            "processes": grouped["process"].agg(lambda names: ", ".join(dict.fromkeys(names))),
            "first_ms": grouped["at_ms"].min().round(1),
            "reads": grouped.size(),
            "bytes": grouped["length"].sum(),
            "waited_ms": steps[steps["state"].isin(["late", "missed", "waited"])].groupby("path")["took_ms"].sum(),
        }
    )
    return table.fillna({"waited_ms": 0.0}).sort_values("first_ms", kind="stable").round({"waited_ms": 1})


def draw(steps: pd.DataFrame, *, most_files: int = 36) -> Figure:
    """Draw each read as a bar from begin to end, a line for each of the ``most_files`` files that waited longest."""
    files = by_file(steps)
    shown = files.nlargest(most_files, "waited_ms").sort_values("first_ms", kind="stable")
    height = 1.6 + 0.19 * len(shown)
    figure, (axes, below) = plt.subplots(
        2, 1, figsize=(11.5, height + 1.5), height_ratios=[height, 1.3], sharex=True, layout="constrained"
    )
    end_ms = float((steps["at_ms"] + steps["took_ms"].fillna(0)).max())
    _bars(axes, steps, list(shown.index), end_ms * _LEAST_SHARE)
    left_out = len(files) - len(shown)
    more = f"; {left_out} more files waited less" if left_out else ""
    axes.set_title(f"{len(steps)} reads of {len(files)} files{more}", loc="left", fontsize=10)
    _read_so_far(below, steps)
    return figure


def _bars(axes: Axes, steps: pd.DataFrame, names: list[str], least_ms: float) -> None:
    places = {name: place for place, name in enumerate(names)}
    mine = steps[steps["path"].isin(names)]
    for state, some in mine.groupby("state"):
        widths = some["took_ms"].fillna(0).clip(lower=least_ms)
        lines = [places[name] for name in some["path"]]
        axes.barh(lines, widths, 0.72, some["at_ms"], color=COLOURS.get(str(state), "#888888"))
    axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=7.5)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    present = [state for state in COLOURS if state in set(mine["state"])]
    patches = [Patch(color=COLOURS[state], label=state) for state in present]
    above = (1.0, 1.06 + 0.4 / len(names))
    axes.legend(
        handles=patches, loc="upper right", fontsize=8.5, frameon=False, ncols=len(present), bbox_to_anchor=above
    )
    plain(axes, "", "x")
    axes.tick_params(axis="y", length=0)


def _read_so_far(axes: Axes, steps: pd.DataFrame) -> None:
    ended = steps.assign(end_ms=steps["at_ms"] + steps["took_ms"].fillna(0)).sort_values("end_ms")
    axes.step(ended["end_ms"], ended["length"].cumsum() / 1e6, where="post", color="#3b6e8f")
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.set_xlabel("milliseconds since the first read", fontsize=9)
    plain(axes, "MB read so far", "y")


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else "…" + name[1 - _NAME_LENGTH :]
